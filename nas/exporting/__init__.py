"""A model out of the house: fused, as ONNX, and whether it still says the same."""
