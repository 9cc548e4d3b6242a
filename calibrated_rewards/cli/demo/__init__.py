"""The command `demo`: command.py runs and prints the steps of pipeline.py, on models from assets.py.

assets.py fetches a language model, an encoder and human ratings; reward_models.py trains a reward model and a judge.
"""
