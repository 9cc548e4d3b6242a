"""What a calibrated reward is made of: from ranks to values, prompts by other names, files, checks, micro-batches."""
