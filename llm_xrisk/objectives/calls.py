"""What objectives are called with: rows as tensors, by name, and what an error says of others."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from llm_xrisk.fcco.arguments import INTEGERS, bound, checked, shown
from llm_xrisk.fcco.groups import readable
from llm_xrisk.fcco.keyed import check_index

_ADVICE = {
    "surrogate": "SquaredHinge(margin=1.0), Hinge, Squared and Logistic of "
    "llm_xrisk.objectives.surrogates are some",
    "num_items": "ranking_statistics(targets, query) returns it",
    "num_relevant": "ranking_statistics(targets, query) returns it",
    "ideal_dcg": "ranking_statistics(targets, query) returns it",
}
_KEYED = "pass num_samples=len(train_dataset)"
_UNKEYED = "it keeps nothing for each sample, and takes no num_samples"
_IDS = {
    "index": "number the rows with llm_xrisk.data.with_index(dataset)",
    "query": "number the queries 0..Q-1, for example numpy.unique(ids, return_inverse=True)[1]",
}
_BY_NAME = {
    "index": "pass index=batch['index']",
    "query": "pass query=batch['query']",
    "group": "pass group=batch['group']",
}
_FLOATS = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
_USUAL = {"scores": _FLOATS, "index": INTEGERS, "query": INTEGERS}  # then nothing is called
_ANY = _FLOATS | INTEGERS | {torch.bool}
# what Python and torch raise where rows are of the wrong kind or lie elsewhere
_PUZZLES = (TypeError, RuntimeError, IndexError)


def built(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor of an objective that refuses by name what it cannot be called with."""
    keyed = "num_samples" in inspect.signature(init).parameters
    return checked(init, _ADVICE | {"num_samples": _KEYED if keyed else _UNKEYED})


def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of an objective that refuses by name what it cannot be called with.

    Kinds are looked at before the call, which takes a microsecond; why a call failed is looked for
    after it has.
    """
    signature = inspect.signature(method)
    taken = list(signature.parameters.values())[1:]
    required = {p.name for p in taken if p.default is p.empty}
    names = [p.name for p in taken if p.kind is p.POSITIONAL_OR_KEYWORD]

    @wraps(method)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        for name, rows in (*zip(names, args, strict=False), *kwargs.items()):
            if type(rows) is not Tensor or rows.dtype not in _USUAL.get(name, _ANY):
                check_kind(self, name, rows, required)
        try:
            return method(self, *args, **kwargs)
        except _PUZZLES:
            place = f"{type(self).__name__}.{method.__name__}"
            given = bound(place, signature, args, kwargs, _BY_NAME)
            check_places(self, given)
            check_queries(self, given.get("query"))
            raise

    return run


def check_kind(objective: nn.Module, name: str, rows: Any, required: set[str]) -> None:
    """Refuse what is no tensor, scores that are no floats, and ids that are no integers.

    Raises:
        TypeError: rows that are no tensor.
        ValueError: a tensor of another type of numbers.
    """
    if not isinstance(rows, Tensor):
        if rows is not None or name in required:
            raise TypeError(_no_tensor(objective, name, rows))
    elif name == "scores":
        if not rows.is_floating_point():
            raise ValueError(
                f"{type(objective).__name__} got scores of {rows.dtype} and needs floating-point "
                "numbers, the model's outputs; are scores and targets exchanged?"
            )
    elif name in _IDS and rows.dtype not in INTEGERS:
        raise ValueError(
            f"{name} must be integers, ids from 0 up; {type(objective).__name__} got "
            f"{rows.dtype}: {_IDS[name]}"
        )


def check_places(objective: nn.Module, given: Mapping[str, Any]) -> None:
    """Say why a call failed, where rows lie on several devices or are no plain tensors.

    Raises:
        ValueError: with what to move where.
    """
    rows = {name: t for name, t in given.items() if isinstance(t, Tensor)}
    places = {name: str(t.device) for name, t in rows.items()}
    if len(set(places.values())) > 1:
        got = ", ".join(f"{name} on {place}" for name, place in places.items())
        raise ValueError(
            f"{type(objective).__name__} got {got} and needs all on one device; move them, for "
            "example targets.to(scores.device)"
        )
    own = {str(t.device) for t in (*objective.parameters(), *objective.buffers()) if t.dim() > 0}
    if own and own != set(places.values()):
        raise ValueError(
            f"{type(objective).__name__} has its state on {', '.join(sorted(own))} and got scores "
            f"on {places['scores']}; move it once it is built: objective.to(scores.device)"
        )
    odd = [name for name, t in rows.items() if t.layout != torch.strided or t.is_complex()]
    if odd:
        raise ValueError(
            f"{type(objective).__name__} got {odd[0]} as a {rows[odd[0]].layout} tensor of "
            f"{rows[odd[0]].dtype} and needs real numbers in a dense one; convert it first"
        )


def check_queries(objective: Any, query: Tensor | None) -> None:
    """Refuse queries that no statistics are known of.

    Raises:
        IndexError: on a CPU, a query outside [0, Q).
    """
    count = len(getattr(objective, "num_items", ()))
    if query is None or count == 0 or not readable(query) or query.numel() == 0:
        return
    low, high = int(query.min()), int(query.max())
    if low < 0 or high >= count:
        raise IndexError(
            f"query ids {low} to {high} are out of range for {count} queries; number them 0..Q-1 "
            "and pass all to ranking_statistics"
        )


def require_index(objective: Any, index: Tensor | None) -> Tensor:
    """Return ``index``, its range checked on a CPU, or raise the error that shows how to get one.

    Every row is checked, also those that no estimator will see.
    """
    if index is None:
        raise ValueError(
            f"{type(objective).__name__} keeps a value for each sample and got no index; number "
            "the rows with llm_xrisk.data.with_index(dataset) and pass index=batch['index']"
        )
    check_kind(objective, "index", index, {"index"})
    # in eval() rows are those of another data set, and nothing is read or written for them
    if objective.num_samples is not None and objective.training and readable(index):
        check_index(index, objective.num_samples)
    return index.long()


def _no_tensor(objective: nn.Module, name: str, rows: Any) -> str:
    """What came in place of a tensor, and how to make one."""
    got = f"{type(objective).__name__} got {name} as {shown(rows)} and needs a tensor; "
    if hasattr(rows, "logits"):
        return f"{got}pass its logits, one score a row"
    first: Any = rows[0] if type(rows) in (list, tuple) and rows else rows
    if isinstance(first, str):
        return got + _IDS.get(name, "map each to a number first")
    if isinstance(first, Tensor):
        return f"{got}torch.cat or torch.stack joins several"
    if rows is None:
        return f"{got}pass {name}=batch[{name!r}]" if name != "scores" else f"{got}pass one"
    return f"{got}torch.as_tensor({name}) makes one, on the device of the scores"
