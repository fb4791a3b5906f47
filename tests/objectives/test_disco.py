"""DisCO (section 6.6.3)."""

import math
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from llm_xrisk.objectives import DisCO, Objective
from llm_xrisk.objectives.scores import k1, k3
from llm_xrisk.objectives.surrogates import SquaredHinge
from tests.contract import Batch, ObjectiveContract, evaluate
from tests.reference import disco as reference

F64 = torch.float64


class TestDisCO(ObjectiveContract):
    """L_2 with log-L scores and the KL trust region."""

    objective_class: ClassVar[type[Objective]] = DisCO
    options: ClassVar[dict[str, Any]] = {"tau": 0.5, "delta": 0.01, "kl_penalty": 3.0}

    def make_batch(self, generator: torch.Generator) -> Batch:
        """Four questions, two of them mixed; answers of unequal number and length, shuffled."""
        group = torch.tensor([7, 7, 7, 7, 2, 2, 2, 5, 5, 9, 9, 9])
        targets = torch.tensor([1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0])
        scores = torch.randn(12, generator=generator, dtype=F64)
        kl = torch.rand(12, generator=generator, dtype=F64)
        length = torch.randint(1, 9, (12,), generator=generator)
        groups = {"group": group, "kl": kl, "length": length}
        order = torch.randperm(12, generator=generator)
        return Batch(scores, targets, groups, leaves=("scores", "kl")).rows(order)

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        options = self.reference_options()
        loss, gradient = reference.discriminative(
            batch.scores.tolist(), batch.targets.tolist(), batch.groups["group"].tolist(), **options
        )
        penalty, kl_gradient = reference.penalty(
            batch.groups["kl"].tolist(), batch.groups["length"].tolist(), delta=0.01, beta=3.0
        )
        return loss + penalty, {"scores": gradient, "kl": kl_gradient}

    def reference_options(self) -> dict[str, Any]:
        return {"tau": self.options["tau"]}

    def degenerate(self, batch: Batch) -> list[Batch]:
        alone = replace(batch, groups=batch.groups | {"group": torch.arange(12)})
        return [*super().degenerate(batch), alone]

    def test_worked_example(self) -> None:
        batch = Batch(
            torch.tensor([-1.0, -2.0, -4.0, -9.0]),
            torch.tensor([1.0, 0.0, 0.0, 1.0]),
            {
                "group": torch.tensor([5, 5, 5, 6]),  # question 6 has no wrong answer
                "kl": torch.tensor([0.4, 0.0, 0.2, 0.2]),
                "length": torch.tensor([2, 1, 3, 4]),
            },
            leaves=("scores", "kl"),
        )
        result = evaluate(DisCO(tau=2.0, delta=0.03, kl_penalty=10.0), batch)
        weights = [math.exp((-2 + 1) / 2), math.exp((-4 + 1) / 2)]
        kl = (0.4 + 0.0 + 0.2 + 0.2) / (2 + 1 + 3 + 4)
        loss = 2 * math.log(sum(weights) / 2) + 10 * (kl - 0.03) ** 2
        assert result.loss.item() == pytest.approx(loss, rel=1e-6)
        shares = [w / sum(weights) for w in weights]
        assert result.gradients["scores"].tolist() == pytest.approx([-1.0, *shares, 0.0], rel=1e-6)
        assert result.gradients["kl"].tolist() == pytest.approx([2 * 10 * 0.05 / 10] * 4, rel=1e-5)


