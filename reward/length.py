# SPDX-License-Identifier: Apache-2.0
"""Rewards by the length of a completion in tokens, and by how much it repeats itself.

All three count `completion_ids`, so they do not depend on how text is split into words. They are
not binary: keep them out of the sum that says right and wrong, or give the trainer a threshold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, isfinite, pi

from reward.compose import ComposedReward, RewardBatch, RewardFunction, name_of


def soft_overlong(max_length: int, cache: int) -> "SoftOverlong":
    r"""Punish completions that come close to the length limit (DAPO, arXiv 2503.14476, eq. 13).

    .. math:: R(y) = \min(0, \max(-1, (L_{\max} - L_{cache} - |y|) / L_{cache}))

    and -1 beyond :math:`L_{\max}` where the cache is 0. Equal to TRL's
    `get_soft_overlong_punishment`, which does not check its arguments.

    Args:
        max_length: L_max, in tokens, at least 1.
        cache: L_cache, the length of the ramp that ends at L_max, 0 <= cache <= max_length.

    Returns:
        A reward function named `soft_overlong`.

    Example:
        >>> soft_overlong(100, 20)(["p"] * 3, ["c"] * 3, [[1] * 80, [1] * 90, [1] * 101])
        [0.0, -0.5, -1.0]
    """
    return SoftOverlong(max_length, cache)


def repetition(ngram_size: int = 3, max_penalty: float = -1.0) -> "Repetition":
    r"""Punish repeated n-grams of tokens (arXiv 2502.03373, appendix C.2).

    .. math:: R(y) = (1 - \#\text{distinct n-grams} / \#\text{n-grams}) \cdot p

    Equal to TRL's `get_repetition_penalty_reward`. A completion with fewer than n tokens gets 0.

    Args:
        ngram_size: n, at least 1.
        max_penalty: p <= 0, what a completion of one n-gram only tends to.

    Returns:
        A reward function named `repetition`.

    Example:
        >>> repetition(2)(["p", "p"], ["c", "c"], [[1, 2, 3, 4], [5, 5, 5, 5, 5]])
        [0.0, -0.75]
    """
    return Repetition(ngram_size, max_penalty)


def cosine_length(
    correct: RewardFunction,
    max_length: int,
    *,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    minimum: float = 1.0,
) -> "CosineLength":
    r"""Scale right and wrong by length along a cosine (arXiv 2502.03373, appendix C.1).

    .. math:: R(y) = a + (b - a) (1 + \cos(\pi \min(1, |y| / L_{\max}))) / 2

    from b at length 0 to a at :math:`L_{\max}`: from `max_value_correct` down to
    `min_value_correct` for a right answer, from `min_value_wrong` up to `max_value_wrong` for a
    wrong one, so that a short right answer is best and a short wrong one worst.

    TRL's `get_cosine_scaled_reward` with the verifier as an argument, where TRL has its own built
    in. open-r1 counts characters and does not stop the cosine at L_max: beyond it, a longer right
    answer is paid more again.

    Args:
        correct: A reward function that says what is right; `None` stays `None`.
        max_length: L_max, in tokens, at least 1.
        min_value_wrong: For a wrong answer of length 0.
        max_value_wrong: For a wrong answer of length L_max and more.
        min_value_correct: For a right answer of length L_max and more.
        max_value_correct: For a right answer of length 0.
        minimum: An answer is right if `correct` gives it at least this.

    Returns:
        A reward function named `cosine_length`, which logs what `correct` logs.

    Example:
        >>> from reward.arithmetic import arithmetic_reward
        >>> reward = cosine_length(arithmetic_reward, 100)
        >>> [round(r, 6) for r in reward(["p", "p"], ["2", "3"], [[1] * 50] * 2, answer=["2", "2"])]
        [0.75, -0.75]
    """
    wrong, right = (min_value_wrong, max_value_wrong), (max_value_correct, min_value_correct)
    return CosineLength(correct, max_length, wrong, right, minimum)


@dataclass(frozen=True)
class SoftOverlong:
    """What :func:`soft_overlong` returns."""

    max_length: int
    cache: int

    def __post_init__(self) -> None:
        """Refuse lengths without a meaning."""
        if self.max_length < 1 or not 0 <= self.cache <= self.max_length:
            raise ValueError(
                f"got max_length={self.max_length} and cache={self.cache}; need "
                "max_length >= 1 and 0 <= cache <= max_length"
            )
        _set_name(self, "soft_overlong")

    def __call__(
        self,
        prompts: Sequence[object],
        completions: Sequence[object],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: object,
    ) -> list[float | None]:
        """Return one reward in [-1, 0] per completion (TRL's reward signature)."""
        return [self._reward(len(ids)) for ids in _tokens(completion_ids, completions, self)]

    def _reward(self, length: int) -> float:
        start = self.max_length - self.cache
        if length <= start:
            return 0.0
        return (start - length) / self.cache if length <= self.max_length else -1.0


@dataclass(frozen=True)
class Repetition:
    """What :func:`repetition` returns."""

    ngram_size: int = 3
    max_penalty: float = -1.0

    def __post_init__(self) -> None:
        """Refuse sizes and penalties without a meaning."""
        if self.ngram_size < 1:
            raise ValueError(f"ngram_size must be at least 1, got {self.ngram_size}")
        if not (isfinite(self.max_penalty) and self.max_penalty <= 0):
            raise ValueError(f"max_penalty must be finite and <= 0, got {self.max_penalty}")
        _set_name(self, "repetition")

    def __call__(
        self,
        prompts: Sequence[object],
        completions: Sequence[object],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: object,
    ) -> list[float | None]:
        """Return one reward in [max_penalty, 0] per completion (TRL's reward signature)."""
        return [self._reward(ids) for ids in _tokens(completion_ids, completions, self)]

    def _reward(self, ids: Sequence[int]) -> float:
        total = len(ids) - self.ngram_size + 1
        if total < 1:
            return 0.0
        shifted = [ids[start : start + total] for start in range(self.ngram_size)]
        repeated = total - len(set(zip(*shifted, strict=True)))
        return repeated / total * self.max_penalty if repeated else 0.0


class CosineLength(ComposedReward):
    """What :func:`cosine_length` returns."""

    def __init__(
        self,
        correct: RewardFunction,
        max_length: int,
        wrong: tuple[float, float],
        right: tuple[float, float],
        minimum: float,
    ) -> None:
        super().__init__("cosine_length", [correct])
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1 token, got {max_length}")
        if not all(map(isfinite, (*wrong, *right, minimum))):
            raise ValueError(f"values must be finite, got {wrong}, {right} and {minimum=}")
        self.correct, self.max_length = correct, max_length
        self.wrong, self.right, self.minimum = wrong, right, minimum

    def combine(self, batch: RewardBatch) -> list[float | None]:
        """Return the scaled rewards; a row that cannot be graded stays so."""
        tokens = _tokens(batch.completion_ids, batch.completions, self)
        return [
            None if score is None else self._reward(score >= self.minimum, len(ids))
            for score, ids in zip(batch.rewards(self.correct), tokens, strict=True)
        ]

    def _reward(self, is_right: bool, length: int) -> float:
        short, long = self.right if is_right else self.wrong
        progress = min(1.0, length / self.max_length)  # beyond L_max a cosine would rise again
        return long + (short - long) * (1 + cos(pi * progress)) / 2


def _tokens(
    completion_ids: Sequence[Sequence[int]] | None,
    completions: Sequence[object],
    function: RewardFunction,
) -> Sequence[Sequence[int]]:
    if completion_ids is None or len(completion_ids) != len(completions):
        got = "none" if completion_ids is None else f"{len(completion_ids)} lists"
        raise ValueError(
            f"{name_of(function)} counts tokens: got {got} of completion_ids for "
            f"{len(completions)} completions; pass the token ids of every completion"
        )
    return completion_ids


def _set_name(function: object, name: str) -> None:
    """Name a frozen instance as a function is named; TRL logs by it."""
    for attribute in ("__name__", "__qualname__"):
        object.__setattr__(function, attribute, name)
