"""TPAUC (STACO, Algorithm 31)."""

from typing import Any, ClassVar

import pytest
import torch

from llm_xrisk.objectives import Objective
from llm_xrisk.objectives.opauc import OPAUC
from llm_xrisk.objectives.tpauc import TPAUC
from tests.contract import Batch, ObjectiveContract, evaluate
from tests.objectives.several_labels import each_label, three_labels
from tests.objectives.test_average_precision import imbalanced
from tests.objectives.test_opauc import frozen, largest_losses
from tests.reference import tpauc as reference

F64 = torch.float64
SETTINGS = {"min_tpr": 0.5, "max_fpr": 0.4, "nu_lr": 0.15, "y_lr": 0.3}


class TestTPAUC(ObjectiveContract):
    objective_class: ClassVar[type[Objective]] = TPAUC
    options: ClassVar[dict[str, Any]] = SETTINGS
    has_duals: ClassVar[bool] = True
    compile_backend: ClassVar[str] = "inductor"  # which would read the duals after their step

    def make_batch(self, generator: torch.Generator) -> Batch:
        return imbalanced(generator)

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        reference.start(list(range(12)), u)
        index = batch.groups["index"].tolist()
        rows = (batch.scores.tolist(), batch.targets.bool().tolist(), index)
        loss, gradient = reference.step(*rows, u, **SETTINGS)
        return loss, {"scores": gradient}

    def tracked(self, objective: Objective) -> dict[int, Any]:
        own = torch.stack([objective.y.value, objective.nu.value], -1).tolist()
        shared = objective.nu_prime.value.tolist()
        duals = {key: tuple(value) for key, value in enumerate(own)}
        return duals | {label - len(shared): (value,) for label, value in enumerate(shared)}

    def test_worked_example(self) -> None:
        batch = Batch(
            torch.tensor([1.0, 0.5, 0.0]), torch.tensor([1, 0, 1]), {"index": torch.arange(3)}
        )
        objective = TPAUC(num_samples=3, min_tpr=0.5, max_fpr=0.5, nu_lr=0.2, y_lr=1.0)
        objective.nu_prime.value.fill_(2.0)
        # losses 0.5^2 and 1.5^2; g = 0.25 + 0.5 (0 - 2) and 2.25 + 0.5 (0 - 2)
        result = evaluate(objective, batch)
        y = [1 + 0.25 - 1, 1]  # the second is clipped
        saddle = (y[0] * (0.25 - 1) + y[1] * (2.25 - 1)) / 2 + 0.5 * 0.5 * 2
        assert result.loss.item() == pytest.approx(saddle)
        slope = [y[0] * 2 * 0.5 / 2, y[1] * 2 * 1.5 / 2]
        want = [-slope[0], slope[0] + slope[1], -slope[1]]
        assert result.gradients["scores"].tolist() == pytest.approx(want)
        assert objective.y.value.tolist() == pytest.approx([y[0], 1, y[1]])
        # every loss exceeds nu = 0
        nu = [-0.2 * y[0] * (0.5 - 1), 0, -0.2 * y[1] * (0.5 - 1)]
        assert objective.nu.value.tolist() == pytest.approx(nu)
        nu_prime = 2 - 0.2 * (0.5 * 0.5 - 0.5 * (y[0] + y[1]) / 2)
        assert objective.nu_prime.value.item() == pytest.approx(nu_prime)

    def test_gamma_one_is_the_minibatch_loss(self) -> None:
        """There is no gamma; the duals' best values give the mini-batch's exact value."""
        for batch in self.batches(2):
            objective, leaf = self.build(num_samples=9), batch.copy()
            want = objective.exact(leaf.scores, leaf.targets)
            (gradient,) = torch.autograd.grad(want, leaf.scores)
            order = batch.scores[batch.targets == 0].sort(descending=True).values
            nu = (1 + (order[1] + order[2]) / 2 - batch.scores).relu().square()  # k_2 = 2 of 5
            lowest = batch.scores[batch.targets == 1].sort().values
            tail = (1 + order[:2][None] - lowest[:, None]).relu().square().mean(1)
            objective.nu.value.copy_(nu)
            objective.nu_prime.value.fill_((tail[1] + tail[2]) / 2)  # k_1 = 2 of 4
            objective.y.value.copy_(batch.scores <= lowest[1])
            objective.y.lr = 1e-12  # where they are best no step moves them beyond [0, 1]
            own = Batch(batch.scores, batch.targets, {"index": torch.arange(9)})
            result = evaluate(objective, own)
            torch.testing.assert_close(result.loss, want.detach(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(result.gradients["scores"], gradient, rtol=1e-10, atol=1e-12)
            assert torch.equal(objective.y.value[batch.targets == 1].sort().values[:2], y_of(0))
            assert torch.equal(objective.y.value[batch.targets == 1].sort().values[2:], y_of(1))


def y_of(value: float) -> torch.Tensor:
    return torch.full((2,), value, dtype=F64)


class TestTPAUCOfSeveralLabels(TestTPAUC):
    options: ClassVar[dict[str, Any]] = SETTINGS | {"num_labels": 3}
    compile_backend: ClassVar[str] = "aot_eager"

    def make_batch(self, generator: torch.Generator) -> Batch:
        return three_labels(generator)

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        for key in range(36):
            u.setdefault(key, (1.0, 0.0))
        for label in range(3):
            u.setdefault(label - 3, (0.0,))  # sample -1 of each label
        index = batch.groups["index"].tolist()

        def one(label: int, scores: list[float], positive: list[bool], own: dict[int, Any]) -> Any:
            return reference.step(scores, positive, index, own, **SETTINGS)

        return each_label(batch, u, one, lambda column: any(column) and not all(column))

    def test_worked_example(self) -> None:
        scores = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 0.5]])
        batch = Batch(scores, torch.tensor([[1, 0], [0, 0], [1, 1]]), {"index": torch.arange(3)})
        objective = TPAUC(num_samples=3, min_tpr=0.5, max_fpr=0.5, num_labels=2)
        # duals at their start: losses 0.5^2 and 1.5^2 of the first label, twice 0.5^2 of the second
        result = evaluate(objective, batch)
        assert result.loss.item() == pytest.approx(((0.25 + 2.25) / 2 + 0.25) / 2)
        # each label moves its own nu' against (1/2) (1/2) - (1/2) 1
        assert objective.nu_prime.value.tolist() == pytest.approx([0.1 * 0.25] * 2)

    def test_gamma_one_is_the_minibatch_loss(self) -> None:
        """Each label's exact value is that of the label by itself."""
        for batch in self.batches(2):
            whole, single = self.build(), TPAUC(12, min_tpr=0.5, max_fpr=0.4)
            own = [
                single.exact(batch.scores[:, k], batch.targets[:, k])
                for k in range(3)
                if 0 < batch.targets[:, k].sum() < 9
            ]
            got = whole.exact(batch.scores, batch.targets)
            torch.testing.assert_close(got, torch.stack(own).mean(), rtol=1e-12, atol=1e-12)


