"""Compositional training: one loss at the weights that a step on another leads to (6.4.1)."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from llm_xrisk.fcco.arguments import checked, shown
from llm_xrisk.optim.beside import (
    BesideParameters,
    entries,
    groups_of,
    mean_over_ranks,
    wide,
    widened,
)


class CompositionalTraining:
    r"""Compositional training, PDSCA: learns features by cross-entropy while it optimizes AUC.

    .. math:: \min_w \; L_{AUC}\big(w - \tau \nabla L_{CE}(w)\big)

    The inner value u(w) = w - tau grad L_CE(w) is a vector of weights, tracked by its moving
    average as every inner value here; the outer function is L_AUC, or any other objective:

    .. math:: u_t = (1 - \beta) u_{t-1} + \beta (w_t - \tau \nabla \hat L_{CE}(w_t)), \qquad
              z_t = \nabla \hat L_{AUC}(u_t)

    :meth:`backward` adds z_t to the gradients of w, and the optimizer takes its step as usual.
    z_t is the first-order form of the book's thought experiment: it leaves out the derivative
    I - tau H of the inner step, H the Hessian of L_CE, and is not the gradient of the objective.
    With ``second_order`` it is: (I - tau H) z_t, at the cost of one product of H with a vector.

    Args:
        optimizer: Any optimizer of torch, of the model's parameters and those of the objective. A
            group with an entry ``"tau"`` has its own.
        tau: Step size of the inner step >= 0; 0.1 in the authors' recipe.
        beta: Weight of the new u in (0, 1]; 0.9 in the authors' recipe.
        second_order: Whether the gradient passes through the inner step. The inner loss is then
            differentiated twice, and refused if it holds an operation that cannot be.

    State: u, a copy of the weights in float32 or wider, in :meth:`state_dict`; arguments are not
    saved. A parameter that the inner loss does not reach (a and b of the objective) has no u: it
    is used as it is. The first call stores its own u.

    Departures: the book's text writes alpha, its dual, for tau. The authors' library alternates a
    step on each loss from where the other led, the average of u replacing w: the weights of its
    model are u, and w is not kept.

    Raises:
        ValueError: tau < 0, beta outside (0, 1], a loss that reaches no parameter or is no loss,
            an inner loss that with ``second_order`` can be differentiated only once, or a
            checkpoint of other parameters.
        TypeError: losses in the place of functions that return them.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([4.0]))
        >>> training = CompositionalTraining(torch.optim.SGD([w], lr=0.1), tau=0.25)
        >>> losses = training.backward(lambda: (w**2).sum() / 2, lambda: (w**2).sum())
        >>> losses, w.grad                                  # u = 4 - 0.25 * 4, then 2 u
        ((tensor(8.), tensor(9.)), tensor([6.]))

    Relations: tau = 0 and beta = 1 is training on the outer loss alone.

    Source: book section 6.4.1; Yuan et al., ICLR 2022 (PDSCA).
    """

    @checked
    def __init__(
        self,
        optimizer: Optimizer,
        tau: float = 0.1,
        beta: float = 0.9,
        *,
        second_order: bool = False,
    ) -> None:
        if tau < 0 or not 0 < beta <= 1:
            raise ValueError(f"need tau >= 0 and beta in (0, 1], got tau={tau} and beta={beta}")
        self.tau, self.beta, self.second_order = tau, beta, second_order
        self._optimizer = optimizer
        self._u = BesideParameters(optimizer, "moving averages")

    def backward(
        self, inner: Callable[[], Tensor], outer: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of the compositional objective to ``.grad`` of the parameters.

        Both functions run the model on the batch and return a loss; the second one runs at u. The
        weights are put back whatever happens, and u moves only if both succeed. Layers that keep
        statistics of their inputs see both runs.

        On several processes the gradients are averaged here, so that the functions must call the
        bare model, not DistributedDataParallel's. Sharded weights and gradient scalers are not
        supported. Every call is a step of u: accumulate gradients inside the functions.

        Args:
            inner: Returns () L_CE at the weights the model has.
            outer: Returns () L_AUC, as ``lambda: objective(model(x), y).loss``.

        Returns:
            Both losses, detached: L_CE(w) and L_AUC(u).
        """
        taus = {
            p: float(group.get("tau", self.tau))
            for group, parameters in groups_of(self._optimizer)
            for p in parameters
        }
        parameters = list(taus)
        with torch.enable_grad():
            inner_loss = loss_of("inner", inner)
            slopes = reached(inner_loss, parameters, create_graph=self.second_order)
        if not slopes:
            raise ValueError(
                "the inner loss reaches no parameter of the optimizer; return a loss computed "
                "from the model whose parameters the optimizer has"
            )
        u = self._next(slopes, taus)
        with weights_at(list(u), list(u.values())), torch.enable_grad():
            outer_loss = loss_of("outer", outer)
            z = reached(outer_loss, parameters)
        if not z:
            raise ValueError(
                "the outer loss reaches no parameter of the optimizer; return the loss of the same "
                "model, which runs inside the function"
            )
        z = dict(zip(z, mean_over_ranks(list(z.values())), strict=True))
        if self.second_order:
            z |= self._through_the_inner_step(slopes, taus, z)
        self._u.values.update(u)
        for p, gradient in z.items():
            p.grad = gradient.clone() if p.grad is None else p.grad.add_(gradient)
        return inner_loss.detach(), outer_loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, beside those of the model, the objective, the optimizer."""
        return {"u": self._u.saved()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, which is copied and not changed."""
        (u,) = entries(state_dict, ("u",), self)
        self._u.load(u)

    @torch.no_grad()
    def _next(
        self, slopes: dict[Tensor, Tensor], taus: dict[Tensor, float]
    ) -> dict[Tensor, Tensor]:
        """u_t of each parameter that the inner loss reaches."""
        means = mean_over_ranks([slope.detach() for slope in slopes.values()])
        u: dict[Tensor, Tensor] = {}
        for p, slope in zip(slopes, means, strict=True):
            new = widened(p).sub_(slope.to(wide(p)), alpha=taus[p])
            u[p] = self._u.values[p].lerp(new, self.beta) if p in self._u.values else new
        return u

    @staticmethod
    def _through_the_inner_step(
        slopes: dict[Tensor, Tensor], taus: dict[Tensor, float], z: dict[Tensor, Tensor]
    ) -> dict[Tensor, Tensor]:
        """(I - H diag(tau)) z: the derivative of w - tau grad L_CE(w), transposed, times z."""
        curved = [p for p, slope in slopes.items() if slope.requires_grad]
        full = {p: z[p] if p in z else torch.zeros_like(p) for p in slopes}
        if not curved:  # a linear loss
            return full
        refuse_once_differentiable([slopes[p] for p in curved])
        found = torch.autograd.grad(
            [slopes[p] for p in curved],
            list(slopes),
            grad_outputs=[taus[p] * full[p] for p in curved],
            allow_unused=True,
            materialize_grads=True,
        )
        products = mean_over_ranks(found)
        return {p: full[p] - product for p, product in zip(slopes, products, strict=True)}


