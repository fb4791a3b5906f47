"""Group-relative policy optimization, as a baseline on DisCO's interface (section 6.6.3)."""

import torch
from torch import Tensor

from llm_xrisk.fcco.groups import group_sum, slots
from llm_xrisk.objectives.base import ObjectiveOutput
from llm_xrisk.objectives.reductions import observed_mean, widened
from llm_xrisk.objectives.scores import clipped_ratio, k3
from llm_xrisk.objectives.sequence import SequenceObjective, kl_statistics


class GRPO(SequenceObjective):
    r"""GRPO, (6.64): raises answers above the mean of their group, clipped, by advantage.

    .. math:: \max_w\; \frac1m \sum_i \frac1K \sum_j \frac{1}{|y_{ij}|} \sum_t
              f\big(r_{ij,t}, A_{ij}\big), \quad f(r, A) = \min(r A, \mathrm{clip}(r,
              1 - \epsilon, 1 + \epsilon) A) \qquad (6.64)
    .. math:: A = (r - \mathrm{mean}) / \mathrm{std} \text{ of the group} \qquad (6.66)

    For binary rewards f(r, A) is A times one of two scores, (6.77) for right and (6.78) for wrong
    answers, and the objective is sqrt(p (1 - p)) times the mean right score minus the mean wrong
    score of each question (6.76): the difficulty bias that DisCO removes. The loss is the
    negative of the objective, its gradient autograd's.

    Args:
        clip_low: epsilon of wrong answers; 0.2.
        clip_high: epsilon of right answers; 0.2.
        std: "population" is (6.66); "sample" divides by n - 1, as most code does, which scales
            the advantages by sqrt((n - 1) / n).
        normalizer: "all" averages over all questions, "valid" over those with right and wrong
            answers.

    Shapes:
        scores, targets (R,), rewards 0 or 1; group (R,) one id per question and rollout; kl (R,)
        sum over tokens and length (R,) from :meth:`row_scores` and the mask, or None.

    State: none.

    Departures: no epsilon in the denominator, as groups of equal rewards have advantage 0. There
    is no KL to a reference model; the KL to the old policy (k3) is measured and not optimised.
    Groups may be of different sizes: each question weighs the same.

    Raises:
        ValueError: clip ranges below 0, unknown std or normalizer.

    Example:
        >>> scores, rewards = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])
        >>> scores.requires_grad_()
        tensor([1., 1.], requires_grad=True)
        >>> GRPO()(scores, rewards, group=torch.tensor([0, 0])).loss.backward()
        >>> scores.grad                                     # A = 1 and -1, over two answers
        tensor([-0.5000,  0.5000])

    Relations: :class:`DrGRPO` leaves out std and 1/|y|, :class:`DAPO` averages over tokens and
    clips higher; DisCO's L_1 with the L-ratio score drops clip and the weight sqrt(p (1 - p)).

    Source: book section 6.6.3, Proposition 6.1; Shao et al., arXiv 2402.03300.
    """

    score = None
    needs_old = True

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        *,
        std: str = "population",
        normalizer: str = "all",
    ) -> None:
        super().__init__()
        if clip_low < 0 or clip_high < 0:
            raise ValueError(f"clip ranges must not be negative, got {clip_low} and {clip_high}")
        if std not in ("population", "sample"):
            raise ValueError(f'std must be "population" or "sample", got {std!r}')
        if normalizer not in ("valid", "all"):
            raise ValueError(f'normalizer must be "valid" or "all", got {normalizer!r}')
        self.clip_low, self.clip_high, self.std, self.normalizer = (
            clip_low,
            clip_high,
            std,
            normalizer,
        )

    def row_scores(
        self, log_probs: Tensor, mask: Tensor, old_log_probs: Tensor | None, targets: Tensor
    ) -> dict[str, Tensor]:
        """Clipped ratios, (6.77) and (6.78), and the sum over tokens of the k3 terms."""
        clip = {"low": self.clip_low, "high": self.clip_high}
        return {
            "scores": clipped_ratio(log_probs, mask, old_log_probs, targets, **clip),
            "kl": k3(log_probs, mask, old_log_probs),
        }

    def forward(
        self,
        scores: Tensor,
        targets: Tensor,
        *,
        group: Tensor,
        kl: Tensor | None = None,
        length: Tensor | None = None,
        index: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Return the negative objective of the joined rows; see the class."""
        scores, targets, _, group, kl, length = self.joined(
            scores, targets, group=group, kl=kl, length=length
        )
        loss, valid = self._loss(scores, targets, group, length)
        with torch.no_grad():
            right = targets > 0.5
            metrics = {
                "objective": loss.detach(),
                "groups/valid_fraction": valid,
                "score/right": observed_mean(scores, right),
                "score/wrong": observed_mean(scores, ~right),
            }
            if kl is not None and length is not None:
                names = "kl/k3", "kl/standard_error"
                metrics |= dict(zip(names, kl_statistics(widened(kl), length), strict=True))
        return ObjectiveOutput(loss, metrics)

    def exact(
        self, scores: Tensor, targets: Tensor, *, group: Tensor, length: Tensor | None = None
    ) -> Tensor:
        """The loss of the given rows."""
        return self._loss(widened(scores), targets, group, length)[0]

    def advantages(self, rewards: Tensor, mean: Tensor, size: Tensor) -> Tensor:
        """A of each row (R,), from its reward and its group's mean and size; 0 where all agree."""
        variance = mean * (1 - mean)  # of rewards 0 and 1
        if self.std == "sample":
            variance = variance * size / (size - 1).clamp(min=1)
        return (rewards - mean) * torch.where(variance > 0, variance, 1.0).rsqrt()

    def row_weights(self, share: Tensor, counted: Tensor, length: Tensor | None) -> Tensor:
        """Weight of each row (R,): its ``share`` of a question, over the ``counted`` questions.

        Args:
            share: (R,) one over the size of the row's group.
            counted: (R,) whether the row's question counts, 1 or 0.
            length: (R,) numbers of tokens, or None.
        """
        return share * counted / (share * counted).sum().clamp(min=1)

    def _loss(
        self, scores: Tensor, targets: Tensor, group: Tensor, length: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The loss and the fraction of questions with right and wrong answers."""
        slot, rewards = slots(group), (targets > 0.5).to(scores.dtype)
        size = group_sum(torch.ones_like(scores), slot)
        right = group_sum(rewards, slot)
        valid = ((right > 0) & (right < size)).to(scores.dtype)
        share = 1 / size
        counted = valid if self.normalizer == "valid" else torch.ones_like(valid)
        weight = self.row_weights(share, counted, length)
        advantage = self.advantages(rewards, right / size, size)
        fraction = (share * valid).sum() / share.sum().clamp(min=1)
        return -(weight * advantage * scores).sum(), fraction
