"""Samplers: what batches hold, in which order they come, and where a run goes on."""

import copy
import json
import pickle
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from llm_xrisk.data import DualSampler, GroupSampler, QuerySampler, TriSampler, with_index

LABELS = (torch.arange(100) % 5 == 0).long()  # 20 positives, 80 negatives
TASKS = torch.stack([torch.arange(60) % 3 == 0, torch.arange(60) < 7, torch.arange(60) > 20], 1)
TENSORS = TensorDataset(torch.zeros(100, 2), LABELS)
QUERIES = torch.arange(90) // 6  # 15 queries of 6 rows
GRADES = (torch.arange(90) % 6 < 2).float() * 3  # of which 2 are relevant
GROUPS = torch.tensor([7] * 50 + [1] * 30 + [4] * 3 + [9] * 17)


def dual(labels=LABELS, **options):
    return DualSampler(labels, **{"batch_size": 12, "num_pos": 5, **options})


def tri(labels=TASKS, **options):
    return TriSampler(labels, **{"tasks_per_batch": 2, "num_pos": 2, "num_neg": 3, **options})


def query(labels=GRADES, queries=QUERIES, **options):
    sizes = {"queries_per_batch": 4, "num_pos": 1, "num_neg": 3}
    return QuerySampler(labels, queries, **{**sizes, **options})


def group(groups=GROUPS, **options):
    return GroupSampler(groups, **{"groups_per_batch": 2, "items_per_group": 4, **options})


ALL = pytest.mark.parametrize("build", [dual, tri, query, group])


def counts(sampler, of=None):
    """How often each row (of those given) is drawn in an epoch."""
    drawn = torch.tensor([row for batch in sampler for row in batch]).bincount(minlength=100)
    return drawn if of is None else drawn[of]


# What a batch holds


def test_a_dual_batch_has_its_positives_and_no_row_twice():
    sampler = dual()
    batches = list(sampler)
    assert len(batches) == len(sampler) == 12  # ceil(80 / 7)
    for batch in batches:
        assert LABELS[batch].sum() == 5
        assert len(set(batch)) == len(batch) == 12


def test_an_epoch_passes_over_both_classes_evenly():
    drawn = counts(dual())
    assert set(drawn[LABELS == 1].tolist()) == {3}  # 60 = 12 x 5 draws of 20 positives
    assert set(drawn[LABELS == 0].tolist()) == {1, 2}  # 84 = 12 x 7 draws of 80 negatives


def test_the_last_batch_is_complete_or_dropped():
    assert len(dual(drop_last=True)) == 11  # floor(80 / 7)
    assert counts(dual(drop_last=True)).max() <= 3
    assert set(counts(dual(drop_last=True), LABELS == 0).tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("options", "positives"),
    [({"num_pos": 3}, 3), ({"sampling_rate": 0.25}, 2), ({"sampling_rate": 0.01}, 1), ({}, 4)],
)
def test_positives_are_counted_or_a_share_of_the_batch(options, positives):
    batch = next(iter(DualSampler(LABELS, batch_size=8, **options)))
    assert LABELS[batch].sum() == positives


@pytest.mark.parametrize("drop_last", [False, True])
def test_more_asked_for_than_there_is_comes_several_times(drop_last):
    sampler = DualSampler([1, 0, 0, 1, 0], batch_size=16, num_pos=5, drop_last=drop_last)
    assert len(sampler) == 1
    (batch,) = list(sampler)
    drawn = torch.tensor(batch).bincount()
    assert sorted(drawn[[0, 3]].tolist()) == [2, 3]
    assert sorted(drawn[[1, 2, 4]].tolist()) == [3, 4, 4]


def test_positives_are_reshuffled_when_they_are_used_up():
    sampler = DualSampler([1] * 8 + [0] * 64, batch_size=6, num_pos=2)
    positives = [row for batch in sampler for row in batch if row < 8]
    turns = [positives[place : place + 8] for place in range(0, 32, 8)]
    assert all(sorted(turn) == list(range(8)) for turn in turns)
    assert len({tuple(turn) for turn in turns}) == 4


def test_any_stretch_of_a_batch_has_its_share_of_positives():
    for batch in DualSampler(LABELS, batch_size=32, num_pos=8):
        assert LABELS[batch].view(4, 8).sum(1).tolist() == [2, 2, 2, 2]


def test_one_of_several_label_columns_can_be_chosen():
    for batch in DualSampler(TASKS, batch_size=6, num_pos=2, column=1):
        assert sum(row < 7 for row in batch) == 2


def test_a_tri_batch_has_positives_and_negatives_of_each_label_drawn():
    sampler = tri()
    assert len(sampler) == 6  # 60 rows, 2 x (2 + 3) in a batch
    tasks = sampler.tasks()
    assert sorted(tasks.flatten().bincount().tolist()) == [4, 4, 4]
    for batch, (one, other) in zip(sampler, tasks.tolist(), strict=True):
        assert one != other
        for task, part in ((one, batch[:5]), (other, batch[5:])):
            assert TASKS[part, task].sum() == 2
            assert len(set(part)) == 5


