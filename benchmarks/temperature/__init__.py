"""What benchmarks/tempnet.py is made of: the splits, the frozen models, the samplers."""
