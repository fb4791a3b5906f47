"""Plain modules and functions on models, without trainers."""

from llm_xrisk.models.class_gather import ClassGather, SampledLogits
from llm_xrisk.models.fixed_entropy import fixed_entropy_temperature
from llm_xrisk.models.logprobs import TokenLogProbs, selective_log_softmax, token_log_probs
from llm_xrisk.models.tempnet import TempNet, TempNetConfig
from llm_xrisk.models.tempnet_loss import TemperedLoss, tempered_loss

__all__ = [
    "ClassGather",
    "SampledLogits",
    "TempNet",
    "TempNetConfig",
    "TemperedLoss",
    "TokenLogProbs",
    "fixed_entropy_temperature",
    "selective_log_softmax",
    "tempered_loss",
    "token_log_probs",
]
