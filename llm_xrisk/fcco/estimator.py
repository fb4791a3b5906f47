"""The central abstraction: a moving average of an inner function, as a layer."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm_xrisk.fcco import rules
from llm_xrisk.fcco.arguments import checked
from llm_xrisk.fcco.groups import columns, finite_rows, group_mean
from llm_xrisk.fcco.keyed import KeyedState, Keys, kept
from llm_xrisk.fcco.schedules import GammaSchedule, constant


class InnerEstimator(KeyedState):
    r"""Tracks the inner values u_i of F(w) = (1/n) sum_i f_i(g_i(w)), keyed by sample.

    .. math:: u_i \leftarrow (1-\gamma) u_i + \gamma\, g_i(w_t; B_t)

    ``u = inner(g, index)`` has the *value* of the updated average and the *gradient* of the
    mini-batch value, so that ``f(u).mean()`` reads as the objective, is its plug-in estimate, and
    differentiates to the FCCO estimator (1/B) sum_i f'(u_i) grad g_i (no factor gamma):

    * plain: ``u + (g - sg[g])``
    * logarithmic: ``log_u + sg[exp(log_g - log_u)] * (log_g - sg[log_g])``

    State is kept in buffers: ``u`` (n L, *shape), 4 bytes a number, and ``visited``
    (n L,), 1 byte each. They stay in ``state_dtype`` whatever ``.to()`` asks for: in
    bfloat16 an average with a small gamma never moves. In ``eval()`` the mini-batch value is
    returned and nothing is written.

    Args:
        num_samples: n, the number of samples; ``index`` lies in [0, n).
        gamma: Weight of the new mini-batch value in (0, 1], or a schedule of the epoch.
        shape: Shape of one inner value, () for scalars.
        num_labels: L inner values for each sample; label l of sample i has the index i L + l.
        log: Whether ``g`` and the state are logarithms (eq. 6.14).
        initial: Fixed first value u_0 in the units of the state (0.0 is u_0 = 1 in log). By
            default the first visit of a sample stores its mini-batch value (section 6.4.2).
        rule: Update rule ``(u, g, gamma) -> u``; by default the (log) moving average.
        state_dtype: dtype of ``u``; float64 in tests that compare to 1e-10.

    Raises:
        TypeError: an argument of another kind.
        ValueError: gamma outside (0, 1], num_samples < 1, inner values of another shape, or a
            checkpoint of another size.
        IndexError: index outside [0, num_samples) (checked on the CPU, where it costs nothing).

    Example:
        >>> inner = InnerEstimator(num_samples=3, gamma=0.5)
        >>> inner(torch.tensor([4.0]), torch.tensor([1]))       # first visit
        tensor([4.])
        >>> inner(torch.tensor([2.0]), torch.tensor([1]))
        tensor([3.])

    Source: the layer form of SOX (section 6.1, Algorithms 28, 34, 36).
    """

    u: Tensor
    visited: Tensor
    gamma: Tensor

    @checked
    def __init__(
        self,
        num_samples: int,
        gamma: float | GammaSchedule = 0.9,
        *,
        shape: tuple[int, ...] = (),
        num_labels: int | None = None,
        log: bool = False,
        initial: float | None = None,
        rule: rules.Rule | None = None,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(num_samples, num_labels)
        self.log, self.shape = log, shape
        self.initial = initial
        self.rule = rule
        self.schedule = gamma if callable(gamma) else constant(gamma)
        start = torch.full((self.num_keys, *shape), initial or 0.0, dtype=state_dtype)
        self.register_buffer("u", start)
        self.register_buffer("visited", torch.zeros(self.num_keys, dtype=torch.bool))
        self.register_buffer("gamma", torch.tensor(1.0, dtype=state_dtype), persistent=False)
        self.set_epoch(0.0)

    def set_epoch(self, epoch: float) -> None:
        """Set gamma to its schedule's value at ``epoch``."""
        gamma = self.schedule(epoch)
        if not 0 < gamma <= 1:
            raise ValueError(
                f"gamma must be in (0, 1], got {gamma}; it is the weight of the new value"
            )
        self.gamma.fill_(gamma)

    def forward(self, g: Tensor, index: Tensor | Keys, where: Tensor | None = None) -> Tensor:
        """Update the state of the rows' samples and return it with the gradient of ``g``.

        Each of several rows with equal ``index`` is averaged with the u that all of them found,
        and the mean of the results is kept: two views of a sample have a u each and share its
        state (section 6.5.2), and with gamma = 1 every row comes back as ``g``. Rows outside
        ``where`` change nothing and come back as ``g``.

        Args:
            g: (B, *shape) mini-batch inner values (their logarithms if ``log``); infinite and NaN
                ones are no observations.
            index: (B,) sample ids, or the keys made of them.
            where: (B,) which rows are observations; all by default.

        Returns:
            (B, *shape), in the wider of g's dtype and the state's.
        """
        if not self.training:
            return g
        keys = self.check(index)
        if g.shape != (*keys.index.shape, *self.shape):
            raise ValueError(
                f"got inner values {tuple(g.shape)} and index {tuple(keys.index.shape)}; an "
                f"estimator of shape {self.shape} needs one such value for each id"
            )
        u = kept(self._update(g.detach().to(self.u.dtype), keys, where))
        if not g.requires_grad:
            return u.to(torch.promote_types(g.dtype, u.dtype))
        return cast(Tensor, _Tracked.apply(g, u, self.log))  # pyright: ignore[reportUnknownMemberType]

    def _update(self, g: Tensor, keys: Keys, where: Tensor | None) -> Tensor:
        where, index = finite_rows(g, where), keys.index
        u, visited = self.u.index_select(0, index), self.visited.index_select(0, index)
        rule = self.rule or (rules.log_moving_average if self.log else rules.moving_average)
        new = rule(u, g, self.gamma)
        if self.initial is None:
            new = torch.where(columns(visited, u), new, g)
        mean, seen = new, where
        if not keys.distinct:
            # rows of one sample all write their mean: the order of the writes cannot matter
            mean, count = group_mean(new, keys.slots, where, log=self.log)
            seen = None if where is None else count > 0
        if seen is None:
            self.u.index_copy_(0, index, mean)
            self.visited.index_fill_(0, index, True)
        else:
            self.u.index_copy_(0, index, torch.where(columns(seen, u), mean, u))
            self.visited.index_copy_(0, index, visited | seen)
        return new if where is None else torch.where(columns(where, g), new, g)

    def extra_repr(self) -> str:
        """Show what distinguishes one estimator from another."""
        kind = "log" if self.log else "plain"
        return f"num_samples={self.num_samples}, shape={tuple(self.u.shape[1:])}, {kind}"


class _Tracked(torch.autograd.Function):
    """The value of u with the gradient of g: that of u + (g - sg[g]), or of its logarithm."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, log: bool) -> Tensor:
        ctx.log = log
        if log:
            ctx.save_for_backward(g, u)
        return u.to(torch.promote_types(g.dtype, u.dtype), copy=True)

    @staticmethod
    @once_differentiable  # g / u depends on the scores, which this gradient does not know
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not ctx.log:
            return grads[0], None, None
        g, u = ctx.saved_tensors
        return grads[0] * torch.exp(g - u), None, None
