"""The whole library on a real language model in one command: calibrate, choose, train, measure, report."""
