"""Throughput with intervals, counts and the devices they belong to."""
