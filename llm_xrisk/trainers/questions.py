"""Which questions come next, and what their answers are worth."""

import asyncio
import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llm_xrisk.data.columns import GIVEN, require_columns

RewardFunction = Callable[..., Any]

logger = logging.getLogger(__name__)


class QuestionStream:
    """An endless stream of data set rows: one permutation after another.

    The position is the whole state, so a run that was stopped goes on where it was.

    Example:
        >>> stream = QuestionStream(rows=3, seed=0)
        >>> sorted(stream.draw(3)), stream.position
        ([0, 1, 2], 3)
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed, self.position = rows, seed, 0
        self._pass, self._order = -1, list[int]()

    def draw(self, count: int) -> list[int]:
        """The next ``count`` row numbers."""
        drawn = [self._at(self.position + k) for k in range(count)]
        self.position += count
        return drawn

    def _at(self, position: int) -> int:
        number, offset = divmod(position, self.rows)
        if number != self._pass:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            self._order = torch.randperm(self.rows, generator=generator).tolist()
            self._pass = number
        return self._order[offset]


@dataclass
class Grades:
    """What a batch of completions is worth.

    Attributes:
        targets: 1.0 right, 0.0 wrong, NaN where the question cannot be graded.
        rewards: Mean over graded completions, by function.
        metrics: What the functions reported through ``log_metric``.
    """

    targets: list[float]
    rewards: dict[str, float] = field(default_factory=dict[str, float])
    metrics: dict[str, float] = field(default_factory=dict[str, float])

    def without_ungradable(self, num_generations: int) -> list[float]:
        """Targets that are numbers: an ungradable question has wrong answers only, so no signal."""
        starts = range(0, len(self.targets), num_generations)
        groups = [self.targets[start : start + num_generations] for start in starts]
        wrong = [0.0] * num_generations
        return [v for g in groups for v in (wrong if any(map(math.isnan, g)) else g)]


class Grader:
    """Calls reward functions with TRL's signature and turns their sum into right and wrong.

    ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``, plain or async;
    data set columns come repeated, one entry per completion. None means that the question cannot
    be graded.

    Args:
        functions: Reward functions.
        weights: One per function, 1 by default.
        threshold: Sums at or above it are right; None requires sums of 0 or 1.
        decode: Token ids to text.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        weights: Sequence[float] | None,
        threshold: float | None,
        decode: Callable[[list[int]], str],
    ) -> None:
        if not functions:
            raise ValueError("reward_funcs is empty; pass at least one verifier")
        for function in functions:
            if not callable(function):
                raise ValueError(
                    f"got {function!r} among reward_funcs, needs functions f(prompts, completions, "
                    "**columns) -> list[float | None]; wrap a reward model in one, and set "
                    "reward_threshold to say from which score on an answer is right"
                )
        if weights is not None and len(weights) != len(functions):
            raise ValueError(f"got {len(weights)} reward_weights for {len(functions)} reward_funcs")
        self.functions = list(functions)
        self.weights = list(weights or [1.0] * len(functions))
        self.threshold, self.decode = threshold, decode

    def check(self, dataset: Any) -> None:
        """Look for columns and gold answers that the functions need, before anything is generated.

        A function may have an attribute ``validate(rows)`` that returns the number of each row
        it cannot grade, with the reason, as ``reward.math_reward`` does. They are warned of.

        Raises:
            ValueError: there are no rows with a prompt, a function asks for a column that the data
                set lacks, or can grade no row.
            TypeError: the rows cannot be counted, as those of a stream.
        """
        if not hasattr(dataset, "__len__"):
            raise TypeError(
                f"got a {type(dataset).__name__}, which has no length; questions are drawn by "
                "their number: load the data without streaming"
            )
        columns = set(dataset[0]) if len(dataset) else set[str]()
        if "prompt" not in columns:
            raise ValueError(
                f"got {len(dataset)} questions with the columns {sorted(columns)}, needs `prompt` "
                '(text or messages): dataset.rename_column("question", "prompt") renames one'
            )
        for function in self.functions:
            require_columns(function, columns)
            _warn_of_ungradable(function, dataset)

    def __call__(
        self,
        rows: Sequence[Mapping[str, Any]],
        completion_ids: list[list[int]],
        finish_reasons: list[str],
        state: Any,
    ) -> Grades:
        """Grade one completion per row; functions also get the column ``finish_reasons``.

        Raises:
            ValueError: a function returned another number of rewards, or they are not binary.
        """
        prompts = [row["prompt"] for row in rows]
        texts: list[Any] = [self.decode(ids) for ids in completion_ids]
        if isinstance(prompts[0], list):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        own = {"prompt", *GIVEN}
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in own}
        grades = Grades([])
        totals = [0.0] * len(rows)
        for function, weight in zip(self.functions, self.weights, strict=True):
            name = _name(function)
            values = function(
                prompts=prompts,
                completions=texts,
                completion_ids=completion_ids,
                finish_reasons=finish_reasons,
                trainer_state=state,
                log_metric=lambda key, value: grades.metrics.__setitem__(str(key), float(value)),
                log_extra=lambda key, value: None,
                **columns,
            )
            values = asyncio.run(values) if inspect.iscoroutine(values) else values
            if len(values) != len(rows):
                raise ValueError(
                    f"{name} returned {len(values)} rewards for {len(rows)} completions; it must "
                    "return one per completion, None where the question cannot be graded"
                )
            known = [math.nan if value is None else float(value) for value in values]
            graded = [value for value in known if not math.isnan(value)]
            grades.rewards[name] = sum(graded) / len(graded) if graded else math.nan
            totals = [total + weight * value for total, value in zip(totals, known, strict=True)]
        grades.targets = [self._binary(total) for total in totals]
        return grades

    def _binary(self, total: float) -> float:
        if math.isnan(total):
            return total
        if self.threshold is not None:
            return float(total >= self.threshold)
        if total not in (0.0, 1.0):
            raise ValueError(
                f"the rewards of a completion sum to {total}; right and wrong need 0 or 1. Set "
                "reward_threshold (for example 0.5), or keep format and length rewards apart"
            )
        return total


def _name(function: RewardFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _warn_of_ungradable(function: RewardFunction, dataset: Any) -> None:
    """Name the rows whose gold answer the function cannot read."""
    validate = getattr(function, "validate", None)
    rows = (dataset[k] for k in range(len(dataset)))  # a map-style data set need not end its iter
    problems: Any = validate(rows) if callable(validate) else []
    if not problems:
        return
    shown = "; ".join(f"row {number}: {reason}" for number, reason in problems[:5])
    text = (
        f"{getattr(function, '__name__', 'a reward function')} cannot grade {len(problems)} of "
        f"{len(dataset)} questions ({shown}{'; ...' if len(problems) > 5 else ''})"
    )
    if len(problems) == len(dataset):
        raise ValueError(f"{text}; every question needs a gold answer it can read")
    logger.warning("%s; they are asked and give no signal: leave them out or mend them", text)