def test_missing_labels_are_drawn_for_neither_class():
    labels = torch.tensor([[1.0, 0], [0, 1], [float("nan"), 1], [1, 0], [0, float("nan")]])
    sampler = TriSampler(labels, tasks_per_batch=1, num_pos=2, num_neg=2)
    for epoch in range(5):
        sampler.set_epoch(epoch)
        for batch, (task,) in zip(sampler, sampler.tasks().tolist(), strict=True):
            assert not labels[batch, task].isnan().any()


def test_a_query_batch_has_relevant_and_other_rows_of_each_query():
    sampler = query()
    assert len(sampler) == 4  # ceil(15 / 4)
    seen = []
    for batch in sampler:
        assert len(set(batch)) == len(batch) == 16
        found, rows = QUERIES[batch].unique(return_counts=True)
        assert rows.tolist() == [4, 4, 4, 4]
        assert (GRADES[batch] > 0).sum() == 4
        seen += found.tolist()
    assert set(seen) == set(range(15))


def test_a_query_with_fewer_rows_gives_what_it_has():
    queries = ["a"] * 3 + ["b"] * 2 + ["c"] * 4
    grades = [1, 0, 0, 0, 0, 2, 1, 1, 0]
    sampler = QuerySampler(grades, queries, queries_per_batch=5, num_pos=2, num_neg=9)
    (batch,) = list(sampler)
    assert {0, 1, 2} < set(batch)  # one relevant row, two others
    assert not {3, 4} & set(batch)  # none is relevant: left out
    assert 8 in batch  # its one other row
    assert sum(5 <= row < 8 for row in batch) == 2  # of three relevant ones
    assert len(batch) == 6


def test_a_group_batch_has_as_many_rows_of_each_group():
    sampler = group()
    assert len(sampler) == 13  # ceil(100 / 8)
    visits = []
    for batch in sampler:
        found, rows = GROUPS[batch].unique(return_counts=True)
        assert rows.tolist() == [4, 4]
        visits += found.tolist()
    assert sorted(torch.tensor(visits).bincount()[[1, 4, 7, 9]].tolist()) == [6, 6, 7, 7]
    drawn = counts(sampler)
    for name in (1, 4, 7, 9):
        assert drawn[name == GROUPS].max() - drawn[name == GROUPS].min() <= 1


def test_short_epochs_share_a_pass():
    sampler = GroupSampler([0] * 900 + [1] * 100, groups_per_batch=1, items_per_group=20)
    rows = []
    for _ in range(2):  # 25 visits of 20 rows an epoch: 500 of 900, then a pass of its own
        rows.append({row for batch in sampler for row in batch if row < 900})
    assert [len(part) for part in rows] == [500, 500]
    tasks = torch.arange(4000).remainder(40)[:, None] == torch.arange(40)
    sampler = TriSampler(tasks, tasks_per_batch=4, num_pos=1, num_neg=4)
    drawn = torch.zeros(4000)
    for epoch in range(5):  # 20 visits of 1 of 100 positives
        sampler.set_epoch(epoch)
        for batch, chosen in zip(sampler, sampler.tasks().tolist(), strict=True):
            for place, task in enumerate(chosen):
                part = batch[5 * place : 5 * place + 5]
                drawn[[row for row in part if row % 40 == task]] += 1
    assert drawn.tolist() == [1.0] * 4000


# Epochs, positions, ranks


@ALL
def test_epochs_differ_follow_each_other_and_can_be_chosen(build):
    sampler, other = build(), build()
    first, second = list(sampler), list(sampler)
    assert first != second
    assert sampler.epoch == 1
    other.set_epoch(1)
    assert list(other) == second
    other.set_epoch(0)
    assert list(other) == first
    assert list(build(seed=1)) != first
    with pytest.raises(ValueError, match="epoch must be an integer of at least 0, got -1"):
        other.set_epoch(-1)


@ALL
def test_looking_at_a_batch_changes_nothing(build):
    sampler = build()
    next(iter(sampler))
    assert list(sampler) == list(build())


@ALL
def test_torch_and_numpy_draw_as_if_there_were_no_sampler(build):
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(build())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    torch.manual_seed(5)
    one = list(build())
    torch.manual_seed(6)
    assert list(build()) == one


@ALL
@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_loaded_state_plays_the_rest_bit_equal(build, step):
    sampler = build(seed=3)
    list(sampler)
    drawing = iter(sampler)
    for _ in range(step):
        next(drawing)
    state = json.loads(json.dumps(sampler.state_dict() if step else sampler.state_dict(0)))
    rest, following = list(drawing), list(sampler)
    untouched = copy.deepcopy(state)
    resumed = build(seed=99)
    resumed.load_state_dict(state)
    assert len(resumed) == len(sampler)
    assert resumed.state_dict()["step"] == step % len(sampler)
    resumed.set_epoch(resumed.epoch)  # as a training loop does before each epoch
    assert list(resumed) == rest
    assert list(resumed) == following
    assert state == untouched


