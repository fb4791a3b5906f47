"""The core of FCCO estimators: moving averages of inner functions, keyed by sample."""

from llm_xrisk.fcco.distributed import join, leave, world_size
from llm_xrisk.fcco.dual import PerSampleDual
from llm_xrisk.fcco.estimator import InnerEstimator
from llm_xrisk.fcco.rules import log_moving_average, moving_average, scent
from llm_xrisk.fcco.schedules import constant, cosine

__all__ = [
    "InnerEstimator",
    "PerSampleDual",
    "constant",
    "cosine",
    "join",
    "leave",
    "log_moving_average",
    "moving_average",
    "scent",
    "world_size",
]
