"""Which model to keep: the contraction search and everything it calls."""
