"""Labels and groups from whatever holds them, and what is refused before any batch is drawn."""

import inspect

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset

from llm_xrisk.data import DualSampler, GroupSampler, QuerySampler, TriSampler, with_index
from tests.data.test_samplers import (
    GRADES,
    GROUPS,
    LABELS,
    QUERIES,
    TASKS,
    TENSORS,
    dual,
    group,
    query,
    tri,
)


class Pictures(Dataset):
    def __init__(self, **labels):
        vars(self).update(labels)

    def __len__(self):
        return 100

    def __getitem__(self, index):
        return index


HUGGING_FACE = datasets.Dataset.from_dict({"label": LABELS.tolist(), "x": list(range(100))})


@pytest.mark.parametrize(
    "labels",
    [
        LABELS.tolist(),
        tuple(LABELS.bool().tolist()),
        LABELS.numpy(),
        LABELS.numpy()[::-1][::-1],
        LABELS.numpy().astype(np.uint8),
        LABELS.float(),
        LABELS.bfloat16(),
        LABELS.float().requires_grad_(),
        LABELS.bool(),
        LABELS * 2 - 1,
        LABELS[:, None],
        TENSORS,
        with_index(TENSORS),
        ConcatDataset([Subset(TENSORS, range(40)), Subset(TENSORS, range(40, 100))]),
        Pictures(targets=LABELS.tolist()),
        with_index(Pictures(labels=LABELS)),
        HUGGING_FACE,
        HUGGING_FACE["label"],
        HUGGING_FACE.with_format("torch")["label"],
        HUGGING_FACE.with_transform(lambda batch: {"z": batch["x"]}),
    ],
    ids=range(20),
)
def test_labels_are_read_from_whatever_holds_them(labels):
    assert list(dual(labels)) == list(dual())


def test_labels_of_a_subset_are_those_of_its_rows():
    batch = next(iter(DualSampler(Subset(TENSORS, [5, 1, 2, 10]), batch_size=4)))
    assert sorted(batch) == [0, 1, 2, 3]
    assert {batch[place] for place in range(4) if batch[place] in (0, 3)} == {0, 3}


def test_groups_may_be_text_and_any_integers():
    names = [str(number) for number in GROUPS.tolist()]
    column = datasets.Dataset.from_dict({"group": names})["group"]
    assert list(group(column)) == list(group(np.array(names))) == list(group(GROUPS - 9))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: dual([0, 1, 2]), ValueError, r"values \{0, 1, 2\}.*\{0, 1\}, \{-1, 1\} or bool"),
        (lambda: dual([0, 1, -1]), ValueError, r"values \{-1, 0, 1\}.*threshold them"),
        (lambda: dual([0.0, 1.0, 0.3]), ValueError, r"values \{0, 0\.3, 1\}"),
        (lambda: dual([0, 1, float("nan")]), ValueError, r"missing entries \(NaN\).*leave"),
        (lambda: dual(["a", "b"]), ValueError, r"labels of type <U1.*map each to 0 or 1"),
        (lambda: dual([[0], [0, 1]]), ValueError, r"differ in length.*N x L"),
        (lambda: dual([]), ValueError, r"shape \(0,\).*check the data set"),
        (lambda: dual(torch.zeros(9)), ValueError, r"no positives among 9 labels.*both classes"),
        (lambda: dual(torch.ones(9)), ValueError, r"no negatives among 9 labels.*both classes"),
        (lambda: dual(TASKS), ValueError, r"shape \(60, 3\).*column=\.\.\., or use TriSampler"),
        (lambda: dual(TASKS, column=3), IndexError, r"column=3.*shape \(60, 3\).*lower it"),
        (lambda: dual(LABELS, column=0), IndexError, r"column=0.*shape \(100,\).*leave it out"),
        (lambda: dual(Pictures()), TypeError, r"got a Pictures, in which no labels.*labels=\.\.\."),
        (
            lambda: dual(datasets.Dataset.from_dict({"y": [0, 1]})),
            TypeError,
            r"got a Dataset with the columns \['y'\].*labels=\.\.\.",
        ),
        (lambda: dual(num_pos=0), ValueError, r"1\.\.batch_size-1, got num_pos=0"),
        (lambda: dual(num_pos=12), ValueError, r"got num_pos=12 of batch_size=12"),
        (lambda: dual(batch_size=1), ValueError, r"batch_size must be at least 2.*got 1"),
        (lambda: dual(sampling_rate=0.5), ValueError, r"num_pos=5 and sampling_rate=0\.5"),
        (lambda: dual(num_pos=None, sampling_rate=1.0), ValueError, r"in \(0, 1\), got 1\.0"),
        (lambda: dual(num_replicas=2, rank=2), ValueError, r"rank=2 of num_replicas=2"),
        (lambda: dual(num_replicas=13), ValueError, r"batch of 12 for num_replicas=13"),
        (lambda: tri(LABELS), ValueError, r"shape \(100,\).*\(N, L\): use DualSampler"),
        (
            lambda: tri(TASKS & torch.tensor([True, False, True])),
            ValueError,
            r"no positives for 1 of 3 labels, the columns \[1\].*both classes",
        ),
        (lambda: tri(tasks_per_batch=4), ValueError, r"tasks_per_batch=4 for 3 labels.*at most 3"),
        (lambda: tri(num_neg=0), ValueError, r"num_neg must be at least 1, got 0"),
        (lambda: query(GRADES[:-1]), ValueError, r"labels of shape \(89,\) for 90 entries"),
        (lambda: query(GRADES * 0), ValueError, r"no label above zero among 90"),
        (lambda: query(GRADES / 0 * 0), ValueError, r"missing entries \(NaN\)"),
        (lambda: query(queries=QUERIES / 2), ValueError, r"got queries of .*float.*integers or"),
        (lambda: query(num_pos=0), ValueError, r"num_pos must be at least 1, got 0"),
        (lambda: query(num_replicas=5), ValueError, r"batch of 4 for num_replicas=5"),
        (lambda: group(TENSORS), TypeError, r"TensorDataset as groups.*groups=\.\.\."),
        (lambda: group(with_index(TENSORS)), TypeError, r"IndexedDataset as groups"),
        (lambda: group([]), ValueError, r"groups of shape \(0,\)"),
        (lambda: group(groups_per_batch=5), ValueError, r"groups_per_batch=5 for 4 groups"),
    ],
)
def test_what_makes_no_batches_is_refused_by_name(build, error, message):
    with pytest.raises(error, match=message):
        build()


