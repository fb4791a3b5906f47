"""What all state keyed by sample has in common: its size, its dtype, its errors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llm_xrisk.fcco.groups import readable


class KeepsDtype(nn.Module):
    """A module whose own buffers and parameters follow the device and never change their dtype.

    ``.to(bfloat16)`` and ``.half()`` are meant for the model: an average with a small gamma does
    not move in bfloat16, and neither does a dual with a small step.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> "KeepsDtype":
        buffers = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        weights = {name: w.data for name, w in self._parameters.items() if w is not None}
        super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType]
        for name, old in buffers.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        for name, old in weights.items():
            weight = self._parameters[name]
            if weight is not None and weight.dtype != old.dtype:
                weight.data = old.to(weight.device)
        return self


class KeyedState(KeepsDtype):
    """Buffers whose first dimension counts samples (times labels), and which keep their dtype.

    ``.to(dtype)`` moves them to a device and never casts them: in bfloat16 an average with a
    small gamma does not move. A checkpoint of another number of samples is refused.

    Args:
        num_samples: n, the number of samples.
        num_labels: L, keys for each sample, 1 by default; label l of sample i has the key i L + l.

    Raises:
        ValueError: num_samples or num_labels < 1.
    """

    def __init__(self, num_samples: int, num_labels: int | None = None) -> None:
        super().__init__()
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}: pass len(data)")
        if num_labels is not None and num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {num_labels}: targets' columns")
        self.num_samples, self.num_labels = num_samples, num_labels or 1

    @property
    def num_keys(self) -> int:
        """Rows of the state, n L."""
        return self.num_samples * self.num_labels

    def check(self, index: Tensor) -> None:
        """Check an index on the CPU; elsewhere, and in compiled code, this does nothing.

        Raises:
            IndexError: an entry outside [0, n L).
        """
        if readable(index):
            check_index(index, self.num_keys)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in self._buffers:
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape[0] != self.num_keys:
                labels = f" of {self.num_labels} labels" if self.num_labels > 1 else ""
                raise ValueError(
                    f"the checkpoint tracks num_samples={saved.shape[0] / self.num_labels:g}"
                    f"{labels}, this objective has num_samples={self.num_samples}; resume with "
                    "the dataset the run started with, or start a new run from the model's weights"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # pyright: ignore


def kept(values: Tensor) -> Tensor:
    """``values`` read from a state that is written in the same forward pass, for its gradient.

    Compiled code would read them again in the backward pass, where the state is a later one:
    https://github.com/pytorch/pytorch/pull/197039. It keeps the results of sums along a
    dimension instead, this one of size 1. In eager code the values come back as they are.

    Example:
        >>> kept(torch.tensor([1.0, 3.0]))
        tensor([1., 3.])
    """
    if not torch.compiler.is_compiling():
        return values
    return values.unsqueeze(-1).cumsum(-1).squeeze(-1)


def check_index(index: Tensor, num_samples: int) -> None:
    """Refuse entries outside [0, num_samples), reading them on the host.

    Raises:
        IndexError: such an entry, with what to do.
    """
    if index.numel() == 0:
        return
    smallest, largest = torch.aminmax(index)
    low, high = int(smallest), int(largest)
    if low < 0 or high >= num_samples:
        raise IndexError(
            f"index {low if low < 0 else high} is out of range for num_samples={num_samples}; "
            "build the objective with num_samples=len(train_dataset) and number the rows 0..n-1"
        )
