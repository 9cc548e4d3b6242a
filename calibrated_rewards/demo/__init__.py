"""The whole machine on a real language model, in one command: calibrate, choose, train, measure, look."""
