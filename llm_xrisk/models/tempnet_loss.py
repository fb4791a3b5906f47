"""The robust next-token loss whose temperature is predicted, over the whole vocabulary."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm_xrisk.fcco.groups import readable
from llm_xrisk.models.logprobs import _chunks


class TemperedLoss(NamedTuple):
    """What :func:`tempered_loss` returns.

    Attributes:
        loss: () mean over the tokens with a label.
        values: (R, K) loss of each token, 0 where it has no label; carries the gradient.
        entropy: (R, K) entropy in nats of softmax(s / tau), without gradient. rho minus
            (log V - entropy) is the derivative of the token's loss in its tau.
        tau: (R, K) the temperatures, without gradient.
    """

    loss: Tensor
    values: Tensor
    entropy: Tensor
    tau: Tensor


def tempered_loss(
    logits: Tensor,
    targets: Tensor,
    tau: Tensor,
    *,
    rho: float,
    ignore_index: int = -100,
    num_tokens: Tensor | int | None = None,
    gradient: "LogitGradient | None" = None,
) -> TemperedLoss:
    r"""KL-constrained robust cross-entropy of next tokens, the loss of a TempNet for LLMs.

    .. math:: \ell = \tau \log \frac1V \sum_k \exp\Big(\frac{s_k - s_y}{\tau}\Big) + \tau\rho
              = \tau \, \big[ \mathrm{CE}(s / \tau, y) - \log V \big] + \tau \rho

    The summand of (6.50) with the vocabulary as the other items. Their sum is exact, so no inner
    function is tracked, and the gradients are closed forms: rho - (log V - H) in tau, with H the
    entropy of softmax(s / tau), and softmax(s / tau) minus the one-hot label in the logits. The
    first does not depend on the label.

    The logits are reduced in float32, chunk by chunk. Without gradient they are not kept. With
    gradient the backward pass writes it into the logits' own memory: then call backward once,
    and let no other graph need the logits. Where a TempNet predicted tau from the same logits,
    its own :meth:`~llm_xrisk.models.tempnet.TempNet.loss` does both in the order this asks for.

    Args:
        logits: (R, K, V) or (K, V), any float dtype.
        targets: (R, K) or (K,) token ids; those of ``ignore_index`` count for nothing.
        tau: Temperatures > 0 of the targets' shape.
        rho: Bound on KL(softmax(s / tau), uniform), in [0, log V): the loss is least in tau where
            the entropy is log V - rho.
        ignore_index: Marks tokens without a label.
        num_tokens: Divides the sum of the values; by default the number of labels here. Give the
            number in all micro-batches and processes for a mean over all of their tokens.
        gradient: For TempNet, which writes the gradient of the logits itself.

    Raises:
        ValueError: rho outside [0, log V), shapes that do not fit; on a CPU also a target outside
            the vocabulary, a tau that is not positive, and logits that are NaN.

    Example:
        >>> tau = torch.ones(1, requires_grad=True)
        >>> found = tempered_loss(torch.zeros(1, 4), torch.tensor([2]), tau, rho=0.5)
        >>> found.loss.backward()  # flat logits: H = log V, so the derivative is rho
        >>> found.loss.detach(), tau.grad
        (tensor(0.5000), tensor([0.5000]))
    """
    check_rho(rho, logits.shape[-1])
    if targets.shape != logits.shape[:-1] or tau.shape != targets.shape or targets.ndim > 2:
        raise ValueError(
            f"need logits (R, K, V) or (K, V), targets and tau of one entry a token; got "
            f"{tuple(logits.shape)}, {tuple(targets.shape)} and {tuple(tau.shape)}"
        )
    labelled = targets != ignore_index
    labels = targets.masked_fill(~labelled, 0)
    _check_tokens(labels, tau.masked_fill(~labelled, 1.0), logits.shape[-1])
    if gradient is None:
        gradient = LogitGradient()
        gradient.gate = _Gate.apply(as_rows(logits), gradient).view_as(targets)  # pyright: ignore
    norms, margins, entropy = _reduced(logits.detach(), labels, tau.detach())
    gradient.fill(labels, tau.detach(), norms)
    for name, numbers in (("logits", norms), ("the labels' logits", margins)):
        if readable(numbers) and not bool(numbers.masked_fill(~labelled, 0.0).isfinite().all()):
            raise ValueError(f"{name} are NaN or infinite at a token with a label; see the model")
    height = math.log(logits.shape[-1])
    slope = (rho - (height - entropy)).masked_fill(~labelled, 0.0)  # where it may be NaN
    values = tau.detach() * (margins - height + rho) + slope * (tau - tau.detach())
    values = (values + gradient.gate).masked_fill(~labelled, 0.0)
    count = labelled.sum().clamp(min=1) if num_tokens is None else num_tokens
    entropy = entropy.masked_fill(~labelled, 0.0)
    return TemperedLoss(values.sum() / count, values, entropy, tau.detach())


def check_rho(rho: float, vocab_size: int) -> None:
    """Refuse a bound that no temperature can meet.

    Raises:
        ValueError: rho outside [0, log V).
    """
    height = math.log(vocab_size)
    if not 0 <= rho < height:
        raise ValueError(
            f"rho must be in [0, log V), got {rho} with log V = {height:.3f} for V = {vocab_size}; "
            "from log V on every temperature falls to its lower bound. Take log V minus the "
            "entropy the sampled tokens should have: 8.5 is 1.9 nats of V = 32000"
        )


class LogitGradient:
    """Gradient of the losses of tokens in their logits, worked out last and in the logits' memory.

    ``gate`` (R, K) is a zero for each token that the loss adds to its value, so the derivative
    that comes back for it is the token's weight in the loss. The node that made the gate holds
    the logits and calls :meth:`write` when it no longer needs them.
    """

    gate: Tensor

    def __init__(self) -> None:
        self._saved: tuple[Tensor, Tensor, Tensor] | None = None

    def fill(self, labels: Tensor, tau: Tensor, norms: Tensor) -> None:
        """Keep what the gradient is made of: three numbers a token."""
        self._saved = (labels, tau, norms)

    def write(self, logits: Tensor, weight: Tensor) -> Tensor:
        """Turn ``logits`` (R, K, V) into weight (softmax(s / tau) - onehot), (R, K, V).

        Raises:
            RuntimeError: it was called before: the logits are gone.
        """
        if self._saved is None:
            raise RuntimeError(
                "the loss was differentiated twice; its backward pass overwrites the logits, so "
                "compute it again instead of retaining the graph"
            )
        labels, tau, norms = (saved.view_as(weight) for saved in self._saved)
        self._saved, logits = None, logits.detach()
        for part in _chunks(*logits.shape):
            scaled = _scaled(logits[part], tau[part], norms.dtype)
            factor = weight[part].unsqueeze(-1).to(norms.dtype)
            share = scaled.sub_(norms[part].unsqueeze(-1)).exp_().mul_(factor)
            share.scatter_add_(-1, labels[part].unsqueeze(-1), -factor)
            # also where the logits of a token without label are NaN
            logits[part] = share.masked_fill_(factor == 0, 0.0).to(logits.dtype)
        return logits


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, gradient: LogitGradient) -> Tensor:
        ctx.logits, ctx.gradient = logits.detach(), gradient
        return logits.new_zeros(logits.shape[:-1], dtype=wide(logits))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.write(ctx.logits, grads[0]), None


def as_rows(logits: Tensor) -> Tensor:
    """A view of ``logits`` with three dimensions."""
    return logits[(None,) * (3 - logits.ndim)]


def wide(*tensors: Tensor) -> torch.dtype:
    """The widest dtype of ``tensors``, and float32 at the least."""
    found = torch.float32
    for tensor in tensors:
        found = torch.promote_types(found, tensor.dtype)
    return found


def log_norms_and_entropy(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of the sum of exp, and entropy of the softmax, over the last dimension.

    Example:
        >>> log_norms_and_entropy(torch.zeros(2))
        (tensor(0.6931), tensor(0.6931))
    """
    norms = scaled.logsumexp(-1)
    share = (scaled - norms.unsqueeze(-1)).exp_()
    return norms, torch.special.entr(share).sum(-1)  # entr(0) = 0, where p log p is NaN


