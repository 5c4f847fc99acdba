"""Full training: its batches and processes, its folder, its evaluation."""
