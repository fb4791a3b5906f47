# SPDX-License-Identifier: Apache-2.0
"""Reward functions by their dotted names, as a command line gives them."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


def reward_function(name: str) -> Callable[..., Any]:
    """Import a function; modules of the working directory are found too.

    Args:
        name: As in `reward.arithmetic_reward`, or `mine.grade` for `grade` in `mine.py`.

    Raises:
        ValueError: The name has no module, or the module no such function.
        ModuleNotFoundError: There is no such module.

    Example:
        >>> reward_function("reward.arithmetic_reward")(["1+1="], ["2"], answer=["2"])
        [1.0]
    """
    module_name, _, function_name = name.rpartition(".")
    if not module_name:
        raise ValueError(
            f"got the reward function {name!r}, need module.function, as in "
            "reward.arithmetic_reward or, for grade() in mine.py, mine.grade"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module = importlib.import_module(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        known = sorted(
            n for n in vars(module) if not n.startswith("_") and callable(vars(module)[n])
        )
        raise ValueError(
            f"got the reward function {name!r}, and {module_name} has none of that name; it has "
            f"{', '.join(known) or 'none at all'}"
        )
    return function
