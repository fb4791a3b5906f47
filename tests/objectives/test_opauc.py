"""OPAUC (SOPA, Algorithm 29)."""

from typing import Any, ClassVar

import pytest
import torch

from llm_xrisk.objectives import Objective
from llm_xrisk.objectives.opauc import OPAUC
from llm_xrisk.objectives.pairwise_auc import PairwiseAUC
from llm_xrisk.objectives.surrogates import Logistic
from tests.contract import Batch, ObjectiveContract, evaluate, exact_loss
from tests.objectives.several_labels import each_label, three_labels
from tests.objectives.test_average_precision import imbalanced
from tests.reference import opauc as reference

F64 = torch.float64
SHARE, STEP = 0.4, 0.15


class TestOPAUC(ObjectiveContract):
    objective_class: ClassVar[type[Objective]] = OPAUC
    options: ClassVar[dict[str, Any]] = {"max_fpr": SHARE, "nu_lr": STEP}
    has_duals: ClassVar[bool] = True
    keys: ClassVar[int] = 12

    def make_batch(self, generator: torch.Generator) -> Batch:
        return imbalanced(generator)

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        u |= {key: u.get(key, 0.0) for key in range(self.keys)}  # line 1
        index = batch.groups["index"].tolist()
        rows = (batch.scores.tolist(), batch.targets.bool().tolist(), index)
        loss, gradient = reference.step(*rows, u, max_fpr=SHARE, nu_lr=STEP)
        return loss, {"scores": gradient}

    def tracked(self, objective: Objective) -> dict[int, Any]:
        return dict(enumerate(objective.nu.value.tolist()))

    def test_worked_example(self) -> None:
        batch = Batch(
            torch.tensor([1.0, 0.5, 0.2]), torch.tensor([1, 0, 0]), {"index": torch.arange(3)}
        )
        objective = OPAUC(num_samples=3, max_fpr=0.5, nu_lr=0.2)
        # losses 0.5^2 and 0.2^2, both above nu = 0
        assert evaluate(objective, batch).loss.item() == pytest.approx((0.25 + 0.04) / 2)
        # nu = 0 - 0.2 (0.5 - 1) = 0.1, which the first loss alone exceeds
        result = evaluate(objective, batch)
        assert result.loss.item() == pytest.approx(0.5 * 0.1 + (0.25 - 0.1) / 2)
        assert result.gradients["scores"].tolist() == pytest.approx([-0.5, 0.5, 0.0])
        assert objective.nu.value.tolist() == pytest.approx([0.1 - 0.2 * (0.5 - 0.5), 0.0, 0.0])

    def test_gamma_one_is_the_minibatch_loss(self) -> None:
        """There is no gamma; between the k-th and the next loss nu gives the mini-batch's best."""
        for batch in self.batches(2):
            order = batch.scores[batch.targets == 0].sort(descending=True).values
            edge = (order[1] + order[2]) / 2  # k = 2 of 5 negatives
            objective = self.build(num_samples=9)
            objective.nu.value.copy_((1 + edge - batch.scores).relu().square())
            own = Batch(batch.scores, batch.targets, {"index": torch.arange(9)})
            result, leaf = evaluate(objective, own), own.copy()
            want = exact_loss(objective, leaf)
            (gradient,) = torch.autograd.grad(want, leaf.scores)
            torch.testing.assert_close(result.loss, want.detach(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(result.gradients["scores"], gradient, rtol=1e-12, atol=1e-12)


class TestOPAUCOfSeveralLabels(TestOPAUC):
    options: ClassVar[dict[str, Any]] = {"max_fpr": SHARE, "nu_lr": STEP, "num_labels": 3}
    keys: ClassVar[int] = 36

    def make_batch(self, generator: torch.Generator) -> Batch:
        return three_labels(generator)

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        u |= {key: u.get(key, 0.0) for key in range(self.keys)}
        index = batch.groups["index"].tolist()

        def one(label: int, scores: list[float], positive: list[bool], own: dict[int, Any]) -> Any:
            return reference.step(scores, positive, index, own, max_fpr=SHARE, nu_lr=STEP)

        return each_label(batch, u, one, lambda column: any(column) and not all(column))

    def test_worked_example(self) -> None:
        scores = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.2, 0.5]])
        batch = Batch(
            scores, torch.tensor([[1, 0], [0, 1], [0, 0]]), {"index": torch.tensor([2, 0, 1])}
        )
        objective = OPAUC(num_samples=3, max_fpr=0.5, nu_lr=0.2, num_labels=2)
        # losses 0.5^2 and 0.2^2 of the first label, 1 and 1.5^2 of the second
        result = evaluate(objective, batch)
        assert result.loss.item() == pytest.approx(((0.25 + 0.04) / 2 + (1 + 2.25) / 2) / 2)
        # sample 2 is the first label's positive, sample 0 the second's
        assert objective.nu.value.tolist() == pytest.approx([0, 0.1, 0, 0, 0.1, 0])

    def test_gamma_one_is_the_minibatch_loss(self) -> None:
        """Each label's exact value is that of the label by itself."""
        for batch in self.batches(2):
            whole, single = self.build(), OPAUC(12, max_fpr=SHARE)
            own = [
                single.exact(batch.scores[:, k], batch.targets[:, k])
                for k in range(3)
                if 0 < batch.targets[:, k].sum() < 9
            ]
            got = whole.exact(batch.scores, batch.targets)
            torch.testing.assert_close(got, torch.stack(own).mean(), rtol=1e-12, atol=1e-12)


