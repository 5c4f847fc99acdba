"""How good our timings are."""
