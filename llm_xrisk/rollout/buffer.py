"""Scored completions that wait for their optimizer steps, and how they survive a restart."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor


@dataclass
class RolloutBuffer:
    """Rows of one rollout in the order they will be trained on, one list entry per row.

    Attributes:
        prompt_ids: Token ids.
        completion_ids: Token ids.
        old_log_probs: The trainer's own log-probs of the completion under the policy that
            generated it.
        targets: 1.0 right, 0.0 wrong.
        group: Number of the question's rollout, unique over processes and time.
        steps: Optimizer steps taken since the completions were generated.
    """

    prompt_ids: list[list[int]] = field(default_factory=list[list[int]])
    completion_ids: list[list[int]] = field(default_factory=list[list[int]])
    old_log_probs: list[list[float]] = field(default_factory=list[list[float]])
    targets: list[float] = field(default_factory=list[float])
    group: list[int] = field(default_factory=list[int])
    steps: int = 0

    def __len__(self) -> int:
        return len(self.completion_ids)

    def __add__(self, other: "RolloutBuffer") -> "RolloutBuffer":
        """The rows of both, one after the other."""
        return RolloutBuffer(**{n: getattr(self, n) + getattr(other, n) for n in _LISTS})

    def pick(self, numbers: Sequence[int]) -> "RolloutBuffer":
        """The rows of these numbers, in this order."""
        picked: dict[str, Any] = {n: [getattr(self, n)[k] for k in numbers] for n in _LISTS}
        return RolloutBuffer(**picked)

    def signal(self, num_generations: int) -> list[bool]:
        """Which questions have right and wrong answers, question by question."""
        groups = range(0, len(self), num_generations)
        right = [sum(self.targets[start : start + num_generations]) for start in groups]
        return [0 < count < num_generations for count in right]

    def take(self, rows: int) -> "RolloutBuffer":
        """Remove and return the first ``rows`` rows; counts one optimizer step.

        Example:
            >>> buffer = RolloutBuffer([[1], [1]], [[2], [3]], [[-1.0], [-2.0]], [1.0, 0.0], [4, 4])
            >>> buffer.take(1).completion_ids, buffer.completion_ids
            ([[2]], [[3]])
        """
        taken = RolloutBuffer(**{n: getattr(self, n)[:rows] for n in _LISTS}, steps=self.steps)
        for name in _LISTS:
            del getattr(self, name)[:rows]
        self.steps += 1
        return taken

    def state(self) -> dict[str, Tensor]:
        """The rows as tensors, for a safetensors file."""
        return {
            **_ragged("prompt_ids", self.prompt_ids, torch.long),
            **_ragged("completion_ids", self.completion_ids, torch.long),
            **_ragged("old_log_probs", self.old_log_probs, torch.float64),
            "targets": torch.tensor(self.targets, dtype=torch.float64),
            "group": torch.tensor(self.group, dtype=torch.long),
            "steps": torch.tensor([self.steps]),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "RolloutBuffer":
        """The inverse of :meth:`state`, exact to the bit."""
        return cls(
            prompt_ids=_rows(state, "prompt_ids"),
            completion_ids=_rows(state, "completion_ids"),
            old_log_probs=_rows(state, "old_log_probs"),
            targets=state["targets"].tolist(),
            group=state["group"].tolist(),
            steps=int(state["steps"]),
        )


_LISTS = [f.name for f in fields(RolloutBuffer) if f.name != "steps"]


def _ragged(name: str, rows: Sequence[Sequence[float]], dtype: torch.dtype) -> dict[str, Tensor]:
    flat = torch.tensor([value for row in rows for value in row], dtype=dtype)
    return {
        name: flat,
        f"{name}.lengths": torch.tensor([len(row) for row in rows], dtype=torch.long),
    }


def _rows(state: dict[str, Tensor], name: str) -> list[list]:
    return [part.tolist() for part in state[name].split(state[f"{name}.lengths"].tolist())]