def frozen(positives: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and targets of a data set, the positives first."""
    targets = (torch.arange(rows) < positives).long()
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, generator=generator, dtype=F64) + targets, targets


def largest_losses(scores: torch.Tensor, positives: int) -> torch.Tensor:
    """The losses of each positive, the largest first."""
    gap = scores[positives:][None] - scores[:positives][:, None]
    return (1 + gap).relu().square().sort(descending=True).values


@pytest.mark.parametrize("batch", [40, 8])  # of 40 negatives
def test_on_frozen_scores_nu_finds_the_quantile_and_the_value_the_mean_of_the_largest(
    batch: int,
) -> None:
    scores, targets = frozen(10, 50)
    objective = OPAUC(50, max_fpr=0.25, nu_lr=0.2, state_dtype=F64)  # k = 10
    generator, nu, value = torch.Generator().manual_seed(1), torch.zeros(10, dtype=F64), 0.0
    for step in range(2000):
        objective.nu.lr = 0.2 if step < 600 else 0.005
        rows = torch.cat([torch.arange(10), 10 + torch.randperm(40, generator=generator)[:batch]])
        loss = objective(scores[rows], targets[rows], index=rows).loss
        nu += objective.nu.value[:10] * (step >= 1000) / 1000
        value += loss.item() * (step >= 1000) / 1000
    losses = largest_losses(scores, 10)
    assert ((nu <= losses[:, 9] + 0.02) & (nu >= losses[:, 10] - 0.02)).all()
    want = sum(reference.mean_of_tail(row, 0.25) for row in losses.tolist()) / 10
    assert value / 0.25 == pytest.approx(want, rel=0.002 if batch == 40 else 0.02)
    assert objective.exact(scores, targets).item() / 0.25 == pytest.approx(want)


def test_all_negatives_are_the_auc() -> None:
    batch = imbalanced(torch.Generator().manual_seed(0))
    partial, whole = OPAUC(12, max_fpr=1.0), PairwiseAUC()
    got, want = (o.exact(batch.scores, batch.targets) for o in (partial, whole))
    torch.testing.assert_close(got, want)
    start = evaluate(partial, batch)  # nu = 0 is below every loss that has a slope
    torch.testing.assert_close(start.loss, want)
    torch.testing.assert_close(
        start.gradients["scores"], evaluate(whole, batch).gradients["scores"]
    )


def test_a_tail_that_is_no_whole_number_of_pairs_counts_the_edge_by_its_fraction() -> None:
    scores, targets = torch.tensor([0.0, 3.0, 2.0, 1.0], dtype=F64), torch.tensor([1, 0, 0, 0])
    # losses 4^2, 3^2 and 2^2; half of three pairs are the first and half of the second
    loss = OPAUC(4, max_fpr=0.5).exact(scores, targets)
    assert loss.item() == pytest.approx((16 + 9 / 2) / 3)


def test_evaluation_is_the_exact_value_of_the_rows() -> None:
    batch = imbalanced(torch.Generator().manual_seed(0))
    objective = OPAUC(12, surrogate=Logistic()).eval()
    got = evaluate(objective, batch).loss
    assert torch.equal(got, objective.exact(batch.scores, batch.targets))


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_of_negatives_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=rf"max_fpr must be in \(0, 1\], got {share}"):
        OPAUC(3, max_fpr=share)
