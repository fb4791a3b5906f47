"""Numbered rows, whatever kind of data set they come from."""

import pickle
from collections import namedtuple

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from llm_xrisk.data import with_index
from llm_xrisk.data.with_index import IndexedDataset


class Words:
    """A map-style data set that fetches whole batches, and knows its classes."""

    classes = ("short", "long")

    def __init__(self):
        self.targets = [0, 1, 0, 1]
        self.fetched = []

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"text": "ab" * (index + 1)}

    def __getitems__(self, indices):
        self.fetched.append(indices)
        return [self[index] for index in indices]


class Graph:
    """An item known by its attributes, as a graph of PyTorch Geometric is."""

    def __init__(self, nodes):
        self.nodes = nodes


class Stream(IterableDataset):
    def __len__(self):
        return 3

    def __iter__(self):
        return iter(range(3))


def doubled(batch):
    return {"z": [2 * value for value in batch["x"]]}


def every_column_doubled(batch):
    assert set(batch) == {"x", "y"}
    return {name: [2 * value for value in column] for name, column in batch.items()}


def numbers():
    return Dataset.from_dict({"x": [1.0, 2.0, 3.0], "y": [4, 5, 6]})


def test_a_format_of_chosen_columns_shows_the_index_too():
    formatted = numbers()
    formatted.set_format("torch", columns=["x"])
    row = with_index(formatted)[2]
    assert {name: value.item() for name, value in row.items()} == {"x": 3.0, "index": 2}


def test_a_format_that_hides_the_index_column_shows_it_afterwards():
    counted = numbers().add_column("index", [0, 1, 2]).with_format("numpy", columns=["x"])
    assert "index" not in counted[1]
    assert with_index(counted)[1]["index"] == 1


@pytest.mark.parametrize("transform", [doubled, every_column_doubled])
def test_a_transform_keeps_the_index_and_does_not_see_it(transform):
    numbered = with_index(numbers().with_transform(transform))
    shuffled = pickle.loads(pickle.dumps(numbered)).shuffle(seed=1)
    rows = [shuffled[place] for place in range(3)]
    value = "z" if transform is doubled else "x"
    assert sorted((row["index"], row[value]) for row in rows) == [(0, 2.0), (1, 4.0), (2, 6.0)]
    assert with_index(numbered) is numbered


def test_a_transform_that_reads_an_index_column_still_sees_it():
    counted = numbers().add_column("index", [0, 1, 2])
    counted = counted.with_transform(lambda batch: {"z": [-n for n in batch["index"]]})
    assert with_index(counted)[2] == {"z": -2, "index": 2}


def test_a_format_of_the_index_does_not_matter_for_its_check():
    counted = numbers().add_column("index", [0, 1, 2]).with_format("torch")
    assert with_index(counted) is counted


def test_subsets_and_tensors_are_numbered_by_their_own_places():
    tensors = TensorDataset(torch.arange(5), torch.arange(5) * 10)
    loader = DataLoader(with_index(Subset(tensors, [4, 2])), batch_size=2)
    values, tens, index = next(iter(loader))
    assert (values.tolist(), tens.tolist(), index.tolist()) == ([4, 2], [40, 20], [0, 1])
    kept = Subset(with_index(tensors), [4, 2])
    assert [int(kept[place][-1]) for place in range(2)] == [4, 2]


def test_rows_fetched_together_are_numbered_too():
    words = Words()
    loader = DataLoader(with_index(words), batch_size=3)
    assert [batch["index"].tolist() for batch in loader] == [[0, 1, 2], [3]]
    assert words.fetched == [[0, 1, 2], [3]]
    assert with_index(words).__getitems__([-1])[0]["index"] == 3
    with pytest.raises(IndexError, match="index 4 is out of range for 4 samples"):
        with_index(words).__getitems__([4])


def test_rows_that_come_collated_are_refused():
    class Collated(Words):
        def __getitems__(self, indices):
            return {"text": ["ab"] * len(indices)}

    with pytest.raises(TypeError, match=r"got a dict of 1 from Collated.*list of rows.*collate_fn"):
        with_index(Collated()).__getitems__([0])


def test_an_item_known_by_attributes_becomes_a_pair_and_stays_as_it_is():
    graphs = [Graph(3), Graph(5)]
    graph, index = with_index(graphs)[1]
    assert graph is graphs[1]
    assert index == 1
    assert vars(graph) == {"nodes": 5}


def test_other_items_become_pairs_and_tuples_grow():
    pair = namedtuple("Pair", "image label")
    assert with_index(["a"])[0] == ("a", 0)
    assert with_index([["a", "b"]])[0] == (["a", "b"], 0)
    assert with_index([pair("a", 1)])[0] == ("a", 1, 0)


def test_attributes_of_the_data_set_are_found():
    words = with_index(Words())
    assert words.targets == [0, 1, 0, 1]
    assert words.classes == ("short", "long")
    with pytest.raises(AttributeError, match="'Words' object has no attribute 'samples'"):
        _ = words.samples


def test_a_numbered_data_set_survives_pickling_and_workers():
    numbered = pickle.loads(pickle.dumps(with_index(Words())))
    assert numbered[-1] == {"text": "abababab", "index": 3}
    loader = DataLoader(numbered, batch_size=4, num_workers=1, multiprocessing_context="spawn")
    assert [batch["index"].tolist() for batch in loader] == [[0, 1, 2, 3]]


def test_numbering_twice_is_numbering_once():
    once = with_index([("a",), ("b",)])
    assert with_index(once) is once
    assert isinstance(once, IndexedDataset)


@pytest.mark.parametrize("stream", [Stream(), numbers().to_iterable_dataset()])
def test_streams_are_refused(stream):
    with pytest.raises(TypeError, match=r"no length or no random access.*same in every epoch"):
        with_index(stream)


def test_a_mapping_of_splits_is_refused():
    with pytest.raises(TypeError, match=r"got a DatasetDict with \['train'\].*with_index\(dataset"):
        with_index(DatasetDict(train=numbers()))


@pytest.mark.parametrize("wrong", ["train.jsonl", list, 5, None])
def test_what_is_no_data_set_is_refused(wrong):
    with pytest.raises(TypeError, match="which has no length or no random access"):
        with_index(wrong)


@pytest.mark.parametrize("number", ["a", 1.5, None, [0, 1], slice(0, 1)])
def test_a_row_is_asked_for_by_its_number(number):
    with pytest.raises(TypeError, match=r"asked for a row by its number, got .*Subset\(dataset"):
        with_index([("a",), ("b",)])[number]


def test_a_row_that_has_another_number_is_refused():
    rows = with_index([{"index": 0}, {"index": 7}])
    assert rows[0] == {"index": 0}
    with pytest.raises(ValueError, match=r"row 1 has an 'index' of 7 already, .* rename it"):
        rows[1]
