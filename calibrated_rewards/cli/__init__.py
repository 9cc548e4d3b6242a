"""The command `calibrated-rewards`: main.py has the table of commands, and each command is a file, or a folder (demo/).

- main.py, errors.py: choose a command, and turn errors into messages
- options.py, model_options.py: options that several commands share, and those that name models
- calibrate.py, check_scorer.py, evaluate.py, frontier.py, inspect.py, report.py, reward.py, serve.py, train.py
- adapters.py: the commands `path` and `cp`
"""
