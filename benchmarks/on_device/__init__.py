"""What `benchmarks/device.py` checks and measures, one part per module."""