class TestDisCOWithoutTemperature(TestDisCO):
    """L_1 with the squared hinge, averaged over all questions."""

    options: ClassVar[dict[str, Any]] = {
        "tau": None,
        "delta": 0.01,
        "kl_penalty": 3.0,
        "score": "likelihood_ratio",
        "surrogate": SquaredHinge(margin=0.5),
        "normalizer": "all",
    }

    def reference_options(self) -> dict[str, Any]:
        return {
            "tau": None,
            "surrogate": lambda s: max(s + 0.5, 0.0) ** 2,
            "slope": lambda s: 2 * max(s + 0.5, 0.0),
            "normalizer": "all",
        }

    def test_worked_example(self) -> None:
        batch = Batch(
            torch.tensor([1.0, 0.8, -2.0, 0.3]),
            torch.tensor([1.0, 0.0, 0.0, 0.0]),
            {"group": torch.tensor([0, 0, 0, 1])},  # question 1 has no right answer
        )
        result = evaluate(self.build(), batch)
        # margin 0.5: losses (0.8 - 1 + 0.5)^2 and 0, their mean over two questions
        assert result.loss.item() == pytest.approx((0.3**2 + 0) / 2 / 2)
        push = 2 * 0.3 / 2 / 2
        assert result.gradients["scores"].tolist() == pytest.approx([-push, push, 0.0, 0.0])


def question(right: list[float], wrong: list[float], dtype: torch.dtype = F64) -> Batch:
    rows = len(right) + len(wrong)
    return Batch(
        torch.tensor([*right, *wrong], dtype=dtype),
        torch.tensor([1.0] * len(right) + [0.0] * len(wrong)),
        {"group": torch.zeros(rows, dtype=torch.long)},
    )


def bernoulli_rows(theta: torch.Tensor, old_theta: float, score: str) -> dict[str, torch.Tensor]:
    """One-token answers 1 (right) and 0 (wrong) of a policy over two tokens with logit theta."""
    objective = DisCO(score=score, tau=None)
    logits = torch.stack([torch.zeros_like(theta), theta])
    log_probs = logits.log_softmax(0)[torch.tensor([1, 0])][:, None]
    old_logits = torch.tensor([0.0, old_theta], dtype=F64)
    old = old_logits.log_softmax(0)[torch.tensor([1, 0])][:, None]
    mask = torch.ones(2, 1, dtype=torch.bool)
    return objective.row_scores(log_probs, mask, old, torch.tensor([1.0, 0.0]))


PAIR = {"group": torch.zeros(2, dtype=torch.long)}
REWARDS = torch.tensor([1.0, 0.0])


@pytest.mark.parametrize("start", [-3.0, 0.0, 1.7])
def test_l1_log_likelihood_gradient_is_minus_one_for_any_logit(start: float) -> None:
    theta = torch.tensor(start, dtype=F64, requires_grad=True)
    scores = bernoulli_rows(theta, 0.0, "log_likelihood")["scores"]
    DisCO(tau=None)(scores, REWARDS, **PAIR).loss.backward()
    assert theta.grad.item() == pytest.approx(-1.0, abs=1e-14)


@pytest.mark.parametrize("start", [-3.0, 0.0, 1.7])
def test_l1_likelihood_ratio_gradient_is_minus_one_at_the_old_policy(start: float) -> None:
    theta = torch.tensor(start, dtype=F64, requires_grad=True)
    scores = bernoulli_rows(theta, start, "likelihood_ratio")["scores"]
    DisCO(score="likelihood_ratio", tau=None)(scores, REWARDS, **PAIR).loss.backward()
    assert theta.grad.item() == pytest.approx(-1.0, abs=1e-14)


def test_penalty_gradient_is_twice_beta_times_the_excess_times_the_gradient_of_the_kl() -> None:
    theta = torch.tensor(0.9, dtype=F64, requires_grad=True)
    p, p_old, beta, delta = 1 / (1 + math.exp(-0.9)), 1 / (1 + math.exp(-0.2)), 7.0, 1e-3
    log_p = torch.stack([torch.zeros_like(theta), theta]).log_softmax(0)
    old = torch.tensor([1 - p_old, p_old], dtype=F64)
    kl = (old * (old.log() - log_p)).sum()  # exact, as one token
    objective = DisCO(tau=None, delta=delta, kl_penalty=beta)
    scores = torch.zeros(2, dtype=F64, requires_grad=True)
    length = torch.tensor([1, 1])
    rows = torch.stack([kl, kl])
    objective(scores, REWARDS, **PAIR, kl=rows, length=length).loss.backward()
    expected = 2 * beta * (kl.item() - delta) * (p - p_old)  # dKL / dtheta = p - p_old
    assert theta.grad.item() == pytest.approx(expected, rel=1e-12)


