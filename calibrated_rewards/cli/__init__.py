"""The command `calibrated-rewards`: main.py has the table of commands, and each command is a file, or a folder (demo/).

- main.py: choose a command
- options.py, model_options.py: options that several commands share, errors in their words, options that name models
- option_files.py: options from a YAML file, and into one
- calibrate.py, check_scorer.py, evaluate.py, frontier.py, inspect.py, report.py, reward.py, serve.py, train.py
- adapters.py: the commands `path` and `cp`
"""
