"""What we report: `python -m benchmarks.NAME`; nothing imports it."""
