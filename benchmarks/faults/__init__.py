"""Runs, label stores and trainings disturbed on purpose: what is lost, what recovering costs."""
