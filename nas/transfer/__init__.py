"""Checks of a trained backbone on other tasks: linear probe, nearest neighbours, segmentation."""
