"""Storage of soft labels, and the cost of an epoch from them."""
