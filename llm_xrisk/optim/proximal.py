"""A pull towards the mean of the weights of the last epoch (PESG, section 6.4.1)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from llm_xrisk.fcco.arguments import checked
from llm_xrisk.optim.beside import BesideParameters, entries, groups_of


class ProximalPull:
    r"""The proximal term of PESG, for any optimizer of torch: steadies stages of training.

    .. math:: \nabla F(w_t) + \lambda_0 (w_t - w_{ref}), \qquad
              w_{ref} = \frac1T \sum_{t \in \text{last epoch}} w_t

    It hooks into ``optimizer.step()``: before a step lambda_0 (w - w_ref) is added to the gradient
    of each parameter that has one, and after it the weights enter the mean of the running epoch.
    In the first epoch w_ref are the weights before the first step. The optimizer stays what it
    is, so that schedulers, clipping, scalers and groups work as they do without.

    Args:
        optimizer: Any optimizer of torch. A group with an entry ``"lam0"`` has its own; 0 leaves
            its parameters alone (the a and b of an objective, say).
        lam0: lambda_0 >= 0; 2e-3 in the authors' recipes.
        steps_per_epoch: Begin a new epoch by itself after so many steps. By default
            :meth:`new_epoch` is yours to call.

    State: w_ref and the running mean of every trained parameter, each in float32 or wider, in
    :meth:`state_dict`; arguments are not saved, a resumed run has those it is given.

    Departures: the authors' library starts w_ref as noise of scale 0.01, which pulls a trained
    model to 0; w_ref is in its optimizers, here it is beside any. ``optimizer.step(closure)``
    adds the pull to each gradient the closure computes, and lambda_0 / 2 \|w - w_ref\|^2 to its
    loss.

    Raises:
        ValueError: lam0 < 0, steps_per_epoch < 1, an optimizer that has a pull already, or a
            checkpoint of other parameters.
        TypeError: a wrapper in place of the optimizer itself, or what is none.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = torch.optim.SGD([w], lr=1.0)
        >>> pull = ProximalPull(optimizer, lam0=0.5)
        >>> for gradient in (1.0, 0.0):                     # 1 - 1, then 0 - 0.5 (0 - 1)
        ...     w.grad = torch.tensor([gradient])
        ...     optimizer.step()
        >>> w.data
        tensor([0.5000])

    Source: book section 6.4.1; Guo et al. 2020, Yuan et al. 2021 (PESG).
    """

    @checked
    def __init__(
        self, optimizer: Optimizer, lam0: float = 2e-3, *, steps_per_epoch: int | None = None
    ) -> None:
        if lam0 < 0:
            raise ValueError(f"lam0 must not be negative, got {lam0}; the authors use 2e-3")
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise ValueError(
                f"steps_per_epoch must be at least 1, got {steps_per_epoch}; pass "
                "len(dataloader), or None and call new_epoch()"
            )
        self.lam0, self.steps_per_epoch = lam0, steps_per_epoch
        self.steps = 0
        self._reference = BesideParameters(optimizer, "reference weights")
        self._mean = BesideParameters(optimizer, "mean weights")
        self._optimizer = optimizer
        hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {})
        if any(isinstance(getattr(h, "__self__", None), ProximalPull) for h in hooks.values()):
            raise ValueError(
                "this optimizer has a ProximalPull already, and two would add up; call remove() "
                "on the first"
            )
        try:
            self._hooks = (
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            )
        except AttributeError as error:
            raise TypeError(
                f"{type(optimizer).__name__} takes no hooks; hand over the optimizer of torch "
                "inside, for accelerate's wrapper its .optimizer"
            ) from error

    def new_epoch(self) -> None:
        """Pull towards the mean of the weights since the last call from now on."""
        if self.steps > 0:
            # the next mean overwrites what it finds at its first step
            means, references = self._mean.values, self._reference.values
            self._mean.values, self._reference.values = references, means
        self.steps = 0

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, beside those of the model and the optimizer."""
        return {
            "steps": self.steps,
            "reference": self._reference.saved(),
            "mean": self._mean.saved(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, which is copied and not changed."""
        steps, reference, mean = entries(state_dict, ("steps", "reference", "mean"), self)
        self._reference.load(reference)
        self._mean.load(mean)
        self.steps = int(steps)

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        itself, *given = args
        closure: Callable[[], Any] | None = given[0] if given else kwargs.get("closure")
        if closure is None:
            self._pull()
            return None

        def pulled() -> Any:
            loss = closure()
            return loss + sum(0.5 * lam0 * d.square().sum() for lam0, d in self._pull())

        return (itself,), {**kwargs, "closure": pulled}

    @torch.no_grad()
    def _pull(self) -> list[tuple[float, Tensor]]:
        """Add the pull to the gradients; return lambda_0 and w - w_ref of each parameter."""
        # a fused optimizer divides gradients by the scale of a gradient scaler only in its step
        scale = getattr(self._optimizer, "grad_scale", None)
        pulls: list[tuple[float, Tensor]] = []
        for lam0, parameters in self._groups():
            references = [self._reference.of(p) for p in parameters]  # w before the first step
            pairs = zip(parameters, references, strict=True)
            reached = [(p, p.grad, r) for p, r in pairs if p.grad is not None]
            if not reached:
                continue
            weights, gradients, references = (list(column) for column in zip(*reached, strict=True))
            distances = torch._foreach_sub(weights, references)  # pyright: ignore
            pulls += [(lam0, distance) for distance in distances]
            if scale is not None:
                distances = torch._foreach_mul(distances, scale)  # pyright: ignore
            torch._foreach_add_(gradients, distances, alpha=lam0)  # pyright: ignore
        return pulls

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.steps += 1
        for _, parameters in self._groups():
            means = [self._mean.of(p) for p in parameters]
            now = [p.to(m.dtype) for p, m in zip(parameters, means, strict=True)]
            torch._foreach_lerp_(means, now, 1 / self.steps)  # pyright: ignore
        if self.steps == self.steps_per_epoch:
            self.new_epoch()

    def _groups(self) -> list[tuple[float, list[Tensor]]]:
        """lambda_0 and the parameters of the groups that are pulled at all."""
        groups = [(float(g.get("lam0", self.lam0)), ps) for g, ps in groups_of(self._optimizer)]
        return [(lam0, parameters) for lam0, parameters in groups if lam0 > 0 and parameters]
