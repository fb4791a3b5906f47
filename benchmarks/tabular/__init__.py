"""Parts of `benchmarks/imbalanced.py`; what the LibAUC side needs imports torch and numpy alone."""
