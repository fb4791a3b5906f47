"""Generation with what was trained here, in the engines that others already run.

Names are imported at first use: every vLLM of the environment loads
:mod:`llm_xrisk.serving.vllm_processor`, and should load little besides.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_xrisk.serving.division import divide_logits
    from llm_xrisk.serving.temperature_processor import (
        FixedEntropyLogitsProcessor,
        TemperatureLogitsProcessor,
        TempNetLogitsProcessor,
    )
    from llm_xrisk.serving.vllm_processor import TempNetVLLMProcessor

__all__ = [
    "FixedEntropyLogitsProcessor",
    "TempNetLogitsProcessor",
    "TempNetVLLMProcessor",
    "TemperatureLogitsProcessor",
    "divide_logits",
]

_MODULES = {"TempNetVLLMProcessor": "vllm_processor", "divide_logits": "division"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'temperature_processor')}"), name)
