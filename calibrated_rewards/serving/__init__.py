"""A calibrated reward behind HTTP: dialects, limits, metrics, replicas."""
