"""Decisions of a search on plain values; no torch."""