def test_a_state_at_the_end_of_an_epoch_begins_the_next():
    sampler = dual()
    list(sampler)
    state = sampler.state_dict()
    assert (state["epoch"], state["step"]) == (1, 0)
    resumed = dual()
    resumed.load_state_dict(state)
    assert list(resumed) == list(sampler)


def test_a_state_names_the_batches_used_where_workers_draw_ahead():
    data = with_index(TENSORS)
    sampler = dual()
    loader = DataLoader(data, batch_sampler=sampler, num_workers=1, prefetch_factor=4)
    seen = []
    for step, (_, _, index) in enumerate(loader, start=1):
        seen.append(index.tolist())
        if step == 10:
            break
    assert sampler.state_dict()["epoch"] == 1  # all drawn
    resumed = dual()
    resumed.load_state_dict(sampler.state_dict(step=10))
    assert seen + list(resumed) == list(dual())
    with pytest.raises(ValueError, match=r"step must be in 0\.\.12.*got 13"):
        sampler.state_dict(step=13)


@ALL
def test_a_state_of_another_size_is_refused_by_name(build):
    sampler = build()
    others = {
        dual: (dual(LABELS[:-1]), "num_samples=99"),
        tri: (tri(num_pos=3), "positives_per_task=3"),
        query: (query(num_neg=2), "others_per_query=2"),
        group: (group(items_per_group=3), "items_per_group=3"),
    }
    other, name = others[build]
    with pytest.raises(ValueError, match=rf"got a state with .*{name}.*build the sampler as in"):
        sampler.load_state_dict(other.state_dict())
    foreign = next(f() for f in (dual, tri) if f is not build)
    with pytest.raises(ValueError, match=r"got a state with .*none"):
        sampler.load_state_dict(foreign.state_dict())
    with pytest.raises(ValueError, match=r"lacks \['seed', 'sizes'\].*state_dict\(\)"):
        sampler.load_state_dict({"epoch": 0, "step": 0})


def test_an_epoch_that_discards_the_loaded_position_is_told(caplog):
    sampler = dual()
    drawing = iter(sampler)
    next(drawing)
    sampler.load_state_dict(sampler.state_dict())
    sampler.set_epoch(0)
    assert not caplog.records
    sampler.set_epoch(2)
    assert "go on at batch 1 of epoch 0 and is set to epoch 2" in caplog.text
    assert len(list(sampler)) == len(sampler)


@ALL
@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_ranks_share_each_batch_of_one_process(build, world):
    ranks = [build(num_replicas=world, rank=rank) for rank in range(world)]
    alone = build()
    lengths = [len(rank) for rank in ranks]
    for _ in range(2):
        whole = list(alone)
        parts = list(zip(*ranks, strict=True))
        assert [[row for part in step for row in part] for step in parts] == whole
        assert all(min(map(len, step)) > 0 for step in parts)
    assert [len(rank) for rank in ranks] == lengths == [len(alone)] * world


def test_a_query_goes_to_one_rank_and_each_rank_has_its_positives():
    for step in zip(*(query(num_replicas=2, rank=rank) for rank in range(2)), strict=True):
        assert not set(QUERIES[step[0]].tolist()) & set(QUERIES[step[1]].tolist())
    for rank in range(3):
        for batch in dual(num_pos=6, num_replicas=3, rank=rank):
            assert LABELS[batch].sum() == 2


def test_a_state_may_be_loaded_by_another_number_of_ranks():
    one, two = (dual(num_replicas=2, rank=rank) for rank in range(2))
    drawing = iter(one)
    next(drawing)
    alone = dual()
    alone.load_state_dict(one.state_dict())
    two.load_state_dict(one.state_dict())
    parts = zip(drawing, two, strict=True)
    assert [[*first, *second] for first, second in parts] == list(alone)


@ALL
def test_a_sampler_feeds_a_loader_and_survives_pickling_midway(build):
    sampler = build()
    loader = DataLoader(with_index(TENSORS), batch_sampler=sampler)
    assert len(loader) == len(sampler)
    assert [index.tolist() for *_, index in loader] == list(build())
    copied = pickle.loads(pickle.dumps(sampler))
    assert list(copied) == list(copy.deepcopy(sampler))


def test_a_million_rows_take_a_tenth_of_a_second():
    labels = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)) < 0.02

    def seconds():  # of this process, for the machine may be busy; the best of three likewise
        start = time.process_time()
        sampler = DualSampler(labels, batch_size=128, num_pos=32)
        built = time.process_time()
        batches = sum(1 for _ in sampler)
        return built - start, (time.process_time() - built) / batches * 1000

    building, thousand_batches = map(min, zip(*(seconds() for _ in range(3)), strict=True))
    assert building <= 0.1
    assert thousand_batches <= 0.1


def test_a_state_beyond_the_epoch_is_refused() -> None:
    sampler = DualSampler([0, 1] * 10, batch_size=4, num_pos=2)
    state = sampler.state_dict() | {"step": 99}
    with pytest.raises(ValueError, match="got a state at batch 99 of an epoch of 5"):
        sampler.load_state_dict(state)
