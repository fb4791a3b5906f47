"""All objectives by name: what the command line, the docs and the contract tests read."""

from llm_xrisk.objectives.base import Objective
from llm_xrisk.objectives.dft import DFT, DFT2
from llm_xrisk.objectives.disco import DisCO

OBJECTIVES: dict[str, type[Objective]] = {
    objective.__name__: objective
    for objective in (
        DFT,
        DFT2,
        DisCO,
    )
}
