"""What all state keyed by sample has in common: its size, its dtype, its errors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llm_xrisk.fcco.arguments import INTEGERS, shown
from llm_xrisk.fcco.groups import distinct, readable, slots


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


class Keys:
    """Keys of rows, looked at once however many averages and duals are read and written by them.

    State takes a tensor as well and makes its own keys of it.

    Args:
        index: (B,) integers.
        below: Where they are already known to lie in [0, below).

    Attributes:
        index: (B,) the keys.
        distinct: Whether no two of them are known to be equal.
        slots: (B,) equal keys numbered alike, 0 <= slot < B.

    Example:
        >>> keys = Keys(torch.tensor([70, 30, 70]))
        >>> keys.distinct, keys.slots
        (False, tensor([1, 0, 1]))
    """

    def __init__(self, index: Tensor, below: int | None = None) -> None:
        self.index, self.below = index, below
        # not cached_property: its lock cannot be compiled
        self._distinct: bool | None = None
        self._slots: Tensor | None = None

    @classmethod
    def of(cls, index: "Tensor | Keys") -> "Keys":
        """``index`` itself if it is one, else the keys made of it."""
        return index if isinstance(index, Keys) else cls(index)

    @classmethod
    def each(cls, count: int, device: torch.device | None = None) -> "Keys":
        """The keys 0 to count - 1, each once."""
        keys = cls(torch.arange(count, device=device), below=count)
        keys._distinct = True
        return keys

    @property
    def distinct(self) -> bool:
        """Whether no two keys are equal; False where finding out would wait."""
        if self._distinct is None:
            self._distinct = distinct(self.index)
        return self._distinct

    @property
    def slots(self) -> Tensor:
        """(B,) number of each key among the different ones."""
        if self._slots is None:
            self._slots = slots(self.index)
        return self._slots

    def check(self, num_keys: int) -> None:
        """Check them on the CPU; elsewhere, and in compiled code, this does nothing.

        Raises:
            IndexError: a key outside [0, num_keys).
        """
        if self.below is not None and self.below <= num_keys:
            return
        if readable(self.index):
            check_index(self.index, num_keys)
            self.below = num_keys


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

    def check(self, index: Tensor | Keys) -> Keys:
        """Check an index on the CPU; elsewhere, and in compiled code, it is taken as it is.

        Returns:
            The keys that it is or that are made of it.

        Raises:
            IndexError: an entry outside [0, n L).
        """
        keys = Keys.of(index)
        if not isinstance(keys.index, Tensor) or keys.index.dtype not in INTEGERS:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"index must be a tensor of integers, sample ids from 0 up, got {shown(keys.index)}"
            )
        keys.check(self.num_keys)
        return keys

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
            "build the objective with num_samples=len(train_dataset) and number the rows 0..n-1; "
            "of rows left over from a larger data set it is their largest index + 1"
        )
