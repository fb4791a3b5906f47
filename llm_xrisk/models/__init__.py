"""Plain modules and functions on models, without trainers."""

from llm_xrisk.models.class_gather import ClassGather, SampledLogits
from llm_xrisk.models.logprobs import TokenLogProbs, selective_log_softmax, token_log_probs

__all__ = [
    "ClassGather",
    "SampledLogits",
    "TokenLogProbs",
    "selective_log_softmax",
    "token_log_probs",
]
