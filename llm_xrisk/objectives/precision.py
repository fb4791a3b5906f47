"""The precision that objectives compute in: not that of autocast, and float32 at least."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def unified(rows: Tensor, wide: torch.dtype) -> Tensor:
    """``rows`` in one of few types, on each rank alike: int64, or ``wide`` or wider."""
    if not rows.is_floating_point():
        return rows.long()
    return rows if rows.dtype == wide else rows.to(torch.promote_types(rows.dtype, wide))


def without_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of an objective that computes in the precision of its rows, whatever is on."""

    @wraps(method)
    def run(self: Any, scores: Tensor, *args: Any, **kwargs: Any) -> Any:
        device = scores.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return method(self, scores, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return method(self, scores, *args, **kwargs)

    return run