def _scaled(logits: Tensor, tau: Tensor, dtype: torch.dtype) -> Tensor:
    """(s - max s) / tau in ``dtype``: what is close to the largest loses no digits."""
    numbers = logits.to(dtype)
    return (numbers - numbers.amax(-1, keepdim=True)).div_(tau.unsqueeze(-1))


def _reduced(logits: Tensor, labels: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each token log sum exp of the scaled logits, cross-entropy and entropy."""
    shape, dtype = labels.shape, wide(logits, tau)
    rows = as_rows(logits)
    labels, tau = labels.view(rows.shape[:2]), tau.reshape(rows.shape[:2])
    norms, margins, entropy = (tau.new_empty(tau.shape, dtype=dtype) for _ in range(3))
    for part in _chunks(*rows.shape):
        scaled = _scaled(rows[part], tau[part], dtype)
        norms[part], entropy[part] = log_norms_and_entropy(scaled)
        margins[part] = norms[part] - scaled.gather(-1, labels[part].unsqueeze(-1)).squeeze(-1)
    return norms.view(shape), margins.view(shape), entropy.view(shape)


def _check_tokens(labels: Tensor, tau: Tensor, vocab_size: int) -> None:
    if not readable(labels) or not labels.numel():
        return
    low, high = (int(end) for end in torch.aminmax(labels))
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"target {low if low < 0 else high} is outside the vocabulary of {vocab_size}; labels "
            "are token ids, or ignore_index where there is none"
        )
    if not bool((tau > 0).all()):
        raise ValueError(f"tau must be positive, got {tau.amin().item()} at a token with a label")
