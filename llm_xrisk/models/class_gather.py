"""A classifier of very many classes, of which a step touches those of its batch alone."""

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_xrisk.fcco.arguments import INTEGERS, checked, shown

_CHUNK_CLASSES = 1 << 14


class SampledLogits(NamedTuple):
    """What :class:`ClassGather` returns, as ``ExtremeClassification`` takes it.

    Attributes:
        scores: (B, m) logits of the sampled classes.
        targets: (B,) the column of each row's own class.
        weight: (m,) importance weights 1 / (K pi_j), or None where classes count alike.
        classes: (m,) the sampled classes, distinct, in ascending order.
    """

    scores: Tensor
    targets: Tensor
    weight: Tensor | None
    classes: Tensor


class ClassGather(nn.Module):
    r"""Rows of class weights, gathered for the classes of a batch (Algorithm 26, lines 4 to 10).

    The classes are the batch's distinct labels and ``extra`` ones, drawn uniformly. Time and
    memory of a step depend on how many these are, not on K: the gradient of ``weight`` is sparse,
    with one row per sampled class. Optimizers that keep it so:

    * ``torch.optim.SGD(momentum=0)``: line 10; with ``beta`` < 1 and :meth:`average_gradient`
      before its step, lines 9 and 10. (SGD's own momentum would go on moving, and adding up, all
      rows ever touched.)
    * ``torch.optim.SparseAdam``: Adam whose moments, too, move on touched rows alone.

    Give ``weight`` a parameter group without weight decay, which would be dense.

    Labels come by class frequency q_j, so a class among the B - 1 other rows' labels or the M
    extra ones has been drawn with probability

    .. math:: \pi_j = 1 - (1 - q_j)^{B-1} (1 - 1/K)^M

    and :math:`\sum_{j \ne y_i} \exp(s_{ij} - s_{iy_i}) / (K \pi_j)` over the sampled classes has
    the mean of all classes but y_i as its expectation.

    Args:
        num_classes: K.
        dim: d, the width of the features.
        counts: (K,) number of training examples of each class, for q_j. Without it classes count
            alike, as in Algorithm 26 as printed.
        extra: M >= 0, how many classes to draw beside the labels.
        beta: Weight of the new gradient in (0, 1]; below 1 another (K, d) buffer is kept.
        std: Standard deviation of the first weights, >= 0.

    Raises:
        TypeError: an argument of another kind, or rows that are no tensors.
        ValueError: an argument out of range, counts of another shape, or a class that neither
            the labels nor ``extra`` would ever draw.

    Example:
        >>> head = ClassGather(num_classes=1000, dim=2, counts=torch.full((1000,), 5))
        >>> logits = head(torch.zeros(3, 2), torch.tensor([900, 7, 900]))
        >>> logits.classes, logits.targets, logits.scores.shape
        (tensor([  7, 900]), tensor([1, 0, 1]), torch.Size([3, 2]))
    """

    weight: nn.Parameter
    counts: Tensor | None
    total: Tensor | None
    direction: Tensor | None

    @checked
    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        counts: Tensor | None = None,
        extra: int = 0,
        beta: float = 1.0,
        std: float = 0.01,
    ) -> None:
        super().__init__()
        if num_classes < 2 or dim < 1 or extra < 0 or std < 0 or not 0 < beta <= 1:
            raise ValueError(
                "need num_classes >= 2, dim >= 1, extra >= 0, std >= 0 and beta in (0, 1], got "
                f"{num_classes}, {dim}, {extra}, {std} and {beta}"
            )
        self.num_classes, self.dim, self.extra, self.beta = num_classes, dim, extra, beta
        self.weight = nn.Parameter(torch.randn(num_classes, dim) * std)
        # whole numbers, which .to(bfloat16) leaves alone
        self.register_buffer("counts", None if counts is None else self._checked(counts))
        self.register_buffer("direction", torch.zeros(num_classes, dim) if beta < 1 else None)
        self.register_buffer("total", None if counts is None else counts.long().sum())

    def _apply(self, fn: Any, recurse: bool = True) -> "ClassGather":
        average = self.direction
        super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType]
        if average is not None and self.direction is not None:
            # an average with a small beta does not move in bfloat16
            self.direction = average.to(self.direction.device)
        return self

    def forward(
        self, features: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> SampledLogits:
        """Logits of the batch's sampled classes.

        Args:
            features: (B, d).
            labels: (B,) classes in [0, K).
            generator: Draws the extra classes.
        """
        self._check_rows(features, labels)
        drawn = torch.randint(
            self.num_classes, (self.extra,), device=labels.device, generator=generator
        )
        classes, column = torch.unique(torch.cat([labels, drawn]), return_inverse=True)
        scores = features @ self.gather(classes).T
        weight = self.importance(classes, labels.shape[0])
        return SampledLogits(scores, column[: labels.shape[0]], weight, classes)

    def gather(self, classes: Tensor) -> Tensor:
        """Rows of ``classes`` (m,), (m, d), whose gradient is a sparse one of ``weight``."""
        self._check_range(classes)
        return F.embedding(classes, self.weight, sparse=True)

    def importance(self, classes: Tensor, rows: int) -> Tensor | None:
        """Weights 1 / (K pi_j) of ``classes`` (m,) in a batch of ``rows``; None without counts."""
        if self.counts is None or self.total is None:
            return None
        # below 1: (1 - q)^(B - 1) is 1 for a batch of one row, whatever q
        frequency = (self.counts[classes].double() / self.total).clamp(max=1 - 1e-12)
        missed = (rows - 1) * torch.log1p(-frequency) + self.extra * math.log1p(
            -1 / self.num_classes
        )
        if rows + self.extra == 1:  # no class can be drawn beside the own one
            return torch.zeros_like(missed, dtype=torch.float32)
        return (-1 / (self.num_classes * torch.expm1(missed))).float()

    @torch.no_grad()
    def average_gradient(self) -> None:
        """Line 9, V[C] = (1 - beta) V[C] + beta Z[C]: call it after backward, before the step.

        The gradient becomes V on the touched rows; the others keep their V, and do not move.
        """
        if self.direction is None or self.weight.grad is None:
            return
        grad = self.weight.grad.coalesce()
        rows = grad.indices()[0]
        new = grad.values().to(self.direction.dtype)
        average = torch.lerp(self.direction[rows], new, self.beta)
        self.direction.index_copy_(0, rows, average)
        self.weight.grad = torch.sparse_coo_tensor(
            grad.indices(), average.to(grad.dtype), grad.shape, check_invariants=False
        )

    @torch.no_grad()
    def cross_entropy(self, features: Tensor, labels: Tensor) -> Tensor:
        """Exact cross-entropy of each row over all K classes, (B,), in parts; for evaluation.

        Example:
            >>> ClassGather(8, 2, std=0.0).cross_entropy(torch.ones(1, 2), torch.tensor([3])).exp()
            tensor([8.])
        """
        self._check_rows(features, labels)
        self._check_range(labels)
        whole = features.new_full(labels.shape, -math.inf)
        for part in self.weight.split(_CHUNK_CLASSES):
            logits = cast(Tensor, features @ part.T)
            whole = torch.logaddexp(whole, logits.logsumexp(-1))
        return whole - (features * self.weight[labels]).sum(-1)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"num_classes={self.num_classes}, dim={self.dim}, extra={self.extra}"

    def _check_rows(self, features: Any, labels: Any) -> None:
        """Refuse rows that are no features of width ``dim`` and classes."""
        for name, rows in (("features", features), ("labels", labels)):
            if not isinstance(rows, Tensor):
                raise TypeError(f"ClassGather got {name} as {shown(rows)} and needs a tensor")
        if features.shape[1:] != (self.dim,) or labels.shape != features.shape[:1]:
            raise ValueError(
                f"need features (B, {self.dim}) and labels (B,), got {tuple(features.shape)} and "
                f"{tuple(labels.shape)}; flatten further dimensions first"
            )
        if not features.is_floating_point() or labels.dtype not in INTEGERS:
            raise ValueError(
                "need floating-point features and integer labels, classes in [0, K), got "
                f"{features.dtype} and {labels.dtype}; of one-hot labels take argmax(1)"
            )

    def _check_range(self, classes: Tensor) -> None:
        """On a CPU, refuse classes outside [0, K)."""
        if classes.device.type == "cpu" and classes.numel():
            low, high = int(classes.min()), int(classes.max())
            if low < 0 or high >= self.num_classes:
                raise IndexError(
                    f"class {low if low < 0 else high} is out of range for num_classes="
                    f"{self.num_classes}; number the classes 0..K-1"
                )

    def _checked(self, counts: Tensor) -> Tensor:
        if counts.shape != (self.num_classes,):
            raise ValueError(
                f"counts must be ({self.num_classes},), got {tuple(counts.shape)}; use "
                "torch.bincount(labels, minlength=num_classes)"
            )
        if counts.is_floating_point() and not torch.equal(counts, counts.round()):
            raise ValueError(
                "counts must be numbers of examples, got fractions; use torch.bincount(labels, "
                "minlength=num_classes)"
            )
        missing = int((counts <= 0).sum())
        if missing and not self.extra:
            raise ValueError(
                f"{missing} classes have count 0: no label draws them, and they would be missing "
                "from every denominator; pass extra >= 1 to draw classes uniformly as well"
            )
        return counts.long()
