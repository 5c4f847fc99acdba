"""Augmented views of images, as functions of a code."""
