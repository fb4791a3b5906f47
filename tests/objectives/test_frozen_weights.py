"""With frozen weights, gradients of small batches average to that of the objective."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from llm_xrisk.fcco import PerSampleDual
from llm_xrisk.objectives import AveragePrecision, Objective, OPAUCSoft
from llm_xrisk.objectives.opauc import OPAUC
from llm_xrisk.objectives.pairwise_auc import PairwiseAUC
from llm_xrisk.objectives.tpauc import TPAUC
from llm_xrisk.objectives.tpauc_soft import TPAUCSoft

F64 = torch.float64
POSITIVES, ROWS, HALF = 20, 120, 8  # 8 positives and 8 negatives a batch


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = (torch.arange(ROWS) < POSITIVES).long()
    return 0.5 * (torch.randn(ROWS, generator=generator, dtype=F64) + targets), targets


def cosine_and_scale(objective: Objective, steps: int, burn_in: int) -> tuple[float, float]:
    """Of the mean gradient over batches, against the gradient of the objective on all rows."""
    scores, targets = data()
    generator = torch.Generator().manual_seed(1)
    leaf = scores.clone().requires_grad_()
    (exact,) = torch.autograd.grad(objective.exact(leaf, targets), leaf)
    leaf.grad = torch.zeros_like(leaf)
    for step in range(steps + burn_in):
        if step == burn_in:
            leaf.grad.zero_()
        positive = torch.randperm(POSITIVES, generator=generator)[:HALF]
        negative = torch.randperm(ROWS - POSITIVES, generator=generator)[:HALF]
        rows = torch.cat([positive, POSITIVES + negative])
        objective(leaf[rows], targets[rows], index=rows).loss.backward()
    mean = leaf.grad / steps
    cosine = torch.cosine_similarity(mean, exact, dim=0)
    return float(cosine), float(mean @ exact / exact.square().sum())


SMALL = {"num_samples": ROWS, "gamma": 0.01, "state_dtype": F64}
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "average precision": partial(AveragePrecision, prior=POSITIVES / ROWS, **SMALL),
    "one-way partial AUC, soft": partial(OPAUCSoft, tau=0.2, **SMALL),
    "two-way partial AUC, soft": partial(TPAUCSoft, tau1=0.5, tau2=0.2, **SMALL),
    "AUC": PairwiseAUC,
}


@pytest.mark.parametrize("build", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_small_gamma_has_the_direction_and_the_size_of_the_exact_gradient(
    build: Callable[[], Objective],
) -> None:
    cosine, scale = cosine_and_scale(build(), steps=1500, burn_in=600)
    assert cosine >= 0.99
    assert 0.9 <= scale <= 1.1


DUALS: dict[str, Callable[[], Objective]] = {
    "one-way partial AUC": partial(OPAUC, ROWS, max_fpr=0.25, nu_lr=0.2, state_dtype=F64),
    "two-way partial AUC": partial(
        TPAUC, ROWS, min_tpr=0.5, max_fpr=0.25, nu_lr=0.2, y_lr=0.2, state_dtype=F64
    ),
}


@pytest.mark.parametrize("build", DUALS.values(), ids=DUALS)
def test_duals_near_their_best_do_so_too(build: Callable[[], Objective]) -> None:
    objective = build()
    cosine_and_scale(objective, steps=1, burn_in=3000)
    for module in objective.modules():
        if isinstance(module, PerSampleDual):
            module.lr = 0.02
    cosine, scale = cosine_and_scale(objective, steps=3000, burn_in=500)
    assert cosine >= 0.99
    assert 0.9 <= scale <= 1.1


def test_a_small_gamma_pays_for_the_soft_partial_auc() -> None:
    small = OPAUCSoft(ROWS, gamma=0.01, tau=0.1, state_dtype=F64)
    large = OPAUCSoft(ROWS, gamma=0.9, tau=0.1, state_dtype=F64)
    close, scale = cosine_and_scale(small, steps=1500, burn_in=300)
    far, _ = cosine_and_scale(large, steps=1500, burn_in=300)
    assert close >= 0.998
    assert 0.9 <= scale <= 1.1
    assert far <= close - 0.02
