"""Tails of pairwise losses: what AUC and the partial AUCs with hard weights have in common.

With a non-decreasing surrogate the largest losses of a positive are those of the highest negatives,
and the positives with the largest losses are the lowest: a tail is found by sorting scores.
"""

import torch
from torch import Tensor

from llm_xrisk.objectives.pairs import Pairs
from llm_xrisk.objectives.surrogates import Surrogate


def check_share(name: str, share: float, of: str) -> None:
    """Refuse a share of a class that is not one.

    Raises:
        ValueError: share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(
            f"{name} must be in (0, 1], got {share}; it is the share of {of} that counts"
        )


def top_share(values: Tensor, among: Tensor, share: float) -> Tensor:
    """Weight 1 for the largest ``share`` of the entries ``among``, a fraction on its edge, else 0.

    Args:
        values: (R,) or (R, L), each column by itself.
        among: Booleans of the same shape.
        share: In (0, 1].

    Example:
        >>> top_share(torch.tensor([3.0, 1.0, 9.0, 2.0]), torch.tensor([1, 1, 0, 1]).bool(), 0.5)
        tensor([1.0000, 0.0000, 0.0000, 0.5000])
    """
    order = values.masked_fill(~among, float("-inf")).argsort(0, descending=True)
    place = torch.arange(len(values), device=values.device)
    place = place if values.dim() == 1 else place[:, None].expand_as(order)
    rank = torch.empty_like(order).scatter_(0, order, place)
    return (share * among.sum(0, dtype=values.dtype) - rank).clamp_(0, 1) * among


def tail_mean(pairs: Pairs, surrogate: Surrogate, max_fpr: float = 1.0) -> Tensor:
    """(A,) 1 / n_- times the sum of each anchor's k largest losses, k = max_fpr n_-."""
    pairwise, slope = surrogate.with_slope(pairs.gap)
    if max_fpr == 1:
        return pairs.attach_mean(pairs.means(pairwise)[0], slope)
    highest = top_share(pairs.scores.detach(), ~pairs.positive, max_fpr)
    columns = (pairs.shares() * pairs.columns_of(highest))[None]
    return pairs.attach(pairs.sums(pairwise, columns), slope, columns)[:, 0]


def mean_above(pairs: Pairs, surrogate: Surrogate, nu: Tensor) -> tuple[Tensor, Tensor]:
    r"""By how much the losses of each anchor exceed its threshold, and how many of them do.

    .. math:: \frac{1}{n_-} \sum_{x_j \in S_-} (\ell_{ij} - \nu_i)_+, \qquad
              \frac{1}{n_-} \sum_{x_j \in S_-} p_{ij}, \quad p_{ij} = 1[\ell_{ij} > \nu_i]

    Args:
        pairs: Of all positives.
        surrogate: l.
        nu: (A,) thresholds.

    Returns:
        (A,) with the gradient in the scores, the mean of p times that of l, and (A,) without.
    """
    pairwise, slope = surrogate.with_slope(pairs.gap)
    excess = pairwise.sub(nu.unsqueeze(1)).relu_()
    above = excess.sign()
    value, share = pairs.means(excess, above)
    return pairs.attach_mean(value, above.mul_(slope)), share
