"""What `check_scorer` asks of a scorer, and how its answer is judged."""
