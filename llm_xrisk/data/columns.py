"""What a data set must hold: rows that can be counted, the columns a reward function asks for."""

import inspect
from collections.abc import Callable, Collection
from typing import Any

GIVEN = {
    *("prompts", "completions", "completion_ids", "finish_reasons"),
    *("trainer_state", "log_metric", "log_extra"),
}


def require_columns(function: Callable[..., Any], columns: Collection[str]) -> None:
    """Look for the columns a reward function cannot do without, before anything is generated.

    Args:
        function: With TRL's signature, ``f(prompts, completions, **columns)``.
        columns: Names of the data set's columns.

    Raises:
        ValueError: the function has a parameter without default that is no column.

    Example:
        >>> require_columns(lambda completions, answer: [], ["prompt", "answer"])
    """
    asked = {
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    missing = sorted(asked - GIVEN - set(columns))
    if missing:
        name = getattr(function, "__name__", type(function).__name__)
        raise ValueError(
            f"{name} asks for {missing} and the data set has the columns {sorted(columns)}; give "
            "every question its gold answer in such a column, or use a reward function that needs "
            "none"
        )


def check_counted(dataset: Any, why: str, need: str) -> None:
    """Refuse a stream, whose rows cannot be counted, and a data set without rows.

    Args:
        dataset: What a trainer was given.
        why: Why its rows must be counted.
        need: What to give instead of nothing.

    Raises:
        TypeError: it has no length.
        ValueError: it has no rows.

    Example:
        >>> check_counted([{"prompt": "1+1="}], "each row has a value", "give prompts")
    """
    if not hasattr(dataset, "__len__"):
        raise TypeError(
            f"got a {type(dataset).__name__}, which has no length; {why}: load the data without "
            "streaming"
        )
    if len(dataset) == 0:
        raise ValueError(f"the data set has no rows; {need}")
