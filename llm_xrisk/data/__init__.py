"""Data sets, the pool of negatives, and what turns rows into batches."""

from llm_xrisk.data.collators import DFTCollator, pad_rows
from llm_xrisk.data.load import load_rows
from llm_xrisk.data.pool import Pool, load_pool
from llm_xrisk.data.samplers import DualSampler, GroupSampler, QuerySampler, TriSampler
from llm_xrisk.data.tokenize import encode_prompt, encode_prompt_completion
from llm_xrisk.data.with_index import with_index

__all__ = [
    "DFTCollator",
    "DualSampler",
    "GroupSampler",
    "Pool",
    "QuerySampler",
    "TriSampler",
    "encode_prompt",
    "encode_prompt_completion",
    "load_pool",
    "load_rows",
    "pad_rows",
    "with_index",
]
