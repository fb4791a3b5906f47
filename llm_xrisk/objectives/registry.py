"""All objectives by name: what the command line, the docs and the contract tests read."""

from llm_xrisk.objectives.average_precision import AveragePrecision
from llm_xrisk.objectives.base import Objective
from llm_xrisk.objectives.contrastive import GlobalContrastive
from llm_xrisk.objectives.dapo import DAPO
from llm_xrisk.objectives.dft import DFT, DFT2
from llm_xrisk.objectives.disco import DisCO
from llm_xrisk.objectives.dr_grpo import DrGRPO
from llm_xrisk.objectives.grpo import GRPO
from llm_xrisk.objectives.opauc_soft import OPAUCSoft

OBJECTIVES: dict[str, type[Objective]] = {
    objective.__name__: objective
    for objective in (
        AveragePrecision,
        DAPO,
        DFT,
        DFT2,
        DisCO,
        DrGRPO,
        GRPO,
        GlobalContrastive,
        OPAUCSoft,
    )
}
