"""How a transformer reads: text to tokens, tokens to batches, batches to numbers, numbers to one score."""
