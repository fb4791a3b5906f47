# SPDX-License-Identifier: Apache-2.0
"""The typed answer of a verifier: what it decided, why, and what that cost."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

Status = Literal[
    "correct",
    "wrong",
    "no_answer",
    "gold_unparsable",
    "timeout",
    "crash",
    "oom",
    "too_long",
    "truncated",
    "unavailable",
]
"""How a verification ended; every status but the two of `UNGRADABLE` carries a score."""

STATUSES: tuple[Status, ...] = get_args(Status)
UNGRADABLE: frozenset[Status] = frozenset({"gold_unparsable", "unavailable"})


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one completion.

    A completion that is bad, slow, hostile or absent scores 0.0. Only a gold answer that cannot be
    read, or a verifier that cannot run, leaves the score at `None`: a policy must never be able to
    earn "not graded" by what it writes.

    Args:
        score: Reward, finite; `None` exactly when `status` is in `UNGRADABLE`.
        status: How the verification ended, one of `STATUSES`.
        extracted: The answer as the verifier read it, `None` if it found none.
        detail: One line for a person: the rule that decided, or what was wrong with the input.
        seconds: Wall time of this verification.

    Raises:
        ValueError: If the status is unknown, or score and status contradict each other.

    Example:
        >>> Verdict(1.0, "correct", extracted="24").score
        1.0
    """

    score: float | None
    status: Status
    extracted: str | None = None
    detail: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        """Refuse combinations that no verifier may return."""
        if self.status not in STATUSES:
            raise ValueError(f"unknown status {self.status!r}; use one of {', '.join(STATUSES)}")
        if (self.score is None) != (self.status in UNGRADABLE):
            raise ValueError(
                f"status {self.status!r} with score {self.score!r}: the score is None for "
                f"{', '.join(sorted(UNGRADABLE))} and a number for every other status; fix the pair"
            )
        if self.score is not None and not isfinite(self.score):
            raise ValueError(f"score must be finite, got {self.score!r}; return 0.0 for bad input")
        if self.status == "correct" and self.score == 0.0:
            raise ValueError(
                "status 'correct' with score 0.0; use status 'wrong' or a higher score"
            )