def test_the_default_penalty_has_the_gradient_of_the_authors_beta_of_1000() -> None:
    kl = torch.tensor([0.5, 0.1], dtype=F64, requires_grad=True)
    length = torch.tensor([3, 2])
    objective = DisCO(tau=None)  # kl_penalty=500
    objective(torch.zeros(2, dtype=F64), REWARDS, **PAIR, kl=kl, length=length).loss.backward()
    authors = 1e3 * (0.6 / 5 - 1e-4) / 5  # beta [KL - delta]_+ grad KL
    assert kl.grad.tolist() == pytest.approx([authors, authors], rel=1e-12)


def test_l2_is_minus_the_right_scores_plus_a_log_mean_exp_of_the_wrong() -> None:
    right, wrong, tau = [0.3, -0.4], [0.2, -1.0, 0.9], 0.7
    batch = question(right, wrong)
    result = evaluate(DisCO(tau=tau), batch)
    weights = torch.tensor(wrong, dtype=F64) / tau
    value = -sum(right) / 2 + tau * (weights.logsumexp(0).item() - math.log(3))
    assert result.loss.item() == pytest.approx(value, rel=1e-12)
    expected = [-0.5, -0.5, *weights.softmax(0).tolist()]
    assert result.gradients["scores"].tolist() == pytest.approx(expected, rel=1e-12)


