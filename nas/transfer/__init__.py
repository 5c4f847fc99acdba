"""What a backbone is worth on other tasks."""
