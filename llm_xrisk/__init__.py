"""Discriminative fine-tuning of language models, and X-risk optimization, on one FCCO core.

Importing this package imports nothing else: take what you need from ``llm_xrisk.objectives`` (torch
alone), ``llm_xrisk.trainers`` (transformers) and their neighbours.
"""

__version__ = "0.1.0"