def test_l2_is_at_least_l1_and_tends_to_it() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        scores = torch.randn(6, generator=generator, dtype=F64).tolist()
        batch = question(scores[:2], scores[2:])
        l1 = evaluate(DisCO(tau=None), batch).loss
        for tau in (0.1, 1.0, 10.0):
            assert evaluate(DisCO(tau=tau), batch).loss > l1
        torch.testing.assert_close(evaluate(DisCO(tau=1e7), batch).loss, l1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tau", [0.01, 1.0, 100.0])
def test_with_one_wrong_answer_l2_is_l1(tau: float) -> None:
    batch = question([0.3, 0.1], [-0.2])
    l1, l2 = evaluate(DisCO(tau=None), batch), evaluate(DisCO(tau=tau), batch)
    torch.testing.assert_close(l2.loss, l1.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        l2.gradients["scores"], l1.gradients["scores"], rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("tau", [None, 0.5])
def test_a_questions_gradient_does_not_depend_on_how_many_answers_are_right(
    tau: float | None,
) -> None:
    for right in range(1, 8):
        batch = question([0.4] * right, [-0.1] * (8 - right))
        gradient = evaluate(DisCO(tau=tau), batch).gradients["scores"]
        # the score vectors' gradients are shared, so what counts is the sum over each side
        assert gradient[:right].sum().item() == pytest.approx(-1.0, abs=1e-14)
        assert gradient[right:].sum().item() == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("normalizer", ["all", "valid"])
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_questions_without_a_signal_count_in_the_kl_alone(normalizer: str, reward: float) -> None:
    mixed = question([0.3], [-0.2, 0.8])
    scores = torch.cat([mixed.scores, torch.tensor([5.0, -7.0], dtype=F64)])
    batch = Batch(
        scores,
        torch.cat([mixed.targets, torch.full((2,), reward)]),
        {
            "group": torch.tensor([0, 0, 0, 1, 1]),
            "kl": torch.tensor([0.1, 0.2, 0.0, 0.4, 0.3], dtype=F64),
            "length": torch.tensor([1, 2, 1, 3, 3]),
        },
        leaves=("scores", "kl"),
    )
    objective = DisCO(tau=1.0, normalizer=normalizer, delta=0.05, kl_penalty=2.0)
    result, alone = evaluate(objective, batch), evaluate(DisCO(tau=1.0), mixed)
    share = 1.0 if normalizer == "valid" else 0.5
    assert result.gradients["scores"][3:].tolist() == [0.0, 0.0]
    want = alone.gradients["scores"] * share
    torch.testing.assert_close(result.gradients["scores"][:3], want, rtol=1e-12, atol=0)
    assert result.gradients["kl"].tolist() == pytest.approx([2 * 2 * (0.1 - 0.05) / 10] * 5)
    assert result.metrics["groups/valid_fraction"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("normalizer", ["all", "valid"])
def test_a_batch_without_a_valid_question_takes_a_step_without_nan(normalizer: str) -> None:
    weight = torch.nn.Parameter(torch.ones((), dtype=F64))
    optimizer = torch.optim.AdamW([weight])
    batch = question([0.3, 0.4], [])
    loss = DisCO(normalizer=normalizer)(weight * batch.scores, batch.targets, **batch.groups).loss
    loss.backward()
    optimizer.step()
    assert loss.item() == 0.0
    assert weight.isfinite()


OLD_POLICY = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=F64)


def kl_terms(new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The k1 and k3 terms of each of the four answers of one token."""
    mask = torch.ones(4, 1, dtype=torch.bool)
    rows = new.log()[:, None], mask, OLD_POLICY.log()[:, None]
    return k1(*rows), k3(*rows)


def test_k1_and_k3_are_unbiased_for_the_kl_of_the_old_policy_to_the_new() -> None:
    new = torch.tensor([0.4, 0.35, 0.1, 0.15], dtype=F64)
    kl = (OLD_POLICY * (OLD_POLICY / new).log()).sum()
    for terms in kl_terms(new):
        assert (OLD_POLICY * terms).sum().item() == pytest.approx(kl.item(), rel=1e-12)
    # and as the estimate of a sample, within three standard errors
    draws = torch.multinomial(OLD_POLICY, 20_000, replacement=True)
    for terms in kl_terms(new):
        sample = terms[draws]
        assert abs(sample.mean() - kl) < 3 * sample.std() / math.sqrt(20_000)
    assert (kl_terms(new)[1] >= 0).all()


def test_k3_has_a_hundredth_of_the_variance_of_k1_near_the_old_policy() -> None:
    tilt = torch.tensor([0.01, -0.02, 0.015, -0.01], dtype=F64)
    first, third = kl_terms((OLD_POLICY.log() + tilt).softmax(0))
    variance = [(OLD_POLICY * t**2).sum() - (OLD_POLICY * t).sum() ** 2 for t in (first, third)]
    assert variance[1] < 1e-2 * variance[0]


def test_the_multiplier_uses_the_kl_of_the_whole_minibatch() -> None:
    kl = torch.tensor([0.9, -0.3, 0.0, -0.2], dtype=F64)
    batch = replace(
        question([0.1, 0.2], [0.3, 0.4]),
        groups={
            "group": torch.tensor([0, 1, 0, 1]),
            "kl": kl,
            "length": torch.tensor([1, 1, 1, 1]),
        },
    )
    whole = evaluate(DisCO(delta=0.2, kl_penalty=1.0), batch).metrics["kl/multiplier"]
    half = evaluate(DisCO(delta=0.2, kl_penalty=1.0), batch.rows(slice(0, 2))).metrics
    assert whole == 0.0  # the mean, 0.1, is inside the region
    assert half["kl/multiplier"].item() == pytest.approx(2 * (0.3 - 0.2))


def train_bandit(penalty: float, delta: float, steps: int = 200) -> tuple[torch.Tensor, float]:
    """Logits of a 4-armed bandit after descent on DisCO, and the largest exact KL met.

    Arm 0 is right. Every rollout holds each arm once; the old policy is the first one.
    """
    logits = torch.zeros(4, dtype=F64, requires_grad=True)
    old = torch.full((4, 1), 0.25, dtype=F64).log()
    rewards, mask = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.ones(4, 1, dtype=torch.bool)
    objective = DisCO(tau=None, delta=delta, kl_penalty=penalty)
    optimizer = torch.optim.SGD([logits], lr=0.05)
    worst = 0.0
    for _ in range(steps):
        rows = objective.row_scores(logits.log_softmax(0)[:, None], mask, old, rewards)
        groups = {"group": torch.zeros(4, dtype=torch.long), "length": torch.ones(4)}
        optimizer.zero_grad()
        objective(rows["scores"], rewards, kl=rows["kl"], **groups).loss.backward()
        optimizer.step()
        worst = float((old[:, 0].exp() * (old[:, 0] - logits.detach().log_softmax(0))).sum())
    return logits.detach(), worst


def test_an_inactive_hinge_leaves_the_trajectory_bit_identical() -> None:
    free, _ = train_bandit(penalty=0.0, delta=1e6)
    guarded, _ = train_bandit(penalty=500.0, delta=1e6)
    assert torch.equal(free, guarded)


def test_an_active_hinge_keeps_the_kl_below_twice_delta() -> None:
    _, kl = train_bandit(penalty=500.0, delta=0.05)
    assert 0.05 < kl < 0.1


def test_without_the_hinge_log_likelihood_runs_away() -> None:
    _, early = train_bandit(penalty=0.0, delta=0.05, steps=100)
    _, late = train_bandit(penalty=0.0, delta=0.05, steps=400)
    assert late > 10 > early > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"score": "sum"},
            r"score must be one of \['likelihood_ratio', 'log_likelihood'\], got 'sum'",
        ),
        ({"tau": -1.0}, r"tau must be positive, or None for L_1, got -1.0"),
        ({"delta": -1e-4}, r"need delta >= 0 and kl_penalty >= 0, got -0.0001 and 500.0"),
        ({"kl_estimator": "k2"}, r"kl_estimator must be .k1. or .k3., got .k2."),
        ({"normalizer": "batch"}, r'normalizer must be "valid" or "all", got \'batch\''),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DisCO(**options)


def test_rewards_other_than_zero_and_one_are_refused_and_thresholding_helps() -> None:
    rewards = torch.tensor([0.9, 0.5, 0.1])
    with pytest.raises(ValueError, match=r"DisCO needs targets 0 or 1 .*got \[0.1.*threshold"):
        DisCO().check(targets=rewards)
    group = torch.zeros(3, dtype=torch.long)
    scores = torch.tensor([0.2, -0.1, 0.4])
    binary = (rewards >= 0.5).float()
    DisCO().check(targets=binary)
    want = DisCO()(scores, torch.tensor([1.0, 1.0, 0.0]), group=group).loss
    assert torch.equal(DisCO()(scores, binary, group=group).loss, want)


@pytest.mark.parametrize(("used", "other"), [("k1", "k3"), ("k3", "k1")])
def test_both_kl_estimators_are_logged_and_one_is_optimised(used: str, other: str) -> None:
    objective = DisCO(kl_estimator=used, delta=0.0)
    old, mask = torch.tensor([[-1.0, -2.0], [-1.5, -0.5]]), torch.ones(2, 2, dtype=torch.bool)
    log_r = torch.tensor([[0.2, -0.1], [0.3, 0.0]])
    rewards, group = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
    rows = objective.row_scores(old + log_r, mask, old, rewards)
    found = objective(targets=rewards, group=group, length=mask.sum(-1), **rows)
    means = {"k1": -log_r.mean(), "k3": (torch.expm1(log_r) - log_r).mean()}
    for name, mean in means.items():
        torch.testing.assert_close(found.metrics[f"kl/{name}"], mean)
    without = objective(
        targets=rewards, group=group, length=mask.sum(-1), kl=rows["kl"], scores=rows["scores"]
    )
    assert found.loss == without.loss and f"kl/{other}" not in without.metrics
