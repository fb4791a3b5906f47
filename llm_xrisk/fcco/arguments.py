"""Arguments held to the kinds that their annotations name, so that an error says what was meant."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ParamSpec, Union, cast, get_args, get_origin

import torch
from torch import Tensor

P = ParamSpec("P")
Advice = Mapping[str, str]
STATE_DTYPES = (torch.float32, torch.float64)
INTEGERS = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))
_FUNCTION: Any = get_origin(Callable[[], None])
_NEEDED: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "text",
    Tensor: "a tensor",
    NoneType: "None",
    torch.dtype: "torch.float32 or torch.float64",
}


def checked(init: Callable[P, None], advice: Advice | None = None) -> Callable[P, None]:
    """A constructor that refuses by name what it cannot be called with.

    Each argument must be of a kind that its annotation names: a number is no text, boolean or
    tensor, and no class stands for an instance of it. Numbers must be finite, if the constructor
    has let others pass.

    Args:
        init: An ``__init__`` with annotations.
        advice: What to do, by the name of an argument.

    Returns:
        A constructor that raises TypeError, or ValueError for an infinity or NaN, with what it got,
        what it needs and what to do.

    Example:
        >>> class Average:
        ...     @checked
        ...     def __init__(self, num_samples: int, *, gamma: float = 0.1) -> None: ...
        >>> Average(3, gamma="large")
        Traceback (most recent call last):
        TypeError: gamma of Average must be a number, got 'large'
    """
    signature, kinds = inspect.signature(init), inspect.get_annotations(init)

    @wraps(init)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        name = type(args[0]).__name__
        given = bound(name, signature, args[1:], kwargs, advice or {})
        for argument, value in given.items():
            kind = kinds.get(argument, Any)
            if not fits(value, kind):
                raise TypeError(
                    f"{argument} of {name} must be {needed(kind)}, got {shown(value)}"
                    f"{_what_to_do(value, kind, (advice or {}).get(argument))}"
                )
        init(*args, **kwargs)
        for argument, value in given.items():
            if isinstance(value, Real) and not math.isfinite(value):
                raise ValueError(f"{argument} of {name} must be finite, got {value}")

    return run


def bound(
    name: str,
    signature: inspect.Signature,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    advice: Advice,
) -> dict[str, Any]:
    """The arguments of a method by name, ``self`` left out.

    Raises:
        TypeError: they do not fit, with the signature they should.

    Example:
        >>> def forward(self, scores, *, index=None): ...
        >>> bound("forward", inspect.signature(forward), [1.0], {"index": 2}, {})
        {'scores': 1.0, 'index': 2}
    """
    own = list(signature.parameters.values())
    taken = signature.replace(
        parameters=[p.replace(annotation=inspect.Parameter.empty) for p in own[1:]],
        return_annotation=inspect.Signature.empty,
    )
    try:
        return taken.bind(*args, **kwargs).arguments
    except TypeError as error:
        given = [shown(value) for value in args] + [f"{k}={shown(v)}" for k, v in kwargs.items()]
        todo = [text for argument, text in advice.items() if f"'{argument}'" in str(error)]
        if "positional" in str(error):
            todo.append("what stands behind the * goes by name")
        raise TypeError(
            f"got {name}({', '.join(given)}): {error}; it takes {name}{taken}"
            f"{': ' if todo else ''}{'; '.join(todo)}"
        ) from None


def fits(value: Any, kind: Any) -> bool:
    """Whether ``value`` is of the kind that an annotation names; True where it is not known.

    Example:
        >>> fits(0.5, float | None), fits("0.5", float), fits(True, int), fits(float, float)
        (True, False, False, False)
    """
    origin = get_origin(kind) or kind
    if origin in (Union, UnionType):
        return any(fits(value, choice) for choice in get_args(kind))
    if kind is None or kind is NoneType:
        return value is None
    if not isinstance(origin, type) or kind is Any:  # a literal, a name that is no class
        return True
    if isinstance(value, type):
        return False
    if origin is float:
        return isinstance(value, Real) and not _is_bool(value)
    if origin is int:
        return isinstance(value, Integral) and not _is_bool(value)
    if origin is torch.dtype:
        return value in STATE_DTYPES
    if origin in (Sequence, tuple, list):
        return _fits_each(value, get_args(kind))
    return callable(value) if origin is _FUNCTION else isinstance(value, origin)


def needed(kind: Any) -> str:
    """What an annotation asks for, in words.

    Example:
        >>> needed(int | None), needed(tuple[float, float])
        ('an integer or None', '2 numbers')
    """
    origin, inside = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(needed(choice) for choice in inside))
    if kind is None:
        return "None"
    if origin in (Sequence, list, tuple) and inside:
        count = f"{len(inside)} " if origin is tuple else "several "
        return f"{count}{needed(inside[0]).removeprefix('an ').removeprefix('a ')}s"
    if origin is _FUNCTION:
        return "a function"
    return _NEEDED.get(origin, f"a {getattr(origin, '__name__', kind)}")


def shown(value: Any) -> str:
    """A value as an error shows it: short, and with its kind where that is not plain.

    Example:
        >>> shown(0.5), shown("id"), shown([1, 2]), shown(torch.zeros(2, 3)), shown(dict)
        ('0.5', "'id'", 'a list of 2', 'a float32 tensor (2, 3)', 'the class dict')
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor {tuple(value.shape)}"
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        text = repr(cast(object, value))
        return text if len(text) <= 40 else f"{text[:36]}...{text[-1]}"
    kind = type(value).__name__
    if kind == "ndarray":
        return f"a NumPy array {tuple(value.shape)}"
    return f"a {kind}" + (f" of {len(value)}" if kind in ("list", "tuple", "dict", "set") else "")


def _is_bool(value: Any) -> bool:
    return value is True or value is False  # which Python takes for 1 and 0


def _fits_each(value: Any, kinds: tuple[Any, ...]) -> bool:
    """Whether the entries of a list, a tuple or an array are of their kinds."""
    if isinstance(value, str | Mapping | Tensor) or not hasattr(value, "__getitem__"):
        return False
    try:
        entries = list(cast(Sequence[Any], value))
    except TypeError:  # an array without a dimension
        return False
    if len(kinds) == 1 or kinds[1:] == (...,):
        return all(fits(entry, kinds[0]) for entry in entries)
    return len(entries) == len(kinds) and all(map(fits, entries, kinds))


def _what_to_do(value: Any, kind: Any, advice: str | None) -> str:
    if isinstance(value, type):
        return f"; pass an instance, {value.__name__}(...)"
    if isinstance(value, Tensor) and value.numel() == 1:
        return "; pass its .item()"
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return "; with fewer bits an average with a small gamma does not move"
    return f"; {advice}" if advice else ""
