"""The command line `calibrated-rewards COMMAND ...`: `main` finds the command, and each command is a file."""
