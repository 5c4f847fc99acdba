"""How good our timings are: agreement with timm, errors of the gate, predictions."""
