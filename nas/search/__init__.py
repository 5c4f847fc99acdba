"""Decides which candidates to keep, on values alone: no torch, no files but the study."""
