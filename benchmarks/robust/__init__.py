"""Parts of `benchmarks/drrho.py`: its methods and settings, its data, and a run."""
