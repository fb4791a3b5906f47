"""Trainers on ``transformers.Trainer``: score, weigh, backprop."""

from llm_xrisk.trainers.config import DFTConfig, DisCOConfig, RolloutConfig, ScoreConfig
from llm_xrisk.trainers.dft import DFTTrainer
from llm_xrisk.trainers.disco import DisCOTrainer
from llm_xrisk.trainers.mixin import ScoreWeighBackprop

__all__ = [
    "DFTConfig",
    "DFTTrainer",
    "DisCOConfig",
    "DisCOTrainer",
    "RolloutConfig",
    "ScoreConfig",
    "ScoreWeighBackprop",
]
