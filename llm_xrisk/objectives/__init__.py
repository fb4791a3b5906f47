"""Objectives of the X-risk family, each one file: per-row scores in, loss and metrics out."""

from llm_xrisk.objectives.base import Objective, ObjectiveOutput
from llm_xrisk.objectives.list_statistics import ranking_statistics
from llm_xrisk.objectives.registry import *  # noqa: F403  the registry's names are the public ones
from llm_xrisk.objectives.registry import OBJECTIVES
from llm_xrisk.objectives.sequence import SequenceObjective
from llm_xrisk.objectives.temperature_network import TemperatureNetwork
from llm_xrisk.objectives.temperatures import (
    ConstantTemperature,
    GlobalTemperature,
    IndividualTemperature,
    Temperature,
)

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "OBJECTIVES",
    "ConstantTemperature",
    "GlobalTemperature",
    "IndividualTemperature",
    "Objective",
    "ObjectiveOutput",
    "SequenceObjective",
    "Temperature",
    "TemperatureNetwork",
    "ranking_statistics",
    *OBJECTIVES,
]
