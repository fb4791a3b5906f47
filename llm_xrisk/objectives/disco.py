"""Discriminative constrained optimization (section 6.6.3)."""

import torch
from torch import Tensor

from llm_xrisk.fcco.groups import group_mean, group_sum, slots
from llm_xrisk.objectives.base import ObjectiveOutput
from llm_xrisk.objectives.log_means import effective_fraction, logmeanexp
from llm_xrisk.objectives.pairs import differences, rows_of, same_group, with_pair_gradient
from llm_xrisk.objectives.reductions import observed_mean
from llm_xrisk.objectives.scores import KL_TERMS, SCORES
from llm_xrisk.objectives.sequence import SequenceObjective, effective_in_group, kl_statistics
from llm_xrisk.objectives.surrogates import IDENTITY, Identity, Surrogate

_SCORE_NAMES = {"log_likelihood": "mean_log_likelihood", "likelihood_ratio": "likelihood_ratio"}


class DisCO(SequenceObjective):
    r"""DisCO, (6.83)-(6.85): raises right answers above wrong ones inside a KL trust region.

    .. math:: L_1 = E_x E_{y \sim \pi_{old}^+, y' \sim \pi_{old}^-}\,
              \ell(s(y', x) - s(y, x)) \qquad (6.81)
    .. math:: L_2 = E_x E_{y \sim \pi_{old}^+}\, \tau \log E_{y' \sim \pi_{old}^-}
              \exp\frac{\ell(s(y', x) - s(y, x))}{\tau} \qquad (6.82)
    .. math:: \min_w\; L(w) + \beta\, [KL(\pi_{old}, \pi_w) - \delta]_+^2 \qquad (6.85)

    Inner expectations are those of the group (fresh negatives, gamma = 1): there is no state.
    The KL is the mean over all completion tokens of the whole mini-batch, groups without signal
    included; every question with right and wrong answers weighs the same, however hard it is.

    Args:
        score: "log_likelihood" (log-L, mean over tokens) or "likelihood_ratio" (L-ratio).
        tau: Temperature of L_2; None is L_1. The authors use 10 for log-L and 1 for L-ratio, at
            which the weighting is all but uniform: watch ``negatives/effective_fraction``.
        delta: Radius of the trust region, mean KL per token; 1e-4 by the authors.
        kl_penalty: beta as (6.85) prints it. The gradient is 2 beta [KL - delta]_+ grad KL. The
            authors' code has half of that with beta = 1e3, so 500 here is their setting.
        kl_estimator: "k3" or "k1", both unbiased for KL(old || new); k1 is noise at delta = 1e-4.
        surrogate: l, non-decreasing; the authors use the identity.
        normalizer: "valid" averages over the questions with a signal, "all" over all of them.

    Shapes:
        scores, targets (R,), rewards 0 or 1; group (R,) one id per question and rollout; kl
        (R,) sum over tokens and length (R,) from :meth:`row_scores` and the mask, or None;
        kl_check (R,) the other estimator's, logged beside it.

    State: none.

    Departures: the authors hinge a k1 estimate of each micro-batch, divide by all questions and
    report a value that is not the objective.

    Raises:
        ValueError: tau or delta out of range, unknown score or estimator.

    Example:
        >>> objective = DisCO(tau=None)
        >>> scores, rewards = torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([1.0, 0.0, 0.0])
        >>> objective(scores, rewards, group=torch.tensor([5, 5, 5])).loss
        tensor(-2.)

    Relations: L_2 is SOPA-s on the answers to one question; L_2 >= L_1 (Jensen) and tends to it
    as tau grows; with l the identity L_1 is a policy gradient with advantages 1/n+ and -1/n-.

    Source: book section 6.6.3; Li et al., NeurIPS 2025.
    """

    needs_old = True

    def __init__(
        self,
        score: str = "log_likelihood",
        tau: float | None = 10.0,
        *,
        delta: float = 1e-4,
        kl_penalty: float = 500.0,
        kl_estimator: str = "k3",
        surrogate: Surrogate = IDENTITY,
        normalizer: str = "valid",
    ) -> None:
        super().__init__()
        if score not in _SCORE_NAMES:
            raise ValueError(f"score must be one of {sorted(_SCORE_NAMES)}, got {score!r}")
        if tau is not None and tau <= 0:
            raise ValueError(f"tau must be positive, or None for L_1, got {tau}")
        if delta < 0 or kl_penalty < 0:
            raise ValueError(f"need delta >= 0 and kl_penalty >= 0, got {delta} and {kl_penalty}")
        if kl_estimator not in KL_TERMS:
            raise ValueError(f'kl_estimator must be "k1" or "k3", got {kl_estimator!r}')
        if normalizer not in ("valid", "all"):
            raise ValueError(f'normalizer must be "valid" or "all", got {normalizer!r}')
        self.score = self._score = _SCORE_NAMES[score]
        self.tau, self.delta, self.kl_penalty = tau, delta, kl_penalty
        self.kl_estimator, self.surrogate, self.normalizer = kl_estimator, surrogate, normalizer
        self._other = next(name for name in KL_TERMS if name != kl_estimator)

    def row_scores(
        self, log_probs: Tensor, mask: Tensor, old_log_probs: Tensor | None, targets: Tensor
    ) -> dict[str, Tensor]:
        """Scores, the sums over tokens of the KL terms, and those of the other estimator."""
        return {
            "scores": SCORES[self._score](log_probs, mask, old_log_probs),
            "kl": KL_TERMS[self.kl_estimator](log_probs, mask, old_log_probs),
            "kl_check": KL_TERMS[self._other](log_probs, mask, old_log_probs).detach(),
        }

    def forward(
        self,
        scores: Tensor,
        targets: Tensor,
        *,
        group: Tensor,
        kl: Tensor | None = None,
        kl_check: Tensor | None = None,
        length: Tensor | None = None,
        index: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Return the penalised objective of the joined rows; see the class."""
        scores, targets, _, group, kl, kl_check, length = self.joined(
            scores, targets, group=group, kl=kl, kl_check=kl_check, length=length
        )
        discriminative, metrics = self._discriminative(scores, targets, group)
        if kl is None or length is None:
            return ObjectiveOutput(discriminative, metrics)
        mean_kl, error = kl_statistics(kl, length)
        excess = (mean_kl - self.delta).clamp(min=0)
        loss = discriminative + self.kl_penalty * excess.square()
        metrics |= {
            "objective": loss.detach(),
            f"kl/{self.kl_estimator}": mean_kl.detach(),
            "kl/standard_error": error,
            "kl/multiplier": 2 * self.kl_penalty * excess.detach(),
            "kl/violated": (mean_kl.detach() > self.delta).to(scores.dtype),
        }
        if kl_check is not None:
            metrics[f"kl/{self._other}"] = kl_statistics(kl_check.detach(), length)[0]
        return ObjectiveOutput(loss, metrics)

    def exact(self, scores: Tensor, targets: Tensor, *, group: Tensor) -> Tensor:
        """L_1 or L_2 of the given rows, without the penalty."""
        return self._discriminative(scores, targets, group)[0]

    def _discriminative(
        self, scores: Tensor, targets: Tensor, group: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        right, slot = targets > 0.5, slots(group)
        wrong = (~right).to(scores.dtype)
        size, wrong_count = group_sum(torch.ones_like(scores), slot), group_sum(wrong, slot)
        signal = right & (wrong_count > 0)
        rows = rows_of(signal)
        inner, fraction = self._inner_values(scores, slot, rows, wrong)
        valid = signal[rows]
        # each right answer weighs 1 / (number of right answers): a valid question weighs 1
        weight = valid.to(scores.dtype) / (size - wrong_count)[rows].clamp(min=1)
        questions = size.reciprocal().sum()
        divisor = weight.sum() if self.normalizer == "valid" else questions
        loss = (inner.masked_fill(~valid, 0.0) * weight).sum() / divisor.clamp(min=1)
        several = valid & (wrong_count[rows] > 1)  # one wrong answer has nothing to weigh
        with torch.no_grad():
            metrics = {
                "objective": loss.detach(),
                "discriminative": loss.detach(),
                "groups/valid_fraction": weight.sum() / questions.clamp(min=1),
                "negatives/effective_fraction": observed_mean(fraction, several),
                "score/right": observed_mean(scores, right),
                "score/wrong": observed_mean(scores, ~right),
            }
        return loss, metrics

    def _inner_values(
        self, scores: Tensor, slot: Tensor, rows: Tensor, wrong: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The mean over wrong answers of each anchor (A,), and how many of them count."""
        if isinstance(self.surrogate, Identity):
            return self._separable_values(scores, slot, rows, wrong > 0)
        fixed = scores.detach()
        pairs = same_group(slot, rows, fixed.dtype) * wrong  # (A, R)
        pairwise, slope = self.surrogate.with_slope(differences(fixed, fixed[rows]))
        if self.tau is None:
            share = pairs / pairs.sum(-1, keepdim=True).clamp(min=1)
            value, fraction = (pairwise * share).sum(-1), torch.ones_like(fixed[rows])
        else:
            log_mean, share = logmeanexp(pairwise, pairs, self.tau)
            value, fraction = self.tau * log_mean, effective_fraction(share, pairs.sum(-1))
        return with_pair_gradient(scores, rows, value, share.mul_(slope)), fraction

    def _separable_values(
        self, scores: Tensor, slot: Tensor, rows: Tensor, wrong: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same for l(s) = s, where s_j - s_i separates: groups do, no pairs are needed."""
        if self.tau is None:
            mean, _ = group_mean(scores, slot, wrong)
            return mean[rows] - scores[rows], torch.ones_like(scores)[rows]
        exponent = scores / self.tau
        log_mean, _ = group_mean(exponent, slot, wrong, log=True)
        with torch.no_grad():
            fraction = effective_in_group(exponent, log_mean, wrong, slot)
        return self.tau * log_mean[rows] - scores[rows], fraction[rows]
