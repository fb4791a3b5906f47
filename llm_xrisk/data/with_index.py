"""The sample index: the column by which per-sample state finds its row."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset

from llm_xrisk.fcco.arguments import shown


class IndexedDataset:
    """A map-style dataset whose items carry their position.

    Attributes of the dataset (``targets``, ``classes``, ``set_epoch``) are found here too; a method
    that returns another dataset returns one that is not numbered.

    Args:
        dataset: Anything with ``__len__`` and ``__getitem__``; ``__getitems__`` is used where it
            has one. A mapping as item gains the key ``index``, a tuple gains a last element,
            anything else becomes a pair. So does a graph of PyTorch Geometric, whose loader
            collates the pair to a batch and a tensor: an attribute ``index`` it would count up by
            the nodes of earlier graphs, as it does whatever has "index" in its name.

    Example:
        >>> IndexedDataset([("cat", 0), ("dog", 1)])[1]
        ('dog', 1, 1)
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        number = self._number(index)
        return _numbered(self.dataset[number], number)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        numbers = [self._number(index) for index in indices]
        fetch = getattr(self.dataset, "__getitems__", None)
        items = fetch(numbers) if fetch else [self.dataset[number] for number in numbers]
        if isinstance(items, Mapping) or len(items) != len(numbers):
            raise TypeError(
                f"got a {type(items).__name__} of {len(items)} from {type(self.dataset).__name__}"
                f".__getitems__ for {len(numbers)} rows; each row gains its index, so it must be a "
                "list of rows: leave putting them together to the loader's collate_fn"
            )
        return [_numbered(item, number) for item, number in zip(items, numbers, strict=True)]

    def __getattr__(self, name: str) -> Any:
        # private names are looked for while a pickle is loaded, before there is a dataset to ask
        if name.startswith("_") or name == "dataset":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.dataset, name)

    def _number(self, index: int) -> int:
        try:
            number = operator.index(index)
        except TypeError as error:
            raise TypeError(
                f"a numbered data set is asked for a row by its number, got {shown(index)}; of "
                "several rows take torch.utils.data.Subset(dataset, numbers)"
            ) from error
        number += len(self) if number < 0 else 0
        if not 0 <= number < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        return number


def with_index(dataset: Any) -> Any:
    """Number the rows of a dataset, so that an objective's state can follow each of them.

    Args:
        dataset: A Hugging Face ``Dataset``, which gains the integer column ``index``, also behind
            its format or transform, or any map-style dataset, which is wrapped in
            :class:`IndexedDataset`.

    Returns:
        The numbered dataset. Shuffle and filter it afterwards: the numbers stay with their rows,
        and an objective's ``num_samples`` is the length from before.

    Raises:
        TypeError: the dataset has no length or no random access, or is a mapping of splits.
        ValueError: there is a column ``index`` that is no such numbering (of a data set that is
            wrapped, when the row is read).

    Example:
        >>> with_index([{"text": "a"}, {"text": "b"}])[1]
        {'text': 'b', 'index': 1}
    """
    random_access = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, IterableDataset | str | type) or not random_access:
        raise TypeError(
            f"got {shown(dataset)}, which has no length or no random access; the index "
            "of a sample must be the same in every epoch: load the data as a map-style dataset"
        )
    if isinstance(dataset, Mapping):
        raise TypeError(
            f"got a {type(dataset).__name__} with {list(dataset)[:4]}; each split has an index of "
            "its own: number the one to train on, with_index(dataset[...])"
        )
    if isinstance(dataset, IndexedDataset):
        return dataset
    if not hasattr(dataset, "add_column"):
        return IndexedDataset(dataset)
    numbers = list(range(len(dataset)))
    if "index" not in dataset.column_names:
        return _shown(dataset.add_column("index", numbers), hidden=True)
    found = list(dataset.with_format(None)["index"][:])
    if found == numbers:
        return _shown(dataset, hidden="index" not in dataset.format["columns"])
    raise ValueError(
        f"the dataset has a column 'index' already, which starts {found[:4]}; it must count the "
        "rows from 0: rename it with dataset.rename_column('index', ...) first"
    )


def _numbered(item: Any, number: int) -> Any:
    if isinstance(item, Mapping):
        if item.get("index", number) != number:
            raise ValueError(
                f"row {number} has an 'index' of {shown(item['index'])} already, which must count "
                "the rows from 0: rename it first"
            )
        return {**item, "index": number}
    return (*item, number) if isinstance(item, tuple) else (item, number)


def _shown(dataset: Any, *, hidden: bool) -> Any:
    """A Hugging Face ``Dataset`` with a column ``index``, which its format lets through.

    ``hidden`` says that a transform did not see this column so far, and does not expect it.
    """
    shape = dataset.format
    transform = shape["format_kwargs"].get("transform")
    custom = shape["type"] == "custom" and not isinstance(transform, _WithIndex)
    if not custom and "index" in shape["columns"]:
        return dataset
    given = dict(shape["format_kwargs"])
    if custom:
        given["transform"] = _WithIndex(transform, hidden)
    return dataset.with_format(
        shape["type"],
        columns=list(dict.fromkeys([*shape["columns"], "index"])),
        output_all_columns=shape["output_all_columns"],
        **given,
    )


@dataclass
class _WithIndex:
    """A transform of batches that keeps the column ``index``; a class, since workers pickle it."""

    transform: Callable[[dict[str, Any]], Mapping[str, Any]]
    hidden: bool

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        numbers = batch["index"]
        seen = {k: v for k, v in batch.items() if k != "index"} if self.hidden else batch
        return {**self.transform(seen), "index": numbers}