def test_on_frozen_scores_the_duals_find_the_corner_of_positives_and_negatives() -> None:
    scores, targets = frozen(20, 60)
    objective = TPAUC(60, min_tpr=0.5, max_fpr=0.25, nu_lr=0.2, y_lr=0.5, state_dtype=F64)
    total = 0.0
    for step in range(2400):
        objective.nu.lr = objective.nu_prime.lr = 0.2 if step < 800 else 0.02
        loss = objective(scores, targets, index=torch.arange(60)).loss
        total += loss.item() / 1000 * (step >= 1400)
    want = reference.mean_of_corner(scores.tolist(), targets.bool().tolist(), 0.5, 0.25)
    assert total / (0.5 * 0.25) == pytest.approx(want, rel=2e-3)
    assert objective.exact(scores, targets).item() / (0.5 * 0.25) == pytest.approx(want)
    # y is the indicator of the 10 lowest of 20 positives
    lowest = scores[:20].argsort()
    assert objective.y.value[lowest[:9]].tolist() == [1.0] * 9
    assert objective.y.value[lowest[11:]].tolist() == [0.0] * 9
    # nu of these lies between the 10th and the 11th of 40 losses; nu' between tails 10 and 11
    ordered = largest_losses(scores, 20)[lowest]
    nu = objective.nu.value[lowest[:9]]
    assert ((nu <= ordered[:9, 9] + 0.02) & (nu >= ordered[:9, 10] - 0.02)).all()
    tail = ordered[:, :10].mean(1)
    assert tail[10] - 0.02 <= objective.nu_prime.value.item() <= tail[9] + 0.02


def test_the_printed_sign_of_line_six_would_end_all_learning() -> None:
    scores, targets = frozen(20, 60)
    objective = TPAUC(60, min_tpr=0.5, max_fpr=0.25, state_dtype=F64)
    for _ in range(50):
        objective(scores, targets, index=torch.arange(60))
    assert objective.y.value[:20].mean() > 0.9  # nu' is below every loss: all positives count


def test_all_positives_are_the_one_way_partial_auc() -> None:
    batch = imbalanced(torch.Generator().manual_seed(0))
    two, one = TPAUC(12, min_tpr=0.0, max_fpr=0.4), OPAUC(12, max_fpr=0.4)
    got, want = (o.exact(batch.scores, batch.targets) for o in (two, one))
    torch.testing.assert_close(got, want)
    assert torch.equal(evaluate(two, batch).loss, evaluate(one, batch).loss)  # y is 1, nu is 0


def test_evaluation_is_the_exact_value_of_the_rows() -> None:
    batch = imbalanced(torch.Generator().manual_seed(0))
    objective = TPAUC(12).eval()
    got = evaluate(objective, batch).loss
    assert torch.equal(got, objective.exact(batch.scores, batch.targets))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_tpr": 1.0}, r"1 - min_tpr must be in \(0, 1\], got 0.0; it is the share of pos"),
        ({"max_fpr": 0.0}, r"max_fpr must be in \(0, 1\], got 0.0; it is the share of neg"),
        ({"y_lr": 0.0}, "need lr > 0"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TPAUC(3, **options)
