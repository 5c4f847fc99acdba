"""Search strategies replayed on closed tables."""
