"""One training step, recipes, losses, checkpoints and full trainings."""
