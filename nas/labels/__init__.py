"""Stored soft labels: building, checking and reading them."""