def loss_of(name: str, function: Callable[[], Any]) -> Tensor:
    """The loss that a function returns.

    Raises:
        TypeError: what is no function.
        ValueError: what is no loss to differentiate.

    Example:
        >>> loss_of("inner", lambda: torch.ones((), requires_grad=True))
        tensor(1., requires_grad=True)
    """
    if not callable(function):
        raise TypeError(
            f"{name} must be a function that runs the model and returns a loss, got "
            f"{shown(function)}; the outer one runs at other weights: pass lambda: loss(model(x))"
        )
    loss = function()
    if not isinstance(loss, Tensor):
        todo = "return output.loss" if hasattr(loss, "loss") else "return the loss itself"
        raise ValueError(f"the {name} function must return a tensor, got {shown(loss)}; {todo}")
    if loss.dim() > 0 or not loss.requires_grad:
        raise ValueError(
            f"the {name} function must return one loss with its graph, got {shown(loss)} with "
            f"requires_grad={loss.requires_grad}; reduce it to a mean, and leave out detach()"
        )
    return loss


def reached(
    loss: Tensor, parameters: Sequence[Tensor], *, create_graph: bool = False
) -> dict[Tensor, Tensor]:
    """Gradient of the loss in those parameters that it depends on.

    Example:
        >>> w, other = (torch.nn.Parameter(torch.tensor(3.0)) for _ in range(2))
        >>> [gradient for p, gradient in reached(w**2, [w, other]).items()]
        [tensor(6.)]
    """
    try:
        grads = torch.autograd.grad(loss, parameters, create_graph=create_graph, allow_unused=True)
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise ValueError(
            "a loss was computed from outputs that another loss has used up; run the model inside "
            "each of the two functions, since the outer one runs at other weights"
        ) from error
    found = cast(Sequence[Tensor | None], grads)
    return {p: g for p, g in zip(parameters, found, strict=True) if g is not None}


def refuse_once_differentiable(gradients: Sequence[Tensor]) -> None:
    """Refuse gradients whose own gradient would lack a part.

    Behind an operation that is differentiable once, autograd leaves a node that raises if it is
    run; asked for the gradient in some weights only, it passes it by without a word.

    Raises:
        ValueError: such a node in the graph of ``gradients``.
    """
    seen: set[Any] = set()
    queue: list[Any] = [gradient.grad_fn for gradient in gradients]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            raise ValueError(
                "the inner loss contains an operation that can be differentiated only once, as "
                "fused attention and the objectives of pairs; use second_order=False, or a loss "
                "of plain operations"
            )
        seen.add(node)
        queue += [function for function, _ in node.next_functions]


@contextmanager
def weights_at(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Generator[None]:
    """Let parameters hold other values for a while, and their own again whatever happens.

    They stay the same tensors in the same memory, so that views and compiled code see the values.
    ``.data`` hides the change from autograd: a graph built before is whole again afterwards, and
    must not be used meanwhile.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> with weights_at([w], [torch.tensor([3.0])]):
        ...     seen = w.item()
        >>> seen, w.item()
        (3.0, 1.0)
    """
    own = [p.detach().clone() for p in parameters]
    try:
        for p, value in zip(parameters, values, strict=True):
            p.data.copy_(value)
        yield
    finally:
        for p, value in zip(parameters, own, strict=True):
            p.data.copy_(value)
