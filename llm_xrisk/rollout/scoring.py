"""Teacher-forced log-probs of completions, straight from a causal language model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_xrisk.models.logprobs import token_log_probs


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode; afterwards each one is back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass(frozen=True)
class LeftPadded:
    """Rows of unequal length, aligned at their last token; all fields (rows, length) int64."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor


def left_pad(rows: Sequence[Sequence[int]], *, pad_id: int, device: torch.device) -> LeftPadded:
    """Pad on the left, with masks and with positions that count real tokens only.

    Example:
        >>> left_pad([[7], [8, 9]], pad_id=0, device=torch.device("cpu")).input_ids.tolist()
        [[0, 7], [8, 9]]
    """
    length = max(len(row) for row in rows)
    ids = [[pad_id] * (length - len(row)) + list(row) for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    attention_mask = torch.tensor(mask, device=device)
    return LeftPadded(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(dim=-1) - 1).clamp_(min=0),
    )


def length_sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of similar length, longest first, so that memory runs out early."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.no_grad()
def sequence_log_probs(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    pad_id: int = 0,
    batch_size: int = 32,
) -> list[list[float]]:
    r"""Log pi(y_t | x, y_<t) of every completion token, in eval mode and without graph.

    Args:
        model: Any causal language model whose forward takes ``logits_to_keep``.
        prompts: Token ids, one prompt per completion, none empty.
        completions: Token ids, none empty.
        temperature: Divides the logits; 0 counts as 1.
        pad_id: Fills short rows; any valid id does, for it is masked.
        batch_size: Rows per forward pass.

    Returns:
        One list per completion, one number per token.
    """
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    device = next(model.parameters()).device
    results: list[list[float]] = [[] for _ in rows]
    with evaluation_mode(model):
        for batch in length_sorted_batches([len(row) for row in rows], batch_size):
            widths = [len(completions[row]) for row in batch]
            padded = left_pad([rows[row] for row in batch], pad_id=pad_id, device=device)
            scores = token_log_probs(
                model,
                padded.input_ids,
                padded.attention_mask,
                padded.attention_mask,
                keep=max(widths),
                temperature=temperature or 1.0,
            ).log_probs.tolist()
            for row, width, score in zip(batch, widths, scores, strict=True):
                results[row] = score[-width:]
    return results
