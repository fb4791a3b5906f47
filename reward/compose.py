# SPDX-License-Identifier: Apache-2.0
"""Reward functions made of reward functions: a weighted sum, a gate, one function per data source.

What comes out has TRL's signature again, a `__name__`, and pickles if its parts do. Within one call
no part runs twice, however often it is named.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from reward.base import LogExtra, LogMetric

RewardFunction = Callable[..., Any]
"""`f(prompts, completions, completion_ids, **columns) -> list[float | None]`, plain or async."""

_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_UNSET = object()  # a row of an extra column that nobody wrote; None is a value


@dataclass(frozen=True)
class _Column:
    """A column that one function logged; `_UNSET` where it did not see the row."""

    function: RewardFunction
    name: str
    values: list


@dataclass(frozen=True)
class _Answer:
    """What one function returned and logged for one batch."""

    function: RewardFunction  # held, so that its id stays its own
    rewards: list[float | None]
    metrics: list[tuple[str, float]]
    extra: list[_Column]


@dataclass
class RewardBatch:
    """The rows of one call, and what the functions said of them.

    Args:
        prompts: One prompt per row.
        completions: One completion per row, plain or conversational.
        completion_ids: Token ids per row, if known.
        trainer_state: Handed on as it is.
        columns: Data set columns; lists have one entry per row, anything else is handed on.
    """

    prompts: Sequence[object]
    completions: Sequence[object]
    completion_ids: Sequence[Sequence[int]] | None
    trainer_state: object
    columns: dict[str, Any]
    _is_quiet: bool = False
    _answers: dict[int, _Answer] = field(default_factory=dict)
    _parts: "dict[tuple[int, ...], RewardBatch]" = field(default_factory=dict)
    _shown: set[int] = field(default_factory=set)
    _metrics: list[tuple[str, float]] = field(default_factory=list)
    _extra: list[_Column] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse lists that cannot be rows."""
        rows = len(self.completions)
        lists = {"prompts": self.prompts, "completion_ids": self.completion_ids, **self.columns}
        wrong = {
            name: len(values)
            for name, values in lists.items()
            if _is_per_row(values) and len(values) != rows
        }
        if wrong:
            raise ValueError(
                f"got {rows} completions and other lengths in {wrong}; need one entry per "
                "completion: repeat the columns of a prompt for each of its completions"
            )

    def rewards(self, function: RewardFunction, *, log: bool = True) -> list[float | None]:
        """Return what a function says of every row; it is called at most once per batch.

        Args:
            function: A reward function, composed or not.
            log: Whether what it logs is reported; once is enough, and it is reported once.

        Returns:
            One reward per row, each finite or None.

        Raises:
            ValueError: It returned another number of rewards, or one that is not finite.
            TypeError: It returned something else than a list of rewards.
        """
        if isinstance(function, ComposedReward):
            values = function.combine(self if log else self._quiet())
            return checked_rewards(function, values, len(self.completions))
        key = id(function)
        if key not in self._answers:
            self._answers[key] = self._call(function)
        answer = self._answers[key]
        if log and key not in self._shown:
            self._shown.add(key)
            self._report(answer.metrics, answer.extra)
        return list(answer.rewards)

    def rewards_of_rows(self, function: RewardFunction, rows: Sequence[int]) -> list[float | None]:
        """Return what a function says of some rows, which are all it gets to see.

        Args:
            function: A reward function, composed or not.
            rows: Positions in this batch. What is logged for them is logged with `None` elsewhere.

        Returns:
            One reward for each of the given rows, in their order.
        """
        key = tuple(rows)
        if key not in self._parts:
            self._parts[key] = self._pick(key)
        part = self._parts[key]._quiet() if self._is_quiet else self._parts[key]
        rewards = part.rewards(function)
        spread: list[_Column] = []
        for column in part._extra:
            values: list = [_UNSET] * len(self.completions)
            for row, value in zip(rows, column.values, strict=True):
                values[row] = value
            spread.append(_Column(column.function, column.name, values))
        self._report(part._metrics, spread)
        part._metrics, part._extra = [], []  # reported once
        return rewards

    def flush(self, log_metric: LogMetric | None, log_extra: LogExtra | None) -> None:
        """Hand the collected metrics and full columns to the callbacks that there are."""
        if log_metric is not None:
            for metric, value in self._metrics:
                log_metric(metric, value)
        if log_extra is None:
            return
        table: dict[str, list] = {}
        for column in self._extra:
            name, known = column.name, table.get(column.name)
            if known is not None and _overlap(known, column.values):  # both stay to be read
                name, known = f"{name_of(column.function)}/{name}", None
            table[name] = column.values if known is None else _filled(known, column.values)
        for name, values in table.items():
            log_extra(name, [None if value is _UNSET else value for value in values])

    def _quiet(self) -> "RewardBatch":
        """Return the same rows with the same memory, where what is logged goes nowhere."""
        given = self.prompts, self.completions, self.completion_ids, self.trainer_state
        return RewardBatch(*given, self.columns, True, self._answers, self._parts)

    def _pick(self, rows: Sequence[int]) -> "RewardBatch":
        def pick(values: Any) -> list:
            return [values[row] for row in rows]

        return RewardBatch(
            pick(self.prompts),
            pick(self.completions),
            None if self.completion_ids is None else pick(self.completion_ids),
            self.trainer_state,
            {k: pick(v) if _is_per_row(v) else v for k, v in self.columns.items()},
        )

    def _call(self, function: RewardFunction) -> _Answer:
        name, rows = name_of(function), len(self.completions)
        metrics: list[tuple[str, float]] = []
        extra: list[_Column] = []

        def log_extra(column: str, values: list) -> None:
            if len(values) != rows:
                raise ValueError(
                    f"{name} logged {len(values)} values in the column {column!r} for {rows} "
                    "completions; it must log one per completion"
                )
            extra.append(_Column(function, column, list(values)))

        values = function(
            prompts=self.prompts,
            completions=self.completions,
            completion_ids=self.completion_ids,
            trainer_state=self.trainer_state,
            log_extra=log_extra,
            log_metric=lambda metric, value: metrics.append((metric, value)),
            **self.columns,
        )
        values = _wait_for(values, name) if inspect.iscoroutine(values) else values
        return _Answer(function, checked_rewards(function, values, rows), metrics, extra)

    def _report(self, metrics: Iterable[tuple[str, float]], extra: Iterable[_Column]) -> None:
        self._metrics += metrics
        for new in extra:
            same = [c for c in self._extra if c.function is new.function and c.name == new.name]
            if same:  # the function saw some rows here and others, or all, there
                same[0].values[:] = _filled(same[0].values, new.values)
            else:
                self._extra.append(_Column(new.function, new.name, list(new.values)))


