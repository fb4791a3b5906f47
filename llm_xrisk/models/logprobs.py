"""Log-probabilities of completion tokens: the one place where logits are reduced to numbers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_CHUNK_NUMBERS = 1 << 24  # float32 numbers worked on at a time: 64 MB


@dataclass(frozen=True)
class TokenLogProbs:
    """Per-token results of a forward pass.

    Attributes:
        log_probs: (R, K) log pi(y_t | x, y_<t) of the last K positions, float32 or wider; 0 where
            ``mask`` is false.
        mask: (R, K) true on completion tokens.
        entropy: (R, K) entropy in nats of the policy at those positions, or None.
    """

    log_probs: Tensor
    mask: Tensor
    entropy: Tensor | None = None


def token_log_probs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_mask: Tensor,
    *,
    keep: int | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> TokenLogProbs:
    r"""Score the completion tokens of each row under the temperature-scaled policy.

    .. math:: \log \pi(y_t) = z_{y_t}/T - \log\sum_v \exp(z_v/T)

    Rows may be padded left or right: positions come from the mask. Only the last ``keep``
    positions get logits. They are reduced in float32 chunk by chunk, and the backward pass writes
    the gradient into the logits' own memory, so they exist once.

    Args:
        model: A causal language model of transformers, wrapped (DDP, FSDP, DeepSpeed, PEFT) or not.
        input_ids: (R, T) prompt and completion tokens.
        attention_mask: (R, T) 1 on tokens, 0 on padding.
        completion_mask: (R, T) true on completion tokens.
        keep: Number of trailing positions that hold all completion tokens; T - 1 by default.
        temperature: T > 0.
        with_entropy: Whether to compute entropies too (without gradient).

    Returns:
        Log-probabilities, mask and entropies, each (R, keep).

    Raises:
        ValueError: temperature <= 0.

    Example:
        See :class:`llm_xrisk.trainers.DFTTrainer`; a model is needed to run it.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive to score with, got {temperature}")
    keep = min(keep or input_ids.shape[1], input_ids.shape[1] - 1)
    position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    logits = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=False,
        logits_to_keep=keep + 1,
    ).logits
    if logits.shape[1] > keep + 1:  # a model that knows no logits_to_keep
        logits = logits[:, -keep - 1 :]
    # logits[:, k] predict the token that stands one position later. The last ones predict nothing
    # and are cut off afterwards: the backward pass of a slice of logits would copy them all.
    targets, mask = input_ids[:, -keep - 1 :].roll(-1, 1), completion_mask[:, -keep:].bool()
    values, entropy = selective_log_softmax(
        logits, targets, temperature=temperature, with_entropy=with_entropy
    )
    return TokenLogProbs(
        values[:, :-1].masked_fill(~mask, 0.0),
        mask,
        None if entropy is None else entropy[:, :-1].masked_fill(~mask, 0.0),
    )


def selective_log_softmax(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-softmax of ``logits / temperature`` at ``targets``, without a copy of the logits.

    The backward pass overwrites ``logits`` with their gradient: call backward once, and do not
    use the logits of a graph afterwards.

    Args:
        logits: (R, K, V), any float dtype.
        targets: (R, K) token ids.
        temperature: Divides the logits.
        with_entropy: Whether to return entropies too, without gradient.

    Returns:
        Log-probabilities (R, K) in float32 (float64 for float64 logits), and entropies or None.

    Example:
        >>> values, _ = selective_log_softmax(torch.zeros(1, 2, 4), torch.tensor([[0, 3]]))
        >>> values.exp()
        tensor([[0.2500, 0.2500]])
    """
    values, entropy = _SelectiveLogSoftmax.apply(logits, targets, temperature, with_entropy)  # pyright: ignore[reportGeneralTypeIssues]
    return values, (entropy if with_entropy else None)


class _SelectiveLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        rows, positions, vocabulary = logits.shape
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        values = torch.empty(rows, positions, dtype=wide, device=logits.device)
        norms = torch.empty_like(values)
        entropy = torch.zeros_like(values)
        for part in _chunks(rows, positions, vocabulary):
            scaled = logits[part].to(wide) / temperature
            norms[part] = torch.logsumexp(scaled, -1)
            picked = scaled.gather(-1, targets[part].unsqueeze(-1)).squeeze(-1)
            values[part] = picked - norms[part]
            if with_entropy:
                log_probs = scaled - norms[part].unsqueeze(-1)
                entropy[part] = -(log_probs.exp() * log_probs).sum(-1)
        ctx.logits, ctx.temperature = logits.detach(), temperature
        ctx.save_for_backward(targets, norms)
        ctx.mark_non_differentiable(entropy)
        return values, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.logits is None:
            raise RuntimeError(
                "selective_log_softmax was differentiated twice; its backward pass overwrites the "
                "logits, so compute the log-probabilities again instead of retaining the graph"
            )
        targets, norms = ctx.saved_tensors
        logits, grad, temperature = ctx.logits, grads[0], ctx.temperature
        for part in _chunks(*logits.shape):
            weight = (grad[part] / temperature).unsqueeze(-1)
            scaled = logits[part].to(norms.dtype) / temperature
            share = torch.exp(scaled - norms[part].unsqueeze(-1)).mul_(-weight)
            share.scatter_add_(-1, targets[part].unsqueeze(-1), weight)
            logits[part] = share.to(logits.dtype)
        ctx.logits = None
        return logits, None, None, None


def _chunks(rows: int, positions: int, vocabulary: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of rows (or of one row's positions) of at most about ``_CHUNK_NUMBERS`` numbers."""
    wide = max(1, min(positions, _CHUNK_NUMBERS // vocabulary))
    tall = max(1, _CHUNK_NUMBERS // (vocabulary * wide)) if wide == positions else 1
    for row in range(0, rows, tall):
        for position in range(0, positions, wide):
            yield slice(row, row + tall), slice(position, position + wide)
