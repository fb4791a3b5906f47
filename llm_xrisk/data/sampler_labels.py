"""Labels and groups from whatever holds them, checked once, when a sampler is built."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from llm_xrisk.data.with_index import IndexedDataset
from llm_xrisk.fcco.arguments import shown


def read_column(values: Any, *, name: str = "labels") -> np.ndarray:
    """One entry (or row of entries) for each row of the data, as a NumPy array.

    Args:
        values: A tensor, an array, a list, a column of a Hugging Face ``Dataset``, a series; or a
            data set that holds labels: a ``TensorDataset`` (its last tensor), one with an
            attribute ``targets`` or ``labels``, a Hugging Face ``Dataset`` with a column ``label``
            or ``labels``, and a ``Subset``, ``ConcatDataset`` or ``IndexedDataset`` of these.
        name: Of the argument; other things than labels are not looked for in a data set.

    Raises:
        TypeError: a data set in which the entries cannot be found, or a mapping of columns.
        ValueError: entries that form no array.

    Example:
        >>> data = TensorDataset(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))
        >>> read_column(Subset(data, [1, 2])).tolist()
        [1, 0]
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    is_data = isinstance(values, Dataset | IndexedDataset) or hasattr(values, "column_names")
    if is_data and name != "labels":
        raise TypeError(
            f"got a {type(values).__name__} as {name}, of which no column says that it holds "
            f"{name}; a sampler needs one entry for each row: pass that column, {name}=..."
        )
    if isinstance(values, type | Mapping):
        raise TypeError(
            f"got {shown(values)} as {name}; a sampler needs one entry for each row: pass the "
            f"column that holds them, for example rows[{name.removesuffix('s')!r}]"
        )
    if isinstance(values, IndexedDataset):
        return read_column(values.dataset)
    if isinstance(values, Subset):
        return read_column(values.dataset)[np.asarray(values.indices, dtype=np.int64)]
    if isinstance(values, ConcatDataset):
        return np.concatenate([read_column(part) for part in values.datasets])
    if isinstance(values, TensorDataset):
        return read_column(values.tensors[-1])
    if is_data:
        return read_column(_labels_of(values))
    if not isinstance(values, list | tuple | np.ndarray) and hasattr(values, "__getitem__"):
        values = values[:]  # a column that is read lazily, row after row, unless asked for all
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(
            f"got {name} whose rows differ in length; they must form one array of N or N x L "
            "entries: give each row one entry for each label"
        ) from error
    texts = array.dtype == object and all(isinstance(entry, str) for entry in array.flat)
    return array.astype(str) if texts else array


def _labels_of(dataset: Any) -> Any:
    """The labels in a data set's usual places."""
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        found = next((column for column in ("label", "labels") if column in columns), None)
        # without format or transform, which would read every other column too
        labels = None if found is None else dataset.with_format(None)[found][:]
    else:
        labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if labels is None:
        held = "" if columns is None else f" with the columns {list(columns)}"
        raise TypeError(
            f"got a {type(dataset).__name__}{held}, in which no labels are found; a sampler needs "
            "one entry for each row: pass them as an array, labels=..."
        )
    return labels


def binary_labels(labels: Any, column: int | None) -> Tensor:
    """Which rows are positive, (N,) bool, from {0, 1}, {-1, 1} or bool.

    Raises:
        ValueError: several label columns and none chosen, or other values.
        IndexError: no such column.

    Example:
        >>> binary_labels([-1, 1, -1], None)
        tensor([False,  True, False])
    """
    array = _numeric(read_column(labels))
    if column is not None:
        width = array.shape[1] if array.ndim == 2 else 0
        if not -width <= column < width:
            raise IndexError(
                f"got column={column} for labels of shape {tuple(array.shape)}; column chooses one "
                "of the L labels of an (N, L) array: lower it, or leave it out for (N,) labels"
            )
        array = array[:, column]
    elif array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(
            f"got labels of shape {tuple(array.shape)}; DualSampler balances one label, (N,): "
            "choose one with column=..., or use TriSampler, which draws from several labels"
        )
    positive, negative = _signs(array)
    if not (positive | negative).all():
        raise ValueError(
            "got labels with missing entries (NaN); each row needs a label: leave those rows out, "
            "for instance with torch.utils.data.Subset"
        )
    return positive


