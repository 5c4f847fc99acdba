"""Model files: loading, weights, hub folders, ONNX, torch programs."""
