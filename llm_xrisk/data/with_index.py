"""The sample index: the column by which per-sample state finds its row."""

from collections.abc import Mapping
from typing import Any


class IndexedDataset:
    """A map-style dataset whose items carry their position.

    Args:
        dataset: Anything with ``__len__`` and ``__getitem__``. A mapping as item gains the key
            ``index``, a tuple gains a last element, anything else becomes a pair.

    Example:
        >>> IndexedDataset([("cat", 0), ("dog", 1)])[1]
        ('dog', 1, 1)
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        number = int(index)
        number += len(self) if number < 0 else 0
        if not 0 <= number < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        item = self.dataset[number]
        if isinstance(item, Mapping):
            return {**item, "index": number}
        return (*item, number) if isinstance(item, tuple) else (item, number)


def with_index(dataset: Any) -> Any:
    """Number the rows of a dataset, so that an objective's state can follow each of them.

    Args:
        dataset: A Hugging Face ``Dataset``, which gains the integer column ``index``, or any
            map-style dataset, which is wrapped in :class:`IndexedDataset`.

    Returns:
        The numbered dataset. Shuffle and filter it afterwards: the numbers stay with their rows.

    Raises:
        TypeError: the dataset has no length or no random access.
        ValueError: there is a column ``index`` that is no such numbering.

    Example:
        >>> with_index([{"text": "a"}, {"text": "b"}])[1]
        {'text': 'b', 'index': 1}
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"got a {type(dataset).__name__}, which has no length or no random access; the index "
            "of a sample must be the same in every epoch: load the data as a map-style dataset"
        )
    if not hasattr(dataset, "add_column"):
        return IndexedDataset(dataset)
    numbers = list(range(len(dataset)))
    if "index" not in dataset.column_names:
        return dataset.add_column("index", numbers)
    found = list(dataset["index"])
    if found == numbers:
        return dataset
    raise ValueError(
        f"the dataset has a column 'index' already, which starts {found[:4]}; it must count the "
        "rows from 0: rename it with dataset.rename_column('index', ...) first"
    )
