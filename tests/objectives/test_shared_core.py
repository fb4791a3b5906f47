"""DFT, SOPA-s and SogCLR keep log u by one and the same code."""

import pytest
import torch
from torch import Tensor

from llm_xrisk.fcco import rules
from llm_xrisk.objectives import DFT2, GlobalContrastive, Objective, OPAUCSoft
from llm_xrisk.objectives.surrogates import Identity
from tests.contract import ObjectiveContract
from tests.objectives.test_contrastive import TestGlobalContrastive as ContrastiveContract
from tests.objectives.test_dft import TestDFT as DFTContract
from tests.objectives.test_opauc_soft import TestOPAUCSoft as OPAUCContract

F64 = torch.float64
GAMMA, TAU = 0.35, 0.5
ANGLES = [[0.3, 1.4], [1.1, 0.2], [2.0, 0.7]]  # of two negatives, in three steps


def similarities(step: int) -> Tensor:
    return torch.tensor(ANGLES[step], dtype=F64).cos()


def dft(objective: Objective, step: int) -> None:
    """Prompt 0 whose negatives have the similarities as scores."""
    scores = torch.cat([torch.zeros(1, dtype=F64), similarities(step)])
    objective(scores, torch.tensor([1, 0, 0]), index=torch.zeros(3, dtype=torch.long))


def sopa(objective: Objective, step: int) -> None:
    """Positive 0 with score 0, negatives with the similarities as scores, l(s) = s."""
    scores = torch.cat([torch.zeros(1, dtype=F64), similarities(step)])
    objective(scores, torch.tensor([1, 0, 0]), index=torch.arange(3))


def sogclr(objective: Objective, step: int) -> None:
    """Anchor 0 along the first axis, both views; views of sample 1 at the angles."""
    angle = torch.tensor(ANGLES[step], dtype=F64)
    other = torch.stack([angle.cos(), angle.sin()], -1)
    anchor = torch.tensor([1.0, 0.0], dtype=F64)
    first, second = torch.stack([anchor, other[0]]), torch.stack([anchor, other[1]])
    objective(first, second, index=torch.arange(2))


def test_equal_inner_values_give_the_three_the_same_log_u_to_rounding() -> None:
    options = {"gamma": GAMMA, "tau": TAU, "state_dtype": F64}
    objectives: list[Objective] = [
        DFT2(3, u_init="first_batch", **options),
        OPAUCSoft(3, surrogate=Identity(), **options),
        GlobalContrastive(3, **options),
    ]
    u = 0.0
    for step in range(3):
        for objective, feed in zip(objectives, (dft, sopa, sogclr), strict=True):
            feed(objective, step)
        g = (similarities(step) / TAU).exp().mean().item()
        u = g if step == 0 else (1 - GAMMA) * u + GAMMA * g
        tracked = [objective.inner.u[0].item() for objective in objectives]
        assert tracked == pytest.approx([torch.tensor(u).log().item()] * 3, rel=1e-6)
        assert max(tracked) - min(tracked) < 1e-15


@pytest.mark.parametrize("contract", [DFTContract, OPAUCContract, ContrastiveContract])
def test_breaking_the_one_rule_breaks_each_of_the_three(
    contract: type[ObjectiveContract], monkeypatch: pytest.MonkeyPatch
) -> None:
    contract().test_value_gradient_and_state_equal_the_loops()

    def forgetful(log_u: Tensor, log_g: Tensor, gamma: Tensor) -> Tensor:
        return torch.logaddexp(torch.log1p(-gamma) + log_g, torch.log(gamma) + log_u)

    monkeypatch.setattr(rules, "log_moving_average", forgetful)
    with pytest.raises(AssertionError):
        contract().test_value_gradient_and_state_equal_the_loops()
