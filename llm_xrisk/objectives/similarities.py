"""Inner values of contrastive objectives, with their analytic gradients in features and tau.

Of the pairs of all rows one matrix of exponents and one of shares are made for each side, and the
gradient in the features is two products of the shares with the features.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_xrisk.fcco.groups import group_sum, slots
from llm_xrisk.objectives.base import Objective, wrong_shapes
from llm_xrisk.objectives.log_means import effective_fraction, logsumexp
from llm_xrisk.objectives.pair_gradients import with_cross_gradient, with_similarity_gradient
from llm_xrisk.objectives.pairs import same_group
from llm_xrisk.objectives.reductions import observed_max, observed_mean

EXCLUDED = 1e30


class ContrastiveObjective(Objective):
    """An objective of two matrices of features, row i of one the positive of row i of the other."""

    binary_targets = False
    log_eps: float = -math.inf

    def plus_eps(self, log_u: Tensor) -> Tensor:
        """Logarithm of eps + u."""
        if self.log_eps == -math.inf:
            return log_u
        return torch.logaddexp(log_u, torch.full_like(log_u, self.log_eps))

    def check_shapes(self, **rows: Tensor | None) -> None:
        """Refuse rows that do not belong together.

        Raises:
            ValueError: with the shapes that came and those that are needed.
        """
        given = {name: t for name, t in rows.items() if t is not None}
        count = tuple(given["scores"].shape[:1])
        width = tuple(given["scores"].shape[1:2]) or ("d",)
        need = {name: count if name == "index" else (*count, *width) for name in given}
        if "ref_scores" in given:  # another model's features, of its own width
            own = tuple(given["ref_scores"].shape[1:2]) or ("d_ref",)
            need |= dict.fromkeys(("ref_scores", "ref_targets"), (*count, *own))
        if any(tuple(t.shape) != need[name] for name, t in given.items()):
            raise wrong_shapes(self, given, {n: ("rows", *s[1:]) for n, s in need.items()})


@dataclass(frozen=True)
class Contrast:
    """What the negatives of each anchor amount to; S sides give (B, S) instead of (B,).

    Attributes:
        log_g: log mean_j exp(l_j / tau) with gradient in features and tau.
        energy: mean_j q_j l_j / tau, q the negatives' shares in g; 0 where tau is not learned.
        fraction: Effective fraction of the negatives.
        count: (B,) number of negatives.
        anchors: (B,) whether there are any.
        positive: (B,) similarity to the positive, with gradient.
        reference: (B,) a reference model's similarity to it, subtracted as in ``log_g``.
    """

    log_g: Tensor
    energy: Tensor
    fraction: Tensor
    count: Tensor
    anchors: Tensor
    positive: Tensor
    reference: Tensor | None = None

    def relative(self, tau: Tensor) -> "Contrast":
        """The same for l_j = s_j - s_positive in place of l_j = s_j."""
        own = self.positive if self.reference is None else self.positive - self.reference
        shift = own / tau if tau.dim() == 1 else own[:, None] / tau
        return replace(self, log_g=self.log_g - shift, energy=self.energy - shift.detach())

    def metrics(self, loss: Tensor, tau: Tensor, log_u: Tensor | None = None) -> dict[str, Tensor]:
        """What to log of a mini-batch, detached."""
        with torch.no_grad():
            anchors = self.anchors if tau.dim() == 1 else self.anchors[:, None].expand_as(tau)
            told = {
                "objective": loss.detach(),
                "negatives/effective_fraction": observed_mean(self.fraction, anchors),
                "similarity/positive": self.positive.mean(),
                "tau/mean": tau.mean(),
                "skipped": (~self.anchors.any()).to(tau.dtype),
            }
            if log_u is not None:
                told["log_u/mean"] = observed_mean(log_u, anchors)
                told["log_u/max"] = observed_max(log_u.flatten(), anchors.flatten())
            if self.reference is not None:
                told["similarity/reference"] = self.reference.mean()
            return told

    def temperature_gradient(self, log_u: Tensor, rho: float) -> Tensor:
        """Algorithm 35, line 7: log u + rho - mean_j p_j l_j / tau, with p_j = exp(l_j / tau) / u.

        It is the derivative in tau of tau (log u + rho) as u is tracked.
        """
        fixed = log_u.detach()
        return fixed + rho - torch.exp(self.log_g.detach() - fixed) * self.energy


def contrast_views(views: Tensor, ids: Tensor, tau: Tensor, *, learned: bool) -> Contrast:
    """Inner values of 2B views, each against the views of all other samples; l = s.

    Args:
        views: (2B, d) of length 1, the first views before the second.
        ids: (2B,) their samples.
        tau: (2B,).
        learned: Whether the gradient in tau is needed.
    """
    positive = (views * views.roll(views.shape[0] // 2, 0)).sum(-1)
    with torch.no_grad():
        exponent = (views / tau[:, None]) @ views.T
        own, count = _own(ids, views.dtype)
        log_g, share, energy, fraction = _soft_mean(exponent, own, count, learned)
        slope = share.div_(tau[:, None])
    log_g = with_similarity_gradient(views, log_g, slope)
    log_g = _with_temperature_gradient(log_g, energy, tau)
    return Contrast(log_g, energy, fraction, count, count > 0, positive)


def contrast_pairs(
    first: Tensor,
    second: Tensor,
    ids: Tensor,
    tau: Tensor,
    *,
    learned: bool,
    reference: tuple[Tensor, Tensor] | None = None,
) -> Contrast:
    """Inner values of B pairs, each side against the other sides of all other samples; l = s.

    With the sides of a reference model l is the similarity less that of the reference.

    Args:
        first: (B, d) of length 1; their inner values are column 0.
        second: (B, d) of length 1; their inner values are column 1.
        ids: (B,) their samples.
        tau: (B, 2).
        learned: Whether the gradient in tau is needed.
        reference: Both (B, d_ref), without gradient.
    """
    positive, known = (first * second).sum(-1), None
    with torch.no_grad():
        similarity = first @ second.T
        if reference is not None:
            similarity.addmm_(reference[0], reference[1].T, alpha=-1)
            known = (reference[0] * reference[1]).sum(-1)
        own, count = _own(ids, first.dtype)
        columns = similarity.T.clone(memory_format=torch.contiguous_format)
        exponents = (similarity.div_(tau[:, :1]), columns.div_(tau[:, 1:]))
        sides = [_soft_mean(exponent, own, count, learned) for exponent in exponents]
        log_g, energy, fraction = (torch.stack([s[k] for s in sides], -1) for k in (0, 2, 3))
        slopes = [side[1].div_(t[:, None]) for side, t in zip(sides, tau.unbind(-1), strict=True)]
    log_g = with_cross_gradient(first, second, log_g, *slopes)
    log_g = _with_temperature_gradient(log_g, energy, tau)
    return Contrast(log_g, energy, fraction, count, count > 0, positive, known)


def normalised(features: Tensor) -> Tensor:
    """Features of length 1.

    Example:
        >>> normalised(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """
    return F.normalize(features, dim=-1)


def _own(ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight 1 for the pairs of one sample, (R, R), and how many rows are of other samples."""
    slot = slots(ids)
    rows = torch.arange(ids.shape[0], device=ids.device)
    others = ids.shape[0] - group_sum(torch.ones_like(ids, dtype=dtype), slot)
    return same_group(slot, rows, dtype), others


def _soft_mean(
    exponent: Tensor, own: Tensor, count: Tensor, learned: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log mean exp of each row over the negatives, their shares, mean exponent by these, fraction.

    ``exponent`` is overwritten.
    """
    # far below any exponent and far from overflow; not as add_(own, alpha=...), which inductor
    # fuses into the product before it wrongly
    exponent.add_(own.mul(-EXCLUDED))
    log_sum, share = logsumexp(exponent)
    energy = torch.zeros_like(log_sum)
    if learned:
        energy = exponent.mul_(share).sum(-1).masked_fill(count == 0, 0.0)
    return (
        log_sum - count.clamp(min=1).log(),
        share,
        energy,
        effective_fraction(share, count),
    )


def _with_temperature_gradient(log_g: Tensor, energy: Tensor, tau: Tensor) -> Tensor:
    """Give log mean_j exp(l_j / tau) its derivative in tau, -energy / tau."""
    if not tau.requires_grad:
        return log_g
    fixed = tau.detach()
    return log_g - energy / fixed * (tau - fixed)
