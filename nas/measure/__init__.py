"""Counting and timing a network on the device where it will run."""
