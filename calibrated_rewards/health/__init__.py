"""What a table and its rollouts are like: resolution, precision, spread, and what stands out."""
