"""The committed grid: methods, what each is for, its four settings, and the learning rates.

Every method has the same learning rates and as many settings, so the same number of configurations
and of steps. Ours and LibAUC's versions of a method have the same settings where both take them.
Where a method has no setting of its own, the class weight (BCE) or weight decay (CE) is one.
`link` is what scores go through before a loss: LibAUC's examples use a sigmoid, ours none, and
both sides may choose on validation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BASELINE = "BCE, DualSampler"
MAX_FPR, TPAUC_REGION = 0.3, (0.5, 0.5)  # (min_tpr, max_fpr)
METRICS = {
    "auroc": "AUROC",
    "ap": "AP",
    "opauc": f"pAUC(FPR<={MAX_FPR})",
    "tpauc": "TPAUC(TPR>={}, FPR<={})".format(*TPAUC_REGION),
}
Settings = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Method:
    """A method of the table.

    Args:
        side: ours, libauc, or baseline, which is neither.
        metric: What it is for: configurations are chosen by it on validation.
        settings: Its settings, four of them.
        peers: LibAUC's versions of it, or what else to compare it with.
    """

    side: str
    metric: str
    settings: Settings
    peers: tuple[str, ...] = ()


def product(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of two values of two settings."""
    (first, a), (second, b) = values.items()
    return [{first: x, second: y} for x in a for y in b]


LINKS = ("raw", "sigmoid")
SQUARED_HINGE = product(link=LINKS, margin=(0.5, 1.0))
LOGISTIC = product(link=LINKS, sharpness=(1.0, 4.0))
PRECISION = [
    {"link": "raw", "surrogate": "squared_hinge", "gamma": 0.1},
    {"link": "sigmoid", "surrogate": "squared_hinge", "gamma": 0.1},
    {"link": "raw", "surrogate": "logistic", "gamma": 0.1},
    {"link": "raw", "surrogate": "logistic", "gamma": 0.9},
]
ONE_WAY_SOFT = [
    {"link": "raw", "tau": 1.0},
    {"link": "raw", "tau": 3.0},
    {"link": "sigmoid", "tau": 0.1},
    {"link": "sigmoid", "tau": 1.0},
]
ONE_WAY_HARD = product(link=LINKS, max_fpr=(0.1, MAX_FPR))
TWO_WAY_SOFT = [
    {"link": "raw", "tau1": 1.0, "tau2": 1.0},
    {"link": "raw", "tau1": 3.0, "tau2": 1.0},
    {"link": "sigmoid", "tau1": 1.0, "tau2": 0.3},
    {"link": "sigmoid", "tau1": 1.0, "tau2": 1.0},
]
TWO_WAY_HARD = product(link=LINKS, margin=(0.5, 1.0))
MODES = product(link=LINKS, mode=("sgd", "adam"))

METHODS: dict[str, Method] = {
    "BCE, shuffled": Method("baseline", "auroc", [{"weight": w} for w in (1, 3, 10, 42)]),
    BASELINE: Method("baseline", "auroc", [{"weight": w} for w in (0.1, 0.3, 1, 3)]),
    "Focal, DualSampler": Method("baseline", "auroc", [{"exponent": e} for e in (0.5, 1, 2, 5)]),
    "PairwiseAUC, squared hinge": Method(
        "ours", "auroc", SQUARED_HINGE, ("LibAUC PairwiseAUCLoss, squared hinge",)
    ),
    "PairwiseAUC, logistic": Method(
        "ours", "auroc", LOGISTIC, ("LibAUC PairwiseAUCLoss, logistic",)
    ),
    "AUCMargin": Method(
        "ours", "auroc", SQUARED_HINGE, ("LibAUC AUCM v1 + PESG", "LibAUC AUCM v2 + PESG")
    ),
    "AUCMargin, compositional": Method(
        "ours", "auroc", product(link=LINKS, tau=(0.1, 1.0)), ("LibAUC CompositionalAUC + PDSCA",)
    ),
    "AveragePrecision": Method("ours", "ap", PRECISION, ("LibAUC APLoss + SOAP",)),
    "AveragePrecision, prior": Method("ours", "ap", PRECISION, ("LibAUC APLoss + SOAP",)),
    "OPAUC": Method("ours", "opauc", ONE_WAY_HARD, ("LibAUC SOPA",)),
    "OPAUCSoft": Method("ours", "opauc", ONE_WAY_SOFT, ("LibAUC SOPAs",)),
    "TPAUC": Method("ours", "tpauc", TWO_WAY_HARD, ("LibAUC STACO",)),
    "TPAUCSoft": Method("ours", "tpauc", TWO_WAY_SOFT, ("LibAUC SOTAs",)),
    "LibAUC PairwiseAUCLoss, squared hinge": Method("libauc", "auroc", SQUARED_HINGE),
    "LibAUC PairwiseAUCLoss, logistic": Method("libauc", "auroc", LOGISTIC),
    "LibAUC AUCM v1 + PESG": Method("libauc", "auroc", MODES),
    "LibAUC AUCM v2 + PESG": Method("libauc", "auroc", MODES),
    "LibAUC CompositionalAUC + PDSCA": Method(
        "libauc", "auroc", product(version=("v1", "v2"), betas=((0.9, 0.9), (0.99, 0.999)))
    ),
    "LibAUC APLoss + SOAP": Method("libauc", "ap", PRECISION),
    "LibAUC SOPA": Method("libauc", "opauc", ONE_WAY_HARD),
    "LibAUC SOPAs": Method("libauc", "opauc", ONE_WAY_SOFT),
    "LibAUC STACO": Method("libauc", "tpauc", TWO_WAY_HARD),
    "LibAUC SOTAs": Method("libauc", "tpauc", TWO_WAY_SOFT),
}
SMOOTHED = "CE, label smoothing"
DIGITS: dict[str, Method] = {
    "CE": Method("baseline", "accuracy", [{"weight_decay": d} for d in (0.0, 1e-4, 1e-3, 1e-2)]),
    SMOOTHED: Method("baseline", "accuracy", [{"smoothing": s} for s in (0.0, 0.05, 0.1, 0.2)]),
    "Focal": Method("baseline", "accuracy", [{"exponent": e} for e in (0.5, 1, 2, 5)]),
    "KLDRO (ABSGD)": Method(
        "ours", "accuracy", [{"tau": t} for t in (0.5, 1.0, 2.0, 5.0)], ("Focal", SMOOTHED)
    ),
}
