"""What a trained backbone is worth elsewhere: linear probe, k-NN, and a small segmentation."""
