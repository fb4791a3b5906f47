"""AUCMargin (PDMA and PDAdam, Algorithm 27)."""

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from llm_xrisk.fcco.schedules import cosine
from llm_xrisk.objectives import Objective
from llm_xrisk.objectives.auc_margin import AUCMargin
from llm_xrisk.objectives.surrogates import Squared, SquaredHinge
from tests.contract import Batch, ObjectiveContract, evaluate, exact_loss
from tests.reference import auc_margin as reference

F64 = torch.float64
SURROGATES = [SquaredHinge(), Squared(), SquaredHinge(margin=0.3)]


class TestAUCMargin(ObjectiveContract):
    objective_class: ClassVar[type[Objective]] = AUCMargin
    num_labels: ClassVar[int | None] = None
    hinge: ClassVar[bool] = True
    compile_backend: ClassVar[str] = "inductor"  # which would read alpha after its step

    def make_batch(self, generator: torch.Generator) -> Batch:
        shape = (9,) if self.num_labels is None else (9, self.num_labels)
        ranks = torch.rand(shape, generator=generator).argsort(0)
        return Batch(torch.randn(shape, generator=generator, dtype=F64), (ranks < 3).long())

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        rows = len(batch.targets)
        columns = zip(
            batch.scores.reshape(rows, -1).T.tolist(),
            batch.targets.bool().reshape(rows, -1).T.tolist(),
            strict=True,
        )
        results = [
            reference.step(scores, positive, u, gamma=gamma, label=label, hinge=self.hinge)
            for label, (scores, positive) in enumerate(columns)
        ]
        gradient = torch.tensor([result[1] for result in results], dtype=F64).T / len(results)
        loss = sum(result[0] for result in results) / len(results)
        return loss, {"scores": gradient.reshape(batch.scores.shape).tolist()}

    def tracked(self, objective: Objective) -> dict[int, Any]:
        held = torch.stack([objective.a, objective.b, objective.alpha], dim=-1).tolist()
        started = objective.started.nonzero().flatten().tolist()
        return {label: tuple(held[label]) for label in started}

    def test_worked_example(self) -> None:
        batch = Batch(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([1, 0, 0]))
        objective = AUCMargin(gamma=0.25, initial=(0.5, 0.0, 2.0))
        result = evaluate(objective, batch)
        # (1 - a)^2 + ((0.5 - b)^2 + (0 - b)^2) / 2 + alpha (1 + 0.25 - 1) - alpha^2 / 4
        assert result.loss.item() == pytest.approx(0.25 + 0.125 + 2 * 0.25 - 1)
        want = [2 * 0.5 - 2, (2 * 0.5 + 2) / 2, (2 * 0.0 + 2) / 2]
        assert result.gradients["scores"].tolist() == pytest.approx(want)
        # (1 - tau / 2) alpha + tau (m + 0.25 - 1) with tau = 2 gamma
        assert objective.alpha.item() == pytest.approx(0.75 * 2 + 0.5 * 0.25)
        # the variance of the negatives and [1 + 0.25 - 1]^2
        assert result.metrics["saddle"].item() == pytest.approx(0.25**2 + 0.25**2)

    # a and b move by steps of the optimizer: gamma = 1 does not make them those of the batch

    def test_gamma_one_is_the_minibatch_loss(self) -> None:
        for batch in self.batches(2):  # at its start each is at the saddle of its batch
            result = evaluate(self.build(gamma=1.0), batch)
            leaf = batch.copy()
            want = exact_loss(self.build(), leaf)
            (gradient,) = torch.autograd.grad(want, leaf.scores)
            torch.testing.assert_close(result.loss, want.detach(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(result.gradients["scores"], gradient, rtol=1e-10, atol=1e-12)

    def test_with_frozen_scores_the_state_approaches_the_inner_values(self) -> None:
        start, frozen = self.batches(2)
        objective = self.build()
        evaluate(objective, start)
        optimizer = torch.optim.SGD(objective.parameters(), lr=0.1 * (self.num_labels or 1))
        for _ in range(120):
            optimizer.zero_grad()
            loss = objective(frozen.scores, frozen.targets).loss
            loss.backward()
            optimizer.step()
        assert loss.item() == pytest.approx(exact_loss(objective, frozen).item(), abs=1e-10)

    def test_a_checkpoint_of_another_dataset_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match="size mismatch for a"):
            self.build(num_labels=5).load_state_dict(self.build().state_dict())


class TestAUCMarginWithTheSquare(TestAUCMargin):
    options: ClassVar[dict[str, Any]] = {"surrogate": Squared()}
    hinge: ClassVar[bool] = False

    def test_worked_example(self) -> None:
        batch = Batch(torch.tensor([3.0, 0.5, 0.0]), torch.tensor([1, 0, 0]))
        objective = AUCMargin(gamma=0.25, surrogate=Squared(), initial=(0.5, 0.0, -1.0))
        result = evaluate(objective, batch)
        # (3 - a)^2 + ((0.5 - b)^2 + (0 - b)^2) / 2 + alpha (1 + 0.25 - 3) - alpha^2 / 4
        assert result.loss.item() == pytest.approx(6.25 + 0.125 + 1.75 - 0.25)
        # alpha is free: 0.75 alpha + 0.5 (1 + 0.25 - 3), where the hinge would stop at 0
        assert objective.alpha.item() == pytest.approx(-0.75 - 0.875)


class TestAUCMarginOfSeveralLabels(TestAUCMargin):
    options: ClassVar[dict[str, Any]] = {"num_labels": 3}
    num_labels: ClassVar[int | None] = 3

    def test_worked_example(self) -> None:
        scores = torch.tensor([[1.0, 1.0], [0.5, 0.5], [0.0, 0.0]])
        batch = Batch(scores, torch.tensor([[1, 0], [0, 0], [0, 0]]))
        objective = AUCMargin(gamma=0.25, num_labels=2, initial=(0.5, 0.0, 2.0))
        result = evaluate(objective, batch)
        # the first label is the example of one label, the second has no positive and is left out
        assert result.loss.item() == pytest.approx(0.25 + 0.125 + 2 * 0.25 - 1)
        assert not result.gradients["scores"][:, 1].any()
        assert objective.alpha.tolist() == pytest.approx([0.75 * 2 + 0.5 * 0.25, 2.0])


def mixed(positives: int, rows: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator)
    return torch.randn(rows, generator=generator), (torch.arange(rows) < positives)[order].long()


def equation(h: Tensor, y: Tensor, a: Tensor, b: Tensor, alpha: Tensor, margin: float) -> Tensor:
    """(6.21) as it is printed."""
    pos, neg = h[y == 1], h[y == 0]
    means = ((pos - a) ** 2).mean() + ((neg - b) ** 2).mean()
    return means + alpha * (margin + neg.mean() - pos.mean()) - alpha**2 / 4


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("positives", [16, 4, 28])
def test_every_gradient_is_that_of_the_equation_for_any_mix_of_classes(
    positives: int, surrogate: SquaredHinge | Squared
) -> None:
    h, y = mixed(positives)
    start = (0.7, -0.4, 1.9)
    objective = AUCMargin(gamma=0.05, surrogate=surrogate, initial=start)
    leaf = h.clone().requires_grad_()
    got = torch.autograd.grad(objective(leaf, y).loss, [leaf, objective.a, objective.b])
    parts = [torch.tensor(v, requires_grad=True) for v in start]
    printed = h.clone().requires_grad_()
    value = equation(printed, y, *parts, surrogate.margin)
    want = torch.autograd.grad(value, [printed, *parts])
    for mine, theirs in zip(got, want[:3], strict=True):
        torch.testing.assert_close(mine.squeeze(), theirs, rtol=1e-6, atol=1e-6)
    rise = (objective.alpha - 1.9).item() / (2 * 0.05)  # ascent with step tau = 2 gamma
    assert rise == pytest.approx(want[3].item(), abs=1e-5)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("positives", [16, 4])
def test_on_fixed_scores_any_optimizer_reaches_the_saddle(
    positives: int, kind: str, surrogate: SquaredHinge | Squared
) -> None:
    h, y = mixed(positives)
    objective = AUCMargin(gamma=0.1, surrogate=surrogate, initial=(0.0, 0.0, 0.0), state_dtype=F64)
    optimizer = (
        torch.optim.SGD(objective.parameters(), lr=0.1, momentum=0.5)
        if kind == "SGD"
        else torch.optim.AdamW(objective.parameters(), lr=0.05, weight_decay=0.0)
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.985)
    for _ in range(500):
        optimizer.zero_grad()
        objective(h.to(F64), y).loss.backward()
        optimizer.step()
        schedule.step()
    pos, neg = h[y == 1].tolist(), h[y == 0].tolist()
    hinge = isinstance(surrogate, SquaredHinge)
    want = reference.closed_form(pos, neg, surrogate.margin, hinge=hinge)
    got = (objective.a.item(), objective.b.item(), objective.alpha.item())
    assert got == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("positives", [16, 4, 28])
def test_the_saddle_of_the_square_is_the_square_of_all_pairs(positives: int) -> None:
    h, y = mixed(positives)
    h = h.to(F64).requires_grad_()
    objective = AUCMargin(surrogate=Squared(margin=0.7), state_dtype=F64)
    pairs = (0.7 + h[y == 0][None, :] - h[y == 1][:, None]).square().mean()
    exact = objective.exact(h, y)
    at_saddle = objective(h, y).loss  # the first batch starts at its saddle
    wanted = torch.autograd.grad(pairs, h)[0]
    for value in (exact, at_saddle):
        assert value.item() == pytest.approx(pairs.item(), rel=1e-12)
        torch.testing.assert_close(torch.autograd.grad(value, h)[0], wanted)


def test_classes_a_margin_apart_are_not_pushed_on() -> None:
    scores = torch.tensor([3.0, 3.0, 0.0, 0.0], requires_grad=True)
    targets = torch.tensor([1, 1, 0, 0])
    hinge, square = AUCMargin(), AUCMargin(surrogate=Squared())
    assert torch.autograd.grad(hinge(scores, targets).loss, scores)[0].abs().max() == 0
    gradient = torch.autograd.grad(square(scores, targets).loss, scores)[0]
    assert gradient.tolist() == pytest.approx([2.0, 2.0, -2.0, -2.0])  # it pulls them together


@pytest.mark.parametrize("targets", [[1, 1, 1], [0, 0, 0]])
def test_parameters_get_a_gradient_of_zero_without_a_class(targets: list[int]) -> None:
    objective = AUCMargin(initial=(1.0, -1.0, 0.5))
    output = objective(torch.randn(3), torch.tensor(targets))
    output.loss.backward()
    assert objective.a.grad.item() == objective.b.grad.item() == 0
    assert (output.loss.item(), objective.alpha.item()) == (0.0, 0.5)
    assert output.metrics["skipped"] == 1
    assert output.metrics["difference"].isnan()


def test_a_label_without_a_class_leaves_the_others_as_they_are() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(8, 3, generator=generator)
    targets = torch.tensor([[1, 0, 1], [0, 0, 1]] * 4)
    targets[:3, 2] = 0
    objective = AUCMargin(num_labels=3)
    output = objective(scores, targets)
    alone = [AUCMargin()(scores[:, k], targets[:, k]).loss for k in (0, 2)]
    assert output.loss.item() == pytest.approx(torch.stack(alone).mean().item())
    assert output.metrics["skipped"].item() == pytest.approx(1 / 3)
    assert objective.started.tolist() == [True, False, True]
    objective(scores, 1 - targets).loss.backward()
    assert objective.a.grad[1] == 0 != objective.a.grad[0]


def test_several_labels_cost_one_pass_each_in_value_gradient_and_state() -> None:
    together = AUCMargin(num_labels=4)
    apart = [AUCMargin() for _ in range(4)]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(12, 4, generator=generator, requires_grad=True)
        targets = (torch.rand(12, 4, generator=generator) < 0.4).long()
        targets[0], targets[1] = 1, 0
        (got,) = torch.autograd.grad(together(scores, targets).loss, scores)
        losses = [o(scores[:, k], targets[:, k]).loss for k, o in enumerate(apart)]
        (want,) = torch.autograd.grad(torch.stack(losses).mean(), scores)
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(together.alpha, torch.cat([o.alpha for o in apart]))


def test_parameters_and_dual_stay_in_float32_and_keep_training() -> None:
    objective = AUCMargin()
    optimizer = torch.optim.SGD(objective.parameters(), lr=1e-4)
    objective.to(torch.bfloat16)
    assert {value.dtype for value in objective.parameters()} == {torch.float32}
    assert objective.alpha.dtype == torch.float32
    h, y = mixed(8)
    objective(h, y)
    before = objective.a.item()
    objective(h.bfloat16() + 1, y).loss.backward()
    optimizer.step()
    assert objective.a.item() == pytest.approx(before + 1e-4 * 2, abs=2e-6)


@pytest.mark.parametrize("kind", ["PDMA", "PDAdam"])
def test_training_raises_the_auc_of_a_toy(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 5, generator=generator)
    targets = (features[:, 0] + 0.5 * torch.randn(300, generator=generator) > 1.2).long()
    weights = torch.tensor([0.0, 0.1, 0.0, 0.0, 0.0], requires_grad=True)
    objective = AUCMargin()
    group = [weights, *objective.parameters()]
    optimizer = (
        torch.optim.SGD(group, lr=0.05, momentum=0.9)
        if kind == "PDMA"
        else torch.optim.Adam(group, lr=0.02)
    )

    def auc() -> float:
        with torch.no_grad():
            h = features @ weights
        return float((h[targets == 1][:, None] > h[targets == 0]).float().mean())

    before, first = auc(), objective.exact(features @ weights, targets).item()
    for _ in range(80):
        rows = torch.randperm(300, generator=generator)[:64]
        optimizer.zero_grad()
        objective(features[rows] @ weights, targets[rows]).loss.backward()
        optimizer.step()
    assert before < 0.6
    assert auc() > 0.93
    assert objective.exact(features @ weights, targets).item() < 0.6 * first


def test_gamma_follows_its_schedule() -> None:
    h, y = mixed(16)
    objective = AUCMargin(gamma=cosine(0.2, epochs=10), initial=(0.0, 0.0, 0.0))
    target = 2 * (1 + h[y == 0].mean() - h[y == 1].mean())
    objective.set_epoch(5)
    objective(h, y)
    assert objective.alpha.item() == pytest.approx(0.6 * target.item(), rel=1e-6)


def test_stats_hold_what_is_kept() -> None:
    objective = AUCMargin(initial=(1.0, -1.0, 0.5))
    assert objective.stats() == {"a": 1.0, "b": -1.0, "alpha": 0.5, "started": 1.0}
    assert math.isclose(AUCMargin(num_labels=2).stats()["started"], 0.0)


@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_a_gamma_outside_its_range_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match=rf"gamma must be in \(0, 1\], got {gamma}; Algorithm 27"):
        AUCMargin(gamma=gamma)


def test_no_label_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="num_labels must be at least 1, got 0"):
        AUCMargin(num_labels=0)


@pytest.mark.parametrize("shape", [(6, 1), (6, 2)])
def test_columns_without_num_labels_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"AUCMargin got scores \(6, .\).* needs"):
        AUCMargin()(torch.randn(shape), torch.randint(0, 2, shape))