SAMPLERS = {
    "DualSampler": lambda **k: DualSampler([0, 1, 0, 1], **{"batch_size": 2} | k),
    "TriSampler": lambda **k: TriSampler(
        [[0, 1], [1, 0]], **{"tasks_per_batch": 1, "num_pos": 1, "num_neg": 1} | k
    ),
    "QuerySampler": lambda **k: QuerySampler(
        [1, 0], ["a", "a"], **{"queries_per_batch": 1, "num_pos": 1, "num_neg": 1} | k
    ),
    "GroupSampler": lambda **k: GroupSampler(
        [0, 1], **{"groups_per_batch": 1, "items_per_group": 1} | k
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_numbers_of_another_kind_are_refused_by_name(name):
    build = SAMPLERS[name]
    taken = inspect.signature(type(build()).__init__).parameters
    for argument in [n for n, p in taken.items() if p.annotation is int]:
        for wrong in (2.5, "2", None, True, torch.tensor(2)):
            with pytest.raises(TypeError, match=rf"{argument} of {name} must be an integer, got "):
                build(**{argument: wrong})
    with pytest.raises(TypeError, match=f"drop_last of {name} must be True or False, got 1"):
        build(drop_last=1)
    with pytest.raises(TypeError, match=rf"keyword argument 'shuffle'; it takes {name}\("):
        build(shuffle=True)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_place_in_training_of_another_kind_is_refused(name):
    sampler = SAMPLERS[name]()
    for wrong in ("1", 1.5, None):
        with pytest.raises(ValueError, match="epoch must be an integer of at least 0, got "):
            sampler.set_epoch(wrong)
    with pytest.raises(ValueError, match=r"step must be in 0..\d+, .* got 0.5"):
        sampler.state_dict(step=0.5)
    with pytest.raises(TypeError, match=rf"got None as a state; it must come from {name}.state_di"):
        sampler.load_state_dict(None)
    with pytest.raises(ValueError, match=r"got a state at batch 0.5 of an epoch"):
        sampler.load_state_dict(sampler.state_dict() | {"step": 0.5})


@pytest.mark.parametrize("wrong", [{"label": [0, 1]}, DualSampler])
def test_a_mapping_of_columns_is_told_to_become_one(wrong):
    with pytest.raises(TypeError, match=r"as labels; .* the column that holds them, .*\['label'\]"):
        DualSampler(wrong, batch_size=2)


@pytest.mark.parametrize("wrong", [["a", None, "b"], [object(), object()], [0.5, 1.5]])
def test_groups_without_a_name_are_refused(wrong):
    with pytest.raises(ValueError, match=r"got groups of shape .* integers or text"):
        GroupSampler(wrong, groups_per_batch=1, items_per_group=1)


def test_a_sampler_knows_its_data_and_its_process():
    sampler = DualSampler([0, 1, 0, 1], batch_size=4, num_replicas=2, rank=1)
    assert (sampler.num_samples, sampler.num_replicas, sampler.rank) == (4, 2, 1)
