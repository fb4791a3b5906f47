"""What stands between a loss and an optimizer of torch: any of them, none of them replaced."""

from llm_xrisk.optim.compositional import CompositionalTraining
from llm_xrisk.optim.proximal import ProximalPull

__all__ = ["CompositionalTraining", "ProximalPull"]
