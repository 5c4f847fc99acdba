"""Running functions in worker processes or on a Ray cluster."""
