"""Throughput of networks on this device: a table, a figure, or a bundle for a board."""
