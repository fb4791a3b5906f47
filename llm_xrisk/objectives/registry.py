"""All objectives by name: what the command line, the docs and the contract tests read."""

from llm_xrisk.objectives.auc_margin import AUCMargin
from llm_xrisk.objectives.average_precision import AveragePrecision
from llm_xrisk.objectives.base import Objective
from llm_xrisk.objectives.chi2_dro import Chi2ConstrainedDRO, Chi2DRO
from llm_xrisk.objectives.clip import GlobalCLIP
from llm_xrisk.objectives.contrastive import GlobalContrastive
from llm_xrisk.objectives.contrastive_baselines import CLIPLoss, InfoNCE
from llm_xrisk.objectives.contrastive_robust import RobustGlobalContrastive
from llm_xrisk.objectives.cvar_dro import CVaRDRO
from llm_xrisk.objectives.dapo import DAPO
from llm_xrisk.objectives.dft import DFT, DFT2
from llm_xrisk.objectives.disco import DisCO
from llm_xrisk.objectives.dr_grpo import DrGRPO
from llm_xrisk.objectives.extreme_classification import ExtremeClassification
from llm_xrisk.objectives.grpo import GRPO
from llm_xrisk.objectives.kl_constrained_dro import KLConstrainedDRO
from llm_xrisk.objectives.kl_dro import KLDRO
from llm_xrisk.objectives.listwise_cross_entropy import ListwiseCrossEntropy
from llm_xrisk.objectives.ndcg import NDCG
from llm_xrisk.objectives.ndcg_top_k import TopKNDCG
from llm_xrisk.objectives.opauc import OPAUC
from llm_xrisk.objectives.opauc_soft import OPAUCSoft
from llm_xrisk.objectives.pairwise_auc import PairwiseAUC
from llm_xrisk.objectives.tpauc import TPAUC
from llm_xrisk.objectives.tpauc_soft import TPAUCSoft

OBJECTIVES: dict[str, type[Objective]] = {
    objective.__name__: objective
    for objective in (
        AUCMargin,
        AveragePrecision,
        CLIPLoss,
        CVaRDRO,
        Chi2ConstrainedDRO,
        Chi2DRO,
        DAPO,
        DFT,
        DFT2,
        DisCO,
        DrGRPO,
        ExtremeClassification,
        GRPO,
        GlobalCLIP,
        GlobalContrastive,
        InfoNCE,
        KLConstrainedDRO,
        KLDRO,
        ListwiseCrossEntropy,
        NDCG,
        OPAUC,
        OPAUCSoft,
        PairwiseAUC,
        RobustGlobalContrastive,
        TPAUC,
        TPAUCSoft,
        TopKNDCG,
    )
}