class ComposedReward(ABC):
    """A reward function that combines others; subclasses say how in :meth:`combine`.

    Its signature, as `inspect.signature` sees it, asks for the columns that its parts ask for.

    Args:
        name: What TRL logs the rewards under.
        parts: The functions it is made of.
    """

    def __init__(self, name: str, parts: Sequence[RewardFunction]) -> None:
        for part in parts:
            if not callable(part):
                raise TypeError(
                    f"got {part!r} as a part of {name}, need a function f(prompts, completions, "
                    "**columns) -> list[float | None]"
                )
        self.__name__ = self.__qualname__ = name
        self.__signature__ = _joined_signature(parts, also=self.own_columns())

    @abstractmethod
    def combine(self, batch: RewardBatch) -> list[float | None]:
        """Return one reward per row, from what `batch.rewards(function)` returns.

        Args:
            batch: The rows.
        """

    def own_columns(self) -> tuple[str, ...]:
        """Return the columns it reads itself."""
        return ()

    def __call__(
        self,
        prompts: Sequence[object],
        completions: Sequence[object],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        trainer_state: object = None,
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Reward a batch (TRL's reward signature).

        Args:
            prompts: Prompts, one per completion.
            completions: Strings, or lists of messages.
            completion_ids: Their token ids, for parts that count tokens.
            trainer_state: Handed to the parts.
            log_extra: Receives what the parts log; a column gets one value per completion.
            log_metric: Receives what the parts log.
            columns: Data set columns, handed to the parts.

        Returns:
            One reward per completion, in order.

        Raises:
            ValueError: If lists differ in length, or a part returns a list of another length; the
                message names it.
        """
        batch = RewardBatch(prompts, completions, completion_ids, trainer_state, columns)
        if not len(completions):
            return []
        rewards = batch.rewards(self)
        batch.flush(log_metric, log_extra)
        return rewards


class WeightedSum(ComposedReward):
    r"""The sum of several rewards, each times its weight.

    A part that says `None` for a row is left out of that row's sum, as TRL does it; a row for which
    every part says `None` stays `None`, and is not 0.

    Args:
        terms: Pairs of a reward function and its weight.
        name: Name of the whole.

    Raises:
        ValueError: If there are no terms, or a weight is not finite.

    Example:
        >>> from reward.arithmetic import arithmetic_reward
        >>> from reward.format import boxed_once
        >>> total = WeightedSum([(arithmetic_reward, 1.0), (boxed_once, 0.5)])
        >>> total(["1+1=", "1+1="], ["2", r"\boxed{3}"], answer=["2", "2"])
        [1.0, 0.5]
    """

    def __init__(
        self, terms: Sequence[tuple[RewardFunction, float]], *, name: str = "weighted_sum"
    ) -> None:
        wrong = [weight for _, weight in terms if not isfinite(weight)]
        if wrong or not terms:
            raise ValueError(
                f"got {len(terms)} terms with the weights {[w for _, w in terms]}; need at least "
                "one reward function, and finite weights"
            )
        super().__init__(name, [function for function, _ in terms])
        self.terms = tuple(terms)

    def combine(self, batch: RewardBatch) -> list[float | None]:
        """Return the weighted sum of what is not None, row by row."""
        columns = [[(r, w) for r in batch.rewards(f)] for f, w in self.terms]
        graded = [[(r, w) for r, w in row if r is not None] for row in zip(*columns, strict=True)]
        return [sum(r * w for r, w in row) if row else None for row in graded]


class Gate(ComposedReward):
    """A reward that is paid only where another one is high enough.

    `Gate(format, when=accuracy)`: format pays only when the answer is right, so that it cannot be
    earned instead of an answer. `Gate(accuracy, when=format)`: an answer counts only in the right
    form. A row for which either says `None` is `None`, gate open or shut: whether a row counts must
    not depend on what the policy writes.

    Both functions see all rows. Only what `function` logs is reported unless `log_condition` is
    set: a trainer that is given the condition itself too would get its columns twice. In a
    :class:`WeightedSum` the two are one and the same call.

    Args:
        function: The reward to pay.
        when: The condition, a reward function.
        minimum: The gate is open where the condition is at least this.
        otherwise: What a row gets where the gate is shut.
        log_condition: Whether what the condition logs is reported too.
        name: Name of the whole; by default made of the two names.

    Example:
        >>> from reward.arithmetic import arithmetic_reward
        >>> from reward.length import soft_overlong
        >>> gate = Gate(soft_overlong(2, 1), when=arithmetic_reward)
        >>> gate(["1+1="] * 2, ["2", "3"], [[7, 7, 7], [7, 7, 7]], answer=["2", "2"])
        [-1.0, 0.0]
    """

    def __init__(
        self,
        function: RewardFunction,
        *,
        when: RewardFunction,
        minimum: float = 1.0,
        otherwise: float = 0.0,
        log_condition: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name or f"{name_of(function)}_if_{name_of(when)}", [function, when])
        if not (isfinite(minimum) and isfinite(otherwise)):
            raise ValueError(f"minimum and otherwise must be finite, got {minimum} and {otherwise}")
        self.function, self.when = function, when
        self.minimum, self.otherwise, self.log_condition = minimum, otherwise, log_condition

    def combine(self, batch: RewardBatch) -> list[float | None]:
        """Return the reward where the condition holds."""
        conditions = batch.rewards(self.when, log=self.log_condition)
        rewards = batch.rewards(self.function)
        return [
            None
            if reward is None or condition is None
            else (reward if condition >= self.minimum else self.otherwise)
            for reward, condition in zip(rewards, conditions, strict=True)
        ]


class ByDataSource(ComposedReward):
    r"""One reward function per data source, chosen row by row by a column.

    Each function is called once, with the rows of all its sources and no others, in their order;
    nothing that one source's rows hold can reach the reward of another's. The columns it logs are
    filled with `None` for the rows it did not see.

    Args:
        functions: Reward function by the name of the source.
        column: The column that names the source.
        default: Function for all other sources; without one they are an error.
        name: Name of the whole.

    Raises:
        ValueError: When called, if the column is missing or names an unknown source.

    Example:
        >>> from reward.arithmetic import arithmetic_reward
        >>> from reward.format import boxed_once
        >>> graded = ByDataSource({"sums": arithmetic_reward, "form": boxed_once})
        >>> rows = {"answer": ["2", None], "data_source": ["sums", "form"]}
        >>> graded(["1+1=", "Box it."], ["2", r"\boxed{it}"], **rows)
        [1.0, 1.0]
    """

    def __init__(
        self,
        functions: Mapping[str, RewardFunction],
        *,
        column: str = "data_source",
        default: RewardFunction | None = None,
        name: str = "by_data_source",
    ) -> None:
        if not functions and default is None:
            raise ValueError("got no reward functions; need one for each data source, or a default")
        self.functions, self.column, self.default = dict(functions), column, default
        parts = [*functions.values(), *([] if default is None else [default])]
        super().__init__(name, parts)

    def own_columns(self) -> tuple[str, ...]:
        """Return the column of the sources."""
        return (self.column,)

    def function_of(self, source: object) -> RewardFunction:
        """Return the function for a source.

        Args:
            source: A value of the column.

        Raises:
            ValueError: If there is none.
        """
        known = self.functions if isinstance(source, str) else {}
        found = known.get(str(source), self.default)
        if found is None:
            raise ValueError(
                f"got the {self.column} {source!r}, and {self.__name__} knows "
                f"{', '.join(sorted(self.functions))}; add a function for it, or a default"
            )
        return found

    def combine(self, batch: RewardBatch) -> list[float | None]:
        """Return every row's reward from the function of its source."""
        if not _is_per_row(batch.columns.get(self.column)):
            raise ValueError(
                f"{self.__name__} needs the column {self.column!r} and got "
                f"{sorted(batch.columns)}; add it to the data set, or name another with column="
            )
        functions = [self.function_of(source) for source in batch.columns[self.column]]
        rows_of: dict[int, list[int]] = {}
        for row, function in enumerate(functions):
            rows_of.setdefault(id(function), []).append(row)
        rewards: list[float | None] = [None] * len(functions)
        for rows in rows_of.values():
            values = batch.rewards_of_rows(functions[rows[0]], rows)
            for row, value in zip(rows, values, strict=True):
                rewards[row] = value
        return rewards


def name_of(function: RewardFunction) -> str:
    """Return the name of a reward function, or that of its class.

    Example:
        >>> name_of(WeightedSum([(len, 1.0)], name="mine"))
        'mine'
    """
    return getattr(function, "__name__", type(function).__name__)


def checked_rewards(function: RewardFunction, values: Any, rows: int) -> list[float | None]:
    """Return what a function returned as a list of finite numbers and `None`.

    Args:
        function: The function, for its name.
        values: What it returned.
        rows: How many rows it was given.

    Raises:
        ValueError: If the number of rewards is another one, or a reward is not finite.
        TypeError: If it is no list, or holds something that is no number.

    Example:
        >>> checked_rewards(len, [1, None], 2)
        [1.0, None]
    """
    if not _is_per_row(values):
        raise TypeError(
            f"{name_of(function)} returned {type(values).__name__}; it must return a list with one "
            "reward per completion"
        )
    if len(values) != rows:
        raise ValueError(
            f"{name_of(function)} returned {len(values)} rewards for {rows} completions; it must "
            "return one per completion, None where a row cannot be graded"
        )
    rewards = [None if value is None else float(value) for value in values]
    for row, reward in enumerate(rewards):
        if reward is not None and not isfinite(reward):
            raise ValueError(
                f"{name_of(function)} returned {reward} for row {row}; need a finite number, or "
                "None where a row cannot be graded"
            )
    return rewards


def _overlap(a: Sequence[object], b: Sequence[object]) -> bool:
    return any(x is not _UNSET and y is not _UNSET for x, y in zip(a, b, strict=True))


def _filled(a: Sequence[object], b: Sequence[object]) -> list:
    return [y if x is _UNSET else x for x, y in zip(a, b, strict=True)]


def _is_per_row(values: object) -> bool:
    """Whether a value is list-like: lists, tuples and arrays, but no text and no mapping."""
    if isinstance(values, str | bytes | Mapping):
        return False
    return hasattr(values, "__len__") and hasattr(values, "__getitem__")


def _wait_for(coroutine: Any, name: str) -> Any:
    import asyncio  # not at the top: every worker imports this package

    try:
        asyncio.get_running_loop()
    except RuntimeError:  # the usual case: no loop runs in this thread
        return asyncio.run(coroutine)
    coroutine.close()
    raise RuntimeError(
        f"{name} is async and a composed reward waits for it, which a thread with a running event "
        "loop cannot do; call the composed reward with asyncio.to_thread"
    )


def _joined_signature(parts: Sequence[RewardFunction], also: Sequence[str]) -> inspect.Signature:
    """Return TRL's signature with the columns that the parts cannot do without."""
    needed = dict.fromkeys(also)
    for part in parts:
        try:
            parameters = inspect.signature(part).parameters.values()
        except ValueError:  # builtins may have none
            continue
        needed |= dict.fromkeys(
            p.name
            for p in parameters
            if p.default is p.empty
            and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            and p.name not in _GIVEN
        )
    make, kind = inspect.Parameter, inspect.Parameter
    given = [make(n, kind.POSITIONAL_OR_KEYWORD) for n in _GIVEN[:2]]
    given += [make(_GIVEN[2], kind.POSITIONAL_OR_KEYWORD, default=None)]
    given += [make(n, kind.KEYWORD_ONLY) for n in needed]
    given += [make(n, kind.KEYWORD_ONLY, default=None) for n in _GIVEN[3:]]
    return inspect.Signature([*given, make("columns", kind.VAR_KEYWORD)])