def task_labels(labels: Any) -> tuple[Tensor, Tensor]:
    """Which rows are positive and which negative for each label, both (L, N) bool.

    Raises:
        ValueError: labels that are not (N, L), other values than {0, 1}, {-1, 1}, bool and NaN for
            missing, or a label that lacks a class.

    Example:
        >>> positive, negative = task_labels([[0, 1], [1, 0], [1, float("nan")]])
        >>> negative
        tensor([[ True, False, False],
                [False,  True, False]])
    """
    array = _numeric(read_column(labels))
    if array.ndim != 2:
        raise ValueError(
            f"got labels of shape {tuple(array.shape)}; TriSampler needs one column for each "
            "label, (N, L): use DualSampler for one label"
        )
    positive, negative = (part.T.contiguous() for part in _signs(array))
    for kind, part in (("positives", positive), ("negatives", negative)):
        lacking = (~part.any(dim=1)).nonzero().flatten().tolist()
        if lacking:
            raise ValueError(
                f"got no {kind} for {len(lacking)} of {len(part)} labels, the columns "
                f"{lacking[:8]}; each label needs both classes: leave these columns out"
            )
    return positive, negative


def group_rows(groups: Any, *, name: str = "groups") -> tuple[Tensor, Tensor]:
    """The rows in the order of their group, and the number of rows of each group.

    Args:
        groups: (N,) integers or text, one entry for each row.
        name: Of the argument, for errors.

    Returns:
        (N,) rows sorted by group, in the order of the data within one, and (G,) sizes.

    Raises:
        ValueError: entries that are not (N,), or not integers or text.

    Example:
        >>> group_rows([7, 3, 7])
        (tensor([1, 0, 2]), tensor([1, 2]))
    """
    array = read_column(groups, name=name)
    if array.ndim != 1 or len(array) == 0 or array.dtype.kind not in "biuUS":
        raise ValueError(
            f"got {name} of shape {tuple(array.shape)} and type {array.dtype}; they must be "
            "integers or text, (N,), one for each row: pass the column that names the group"
        )
    if array.dtype.kind in "US":
        array = np.unique(array, return_inverse=True)[1]
    ordered, order = torch.sort(torch.as_tensor(array.astype(np.int64)), stable=True)
    return order, ordered.unique_consecutive(return_counts=True)[1]


def relevance(labels: Any, rows: int) -> Tensor:
    """Which rows are relevant, (N,) bool: those with a label above zero.

    Raises:
        ValueError: labels that are not (N,) numbers.

    Example:
        >>> relevance([0.0, 3.0, -1.0], rows=3)
        tensor([False,  True, False])
    """
    array = _numeric(read_column(labels))
    if array.shape != (rows,):
        raise ValueError(
            f"got labels of shape {tuple(array.shape)} for {rows} entries of queries; each row "
            "needs a query and a grade: pass two columns of one data set"
        )
    if np.isnan(array).any():
        raise ValueError(
            "got labels with missing entries (NaN); each row needs a grade: leave those rows out"
        )
    return torch.as_tensor(array > 0)


def _numeric(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"got labels of type {array.dtype}; they must be numbers or bool: map each to 0 or 1"
        )
    if array.size == 0:
        raise ValueError(
            f"got labels of shape {tuple(array.shape)}, without any entry; a sampler needs at "
            "least one row: check the data set"
        )
    return array


def _signs(array: np.ndarray) -> tuple[Tensor, Tensor]:
    """Where labels are positive and where negative; NaN is neither."""
    if array.dtype.kind == "b":
        positive = torch.tensor(array)
        return positive, ~positive
    one, zero, minus = array == 1, array == 0, array == -1
    known = one | zero | minus
    if array.dtype.kind == "f":
        known |= np.isnan(array)
    if not known.all() or (zero.any() and minus.any()):
        values = np.unique(array)
        shown = ", ".join(f"{value:g}" for value in values[:6].tolist())
        raise ValueError(
            f"got labels with the values {{{shown}{', ...' if len(values) > 6 else ''}}}; they "
            "must be {0, 1}, {-1, 1} or bool: threshold them, for instance labels > 0"
        )
    return torch.from_numpy(one), torch.from_numpy(zero | minus)
