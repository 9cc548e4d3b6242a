"""Training runs to read, to start and to edit: each file is one, and nothing imports them."""
