"""What the objectives of distributionally robust optimization share (section 6.2.1)."""

from collections.abc import Callable

import torch
from torch import Tensor

from llm_xrisk.fcco import PerSampleDual
from llm_xrisk.fcco.groups import readable
from llm_xrisk.objectives.base import Objective, ObjectiveOutput
from llm_xrisk.objectives.reductions import widened


class RobustObjective(Objective):
    """The largest mean of the losses under weights near uniform: value and weights of the rows.

    ``scores`` are the losses l_i of the rows, smaller is better; ``targets``, where given, are the
    losses of a reference model, which are subtracted (the RHO loss of section 6.9) and carry no
    gradient. The state is one for all rows, so no index is needed.

    A subclass says what the value and the weights p_i are; the gradient is the mean of
    p_i grad l_i whatever they are.
    """

    binary_targets = False
    row_advice = 'pass one loss a row: F.cross_entropy(logits, labels, reduction="none")'

    def forward(
        self, scores: Tensor, targets: Tensor | None = None, *, index: Tensor | None = None
    ) -> ObjectiveOutput:
        """Return the objective of the joined rows; see the class. ``index`` is not used."""
        rows, reference, _ = self.joined(scores, targets)
        losses = rho_losses(rows, reference)
        if losses.shape[0] == 0:  # a shape: known without waiting, and equal on all ranks
            loss, weights = losses.sum(), losses.new_full((1,), float("nan"))
        else:
            with torch.no_grad():
                value, weights = self.estimate(losses)
            loss = with_weights(losses, value, weights)
        with torch.no_grad():
            metrics = {
                "objective": loss.detach(),
                "rows/effective_fraction": effective_fraction(weights),
                "weight/max": weights.amax(),
                "skipped": loss.new_full((), float(losses.shape[0] == 0)),
            }
            return ObjectiveOutput(loss, metrics | self.state_metrics())

    def exact(self, scores: Tensor, targets: Tensor | None = None) -> Tensor:
        """The worst case of the given rows without state, its duals at their best values."""
        self.check_shapes(scores=scores, targets=targets)
        losses = rho_losses(widened(scores), None if targets is None else widened(targets))
        if losses.shape[0] == 0:
            return losses.sum()
        with torch.no_grad():
            value, weights = self.worst_case(losses)
        return with_weights(losses, value, weights)

    def check_shapes(self, **rows: Tensor | None) -> None:
        """Refuse rows that do not belong together, and labels in the place of losses.

        Raises:
            ValueError: with what came and what is needed.
        """
        super().check_shapes(**rows)
        targets = rows.get("targets")
        if targets is not None and not targets.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} got targets of {targets.dtype}, which look like labels; "
                "targets are the losses of a reference model: put labels into the losses"
            )

    def estimate(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Value () and weights (B,) of a mini-batch at the tracked state, which takes its step."""
        raise TypeError(f"{type(self).__name__} does not define estimate")

    def worst_case(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Value () and weights (n,) of a whole set of losses."""
        raise TypeError(f"{type(self).__name__} does not define worst_case")

    def state_metrics(self) -> dict[str, Tensor]:
        """The state after the step, by name."""
        return {}


class GlobalDual(PerSampleDual):
    """One dual variable for all rows, which may start at the best value for the first mini-batch.

    Args:
        lr: Step size.
        initial: First value; None is what :meth:`begun_at` finds.
        beta: Weight of the new gradient in (0, 1]; 1 is plain SGD.
        lower: Projection's lower end, or None.
        state_dtype: dtype of the state.

    Example:
        >>> dual = GlobalDual(lr=0.5)
        >>> dual.begun_at(torch.amax, torch.tensor([1.0, 2.0]))
        tensor(2.)
        >>> dual.descend(torch.tensor(3.0)), dual.current()
        (None, tensor(0.5000))
    """

    visited: Tensor

    def __init__(
        self,
        *,
        lr: float,
        initial: float | None = None,
        beta: float = 1.0,
        lower: float | None = None,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            1, lr=lr, initial=initial or 0.0, beta=beta, lower=lower, state_dtype=state_dtype
        )
        self.register_buffer("visited", torch.full((1,), initial is not None))

    def current(self) -> Tensor:
        """The value (), NaN before there is one."""
        return torch.where(self.visited, self.value, float("nan"))[0]

    @torch.no_grad()
    def begun_at(self, best: Callable[[Tensor], Tensor], losses: Tensor) -> Tensor:
        """The value (), at first that of ``best(losses)``, which is kept in ``train()`` alone."""
        if readable(self.visited) and bool(self.visited):
            return self.value[0].clone()
        value = torch.where(self.visited, self.value, best(losses).to(self.value.dtype))
        if self.training:
            self.value.copy_(value)
            self.visited.fill_(True)
        return value[0]

    @torch.no_grad()
    def restarted(self, where: Tensor, best: Callable[[Tensor], Tensor], losses: Tensor) -> Tensor:
        """The value (), set to a finite ``best(losses)`` ``where`` () it holds; as begun_at."""
        if readable(where) and not bool(where):
            return self.value[0].clone()
        found = best(losses).to(self.value.dtype)
        value = torch.where(where & found.isfinite(), found, self.value)
        if self.training:
            self.value.copy_(value)
        return value[0]

    @torch.no_grad()
    def descend(self, grad: Tensor) -> None:
        """Take one projected step against ``grad`` (), which :meth:`step` does for many keys."""
        if self.training:
            known = torch.isfinite(grad)
            direction = torch.lerp(self.direction, grad.to(self.direction.dtype), self.beta)
            moved = (self.value - self.lr * direction).clamp(self.lower, self.upper)
            self.direction.copy_(torch.where(known, direction, self.direction))
            self.value.copy_(torch.where(known, moved, self.value))


def only_key(like: Tensor) -> Tensor:
    """The index (1,) of state that all rows share, on the device of ``like``."""
    return torch.zeros(1, dtype=torch.long, device=like.device)


def rho_losses(losses: Tensor, reference: Tensor | None) -> Tensor:
    """Losses above those of the reference model, which carry no gradient.

    Example:
        >>> rho_losses(torch.tensor([3.0]), torch.tensor([1.0]))
        tensor([2.])
    """
    return losses if reference is None else losses - reference.detach()


def with_weights(losses: Tensor, value: Tensor, weights: Tensor) -> Tensor:
    """Give ``value`` the gradient mean of p_i grad l_i.

    Example:
        >>> l = torch.tensor([1.0, 3.0], requires_grad=True)
        >>> torch.autograd.grad(with_weights(l, torch.tensor(5.0), torch.tensor([0.0, 2.0])), l)
        (tensor([0., 1.]),)
    """
    return value + ((losses - losses.detach()) * weights).mean()


def effective_fraction(weights: Tensor) -> Tensor:
    """Effective number of rows as a fraction of their number, 0 where no row has a weight.

    Example:
        >>> effective_fraction(torch.tensor([4.0, 0.0, 0.0, 0.0]))
        tensor(0.2500)
    """
    # against the largest weight: the squares of small weights would vanish
    share = weights / weights.amax().clamp(min=torch.finfo(weights.dtype).tiny)
    return share.sum().square() / (share.square().sum() * share.numel()).clamp(min=1.0)
