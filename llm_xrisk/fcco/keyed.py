"""What all state keyed by sample has in common: its size, its dtype, its errors."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from llm_xrisk.fcco.groups import readable


class KeyedState(nn.Module):
    """Buffers whose first dimension counts samples, and which keep their dtype.

    ``.to(dtype)`` moves them to a device and never casts them: in bfloat16 an average with a
    small gamma does not move. A checkpoint of another number of samples is refused.

    Args:
        num_samples: n, the number of keys.

    Raises:
        ValueError: num_samples < 1.
    """

    def __init__(self, num_samples: int) -> None:
        super().__init__()
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}: pass len(data)")
        self.num_samples = num_samples

    def check(self, index: Tensor) -> None:
        """Check an index on the CPU; elsewhere, and in compiled code, this does nothing.

        Raises:
            IndexError: an entry outside [0, num_samples).
        """
        if readable(index):
            check_index(index, self.num_samples)

    def _apply(self, fn: Any, recurse: bool = True) -> "KeyedState":
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType]
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:  # follow the device, never the dtype
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in self._buffers:
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape[0] != self.num_samples:
                raise ValueError(
                    f"the checkpoint tracks num_samples={saved.shape[0]}, this objective has "
                    f"num_samples={self.num_samples}; resume with the dataset the run started "
                    "with, or start a new run from the model's weights"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # pyright: ignore


def check_index(index: Tensor, num_samples: int) -> None:
    """Refuse entries outside [0, num_samples), reading them on the host.

    Raises:
        IndexError: such an entry, with what to do.
    """
    if index.numel() == 0:
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= num_samples:
        raise IndexError(
            f"index {low if low < 0 else high} is out of range for num_samples={num_samples}; "
            "build the objective with num_samples=len(train_dataset) and number the rows 0..n-1"
        )
