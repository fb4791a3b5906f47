"""The main job, end to end, on the embedded model: what ``make quickstart`` runs."""

from llm_xrisk.quickstart.config import QuickstartConfig

__all__ = ["QuickstartConfig"]
