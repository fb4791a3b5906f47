"""Trainers on ``transformers.Trainer``: score, weigh, backprop."""

from llm_xrisk.trainers.classification import ClassificationTrainer
from llm_xrisk.trainers.config import (
    ClassificationConfig,
    ContrastiveConfig,
    DFTConfig,
    DisCOConfig,
    RolloutConfig,
    RowConfig,
    ScoreConfig,
)
from llm_xrisk.trainers.contrastive import ContrastiveTrainer
from llm_xrisk.trainers.dft import DFTTrainer
from llm_xrisk.trainers.disco import DisCOTrainer
from llm_xrisk.trainers.drrho import DRRHOTrainer
from llm_xrisk.trainers.drrho_config import DRRHOConfig
from llm_xrisk.trainers.mixin import ScoreWeighBackprop
from llm_xrisk.trainers.rows import RowTrainer
from llm_xrisk.trainers.tempnet import TempNetTrainer
from llm_xrisk.trainers.tempnet_config import TempNetTrainingConfig

__all__ = [
    "ClassificationConfig",
    "ClassificationTrainer",
    "ContrastiveConfig",
    "ContrastiveTrainer",
    "DFTConfig",
    "DFTTrainer",
    "DRRHOConfig",
    "DRRHOTrainer",
    "DisCOConfig",
    "DisCOTrainer",
    "RolloutConfig",
    "RowConfig",
    "RowTrainer",
    "ScoreConfig",
    "ScoreWeighBackprop",
    "TempNetTrainer",
    "TempNetTrainingConfig",
]
