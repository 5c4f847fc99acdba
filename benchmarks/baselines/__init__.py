"""A contracted arch beside published, scaled, searched and pruned ones, trained equally."""
