"""The sub-commands of `calibrated-rewards`, a module each: its options, and what it does; loaded when it is called."""
