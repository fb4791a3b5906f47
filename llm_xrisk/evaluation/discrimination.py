"""How well a policy's scores tell gold answers from sampled ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from llm_xrisk.data.collators import pad_rows
from llm_xrisk.models import token_log_probs
from llm_xrisk.rollout.scoring import evaluation_mode


def auc_per_prompt(
    model: nn.Module,
    rows: Sequence[Any],
    *,
    pad_token_id: int,
    mean_over_tokens: bool = False,
    batch_size: int = 256,
) -> list[float]:
    """Share of a prompt's negatives that the gold answer outscores; a tie counts half.

    Args:
        model: The policy.
        rows: Rows with ``prompt_ids``, ``completion_ids`` and ``negative_ids``, none empty.
        pad_token_id: Fills the padding.
        mean_over_tokens: Score by the mean log-likelihood of the tokens instead of the sum.
        batch_size: Completions scored at once.

    Returns:
        One AUC per prompt, in the order of the rows.
    """
    jobs = [
        (row["prompt_ids"], ids)
        for row in rows
        for ids in (row["completion_ids"], *row["negative_ids"])
    ]
    device = next(model.parameters()).device
    scores: list[float] = []
    with torch.no_grad(), evaluation_mode(model):
        for start in range(0, len(jobs), batch_size):
            prompts, completions = zip(*jobs[start : start + batch_size], strict=True)
            batch = pad_rows(prompts, completions, pad_token_id=pad_token_id)
            keep = batch.pop("keep")
            tokens = token_log_probs(
                model, **{k: v.to(device) for k, v in batch.items()}, keep=keep
            )
            total = tokens.log_probs.sum(-1)
            scores += (total / tokens.mask.sum(-1) if mean_over_tokens else total).tolist()
    sizes = [1 + len(row["negative_ids"]) for row in rows]
    groups = np.split(np.asarray(scores), np.cumsum(sizes)[:-1])
    return [float(np.mean((g[0] > g[1:]) + 0.5 * (g[0] == g[1:]))) for g in groups]
