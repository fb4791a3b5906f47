"""Generation with what was trained here, in the engines that others already run."""

from llm_xrisk.serving.temperature_processor import (
    FixedEntropyLogitsProcessor,
    TemperatureLogitsProcessor,
    TempNetLogitsProcessor,
)

__all__ = [
    "FixedEntropyLogitsProcessor",
    "TempNetLogitsProcessor",
    "TemperatureLogitsProcessor",
]
