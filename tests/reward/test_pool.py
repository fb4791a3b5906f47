"""Worker processes with a deadline per item: what hangs or crashes costs one item."""

import logging
import os
import pickle
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward import worker
from reward.pool import WorkerPool
from tests.reward import pool_tasks as tasks
from tests.reward.pool_checks import eventually, lives, script, statuses, values


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2) as pool:
        yield pool


# Results


def test_outcomes_come_in_order_with_values_and_times(pool) -> None:
    outcomes = pool.map(tasks.double, [(i,) for i in range(500)])
    assert values(outcomes) == [2 * i for i in range(500)]
    assert set(statuses(outcomes)) == {"ok"}
    assert all(outcome.detail == "" and 0 <= outcome.seconds < 1 for outcome in outcomes)


def test_no_items_give_no_outcomes(pool) -> None:
    assert pool.map(tasks.double, []) == []


def test_two_bombs_among_a_thousand_easy_items_cost_two_items() -> None:
    items = [("double", i) for i in range(1002)]
    items[200] = ("hang", 200)
    items[700] = ("tower", 7)  # one call into C that no signal handler of Python can end
    start = time.monotonic()
    with WorkerPool(2) as pool:
        outcomes = pool.map(tasks.act, items)
    assert time.monotonic() - start < 15
    assert [i for i, outcome in enumerate(outcomes) if outcome.status == "timeout"] == [200, 700]
    assert outcomes[200].detail == "killed at its deadline of 2 s"
    assert 1.9 < outcomes[700].seconds < 3.5
    right = [2 * i for i in range(1002) if i not in (200, 700)]
    assert [outcome.value for outcome in outcomes if outcome.status == "ok"] == right


EXPECTED = {"hang": "timeout", "exit": "crash", "raise": "crash", "segfault": "crash"}


@pytest.mark.parametrize("seed", range(3))
def test_a_fifth_of_hanging_and_crashing_items_leaves_the_others_in_place(pool, seed) -> None:
    rng = random.Random(seed)
    kinds = ["hang", "exit", "raise", "segfault"]
    items = [(rng.choice(kinds) if rng.random() < 0.2 else "double", i) for i in range(60)]
    outcomes = pool.map(tasks.act, items, deadline=0.3)
    assert statuses(outcomes) == [EXPECTED.get(kind, "ok") for kind, _ in items]
    assert values(outcomes) == [2 * i if kind == "double" else None for kind, i in items]
    order = list(range(len(items)))
    rng.shuffle(order)
    permuted = pool.map(tasks.act, [items[i] for i in order], deadline=0.3)
    assert statuses(permuted) == [statuses(outcomes)[i] for i in order]
    assert values(permuted) == [values(outcomes)[i] for i in order]


ACTS = st.sampled_from(["double"] * 16 + ["hang", "exit", "raise", "segfault"])


@settings(max_examples=12, deadline=None)
@given(kinds=st.lists(ACTS, min_size=1, max_size=30))
def test_whatever_fails_every_outcome_stands_in_the_place_of_its_item(pool, kinds) -> None:
    outcomes = pool.map(tasks.act, [(kind, i) for i, kind in enumerate(kinds)], deadline=0.3)
    assert statuses(outcomes) == [EXPECTED.get(kind, "ok") for kind in kinds]
    assert values(outcomes) == [2 * i if k == "double" else None for i, k in enumerate(kinds)]


def test_one_worker_or_four_give_the_same_three_times() -> None:
    kinds = ["double", "raise", "double", "exit", "segfault"]
    items = [(kinds[i % 5], i) for i in range(25)]
    texts = [(str(i),) for i in range(20)]
    seen = set()
    for workers in (1, 4, 4):
        with WorkerPool(workers) as pool:
            outcomes = pool.map(tasks.act, items)
            found = [(o.status, o.value, o.detail) for o in outcomes]
            seen.add((tuple(found), tuple(values(pool.map(tasks.hash_of, texts)))))
    assert len(seen) == 1


def test_an_item_behind_one_that_hangs_is_run_once_and_elsewhere(tmp_path) -> None:
    log = tmp_path / "log"
    module = tmp_path / "logs_its_items.py"
    module.write_text(
        "import os, time\n"
        "def work(path, number):\n"
        "    with open(path, 'a') as file:\n"
        "        file.write(f'{number}\\n')\n"
        "    if number == 3:\n"
        "        time.sleep(60)\n"
        "    return number, os.getpid()\n"
    )
    sys.path.append(str(tmp_path))
    try:
        from logs_its_items import work  # pyright: ignore[reportMissingImports]

        with WorkerPool(1) as pool:
            outcomes = pool.map(work, [(str(log), i) for i in range(40)], deadline=0.5)
    finally:
        sys.path.remove(str(tmp_path))
    assert [o.value[0] if o.value else None for o in outcomes] == [0, 1, 2, None, *range(4, 40)]
    assert sorted(map(int, log.read_text().split())) == list(range(40))
    assert outcomes[2].value[1] != outcomes[4].value[1]


# What an item may do


@pytest.mark.parametrize(
    ("function", "item", "detail"),
    [
        (tasks.act, ("raise", 7), "ValueError: number 7"),
        (tasks.act, ("exit", 3), "the worker exited with code 3"),
        (tasks.act, ("exit", 0), "the worker exited with code 0"),
        (tasks.act, ("segfault", 0), "the worker was ended by signal 11 (Segmentation fault)"),
        (tasks.exit_python, (1,), "SystemExit: item 1"),
        (tasks.interrupt, (1,), "KeyboardInterrupt: 1"),
        (tasks.raise_awkward, (1,), "Awkward (its text raised too)"),
        (tasks.double, (1, 2), "TypeError: double() takes 1 positional argument but 2 were given"),
        (tasks.unpicklable, (1,), "TypeError: cannot pickle '_thread.lock' object"),
        (tasks.opens_badly, (1,), "the result cannot be unpickled: ValueError: cannot be opened"),
        (tasks.huge, (70 << 20,), "result of 73400"),
        (tasks.make_a_pool, (1,), "RuntimeError: got a pool inside a worker of a pool"),
    ],
)
def test_a_crash_is_said_in_one_line_and_costs_one_item(pool, function, item, detail) -> None:
    outcome = pool.map(function, [item])[0]
    assert (outcome.status, outcome.value) == ("crash", None)
    assert outcome.detail.startswith(detail)
    assert "\n" not in outcome.detail and len(outcome.detail) <= 400
    assert values(pool.map(tasks.double, [(i,) for i in range(50)])) == [2 * i for i in range(50)]


def test_an_item_that_does_not_pickle_crashes_alone(pool) -> None:
    outcomes = pool.map(tasks.double, [(1,), (threading.Lock(),), (3,)])
    assert values(outcomes) == [2, None, 6]
    assert outcomes[1].status == "crash"
    assert outcomes[1].detail.startswith("the item cannot be pickled: TypeError")


def test_memory_that_runs_out_is_told_apart() -> None:
    with WorkerPool(1, memory_limit=512 << 20) as pool:
        items = [("double", 1), ("swell", 2), ("double", 3)]
        outcomes = pool.map(tasks.act, items, deadline=20)
        assert statuses(outcomes) == ["ok", "oom", "ok"]
        assert outcomes[1].detail == "MemoryError"
        assert statuses(pool.map(bytearray, [(40 << 20,), (600 << 20,)])) == ["ok", "oom"]


def test_a_worker_killed_for_its_memory_is_told_apart_too() -> None:
    # apart, as a process takes over the peak of the one that starts it, and this one has torch
    code = """
from reward.pool import WorkerPool
from tests.reward import pool_tasks as tasks
pool = WorkerPool(1, memory_limit=512 << 20)
print(*(o.status for o in pool.map(tasks.swell_and_die, [(300,), (1,)])))
"""
    assert script(code).communicate(timeout=60)[0] == "oom crash\n"


def test_what_an_item_writes_goes_nowhere(pool, capfd) -> None:
    assert values(pool.map(tasks.write_everywhere, [(i,) for i in range(20)])) == list(range(20))
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


ANSWER = worker.frame(worker.OK, payload=pickle.dumps(1))


@pytest.mark.parametrize(
    "content",
    [b"\xee" * 200, worker.frame(99), worker.frame(worker.READY), ANSWER, ANSWER * 9, ANSWER[:9]],
)
def test_an_item_that_writes_into_the_socket_does_not_end_the_pool(pool, content) -> None:
    assert len(pool.map(tasks.write_into_the_socket, [(content,), (b"",)], deadline=0.3)) == 2
    assert values(pool.map(tasks.double, [(i,) for i in range(50)])) == [2 * i for i in range(50)]


def test_of_an_item_that_forks_only_one_process_answers(pool) -> None:
    outcomes = pool.map(tasks.fork, [(i,) for i in range(10)])
    assert values(outcomes) == [(i, False) for i in range(10)]


def test_processes_of_a_killed_item_end_with_it(pool) -> None:
    child = pool.map(tasks.start_a_process, [(0,)])[0].value
    assert lives(child)
    with WorkerPool(1) as other:
        inner = other.map(tasks.start_a_process, [(0,)])[0].value
        assert other.map(tasks.start_a_process, [(1,)], deadline=0.5)[0].status == "timeout"
        assert eventually(lambda: not lives(inner))
    os.kill(child, signal.SIGKILL)


def test_ctrl_c_does_not_reach_an_item(pool) -> None:
    assert pool.map(tasks.interrupt_itself, [(5,)])[0].value == 5


def test_workers_import_little_and_not_the_main_module_again(pool) -> None:
    assert pool.map(tasks.loaded, [(1,)])[0].value == []
    assert pool.map(tasks.main_module, [(1,)])[0].value == ["main", "sys"]


# Deadlines


def test_start_up_and_imports_take_no_time_of_an_item(tmp_path, monkeypatch) -> None:
    (tmp_path / "slow_to_start.py").write_text("import time\ntime.sleep(0.5)\n")
    (tmp_path / "slow_to_import.py").write_text(
        "import sys, time\n"
        "if 'pytest' not in sys.modules:\n    time.sleep(0.5)\n"
        "def work(number):\n    return number\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from slow_to_import import work  # pyright: ignore[reportMissingImports]

    with WorkerPool(1, deadline=0.3, preload=["slow_to_start"]) as pool:
        start = time.monotonic()
        assert pool.map(work, [(1,)])[0].value == 1
        assert time.monotonic() - start > 1


def test_a_deadline_is_kept_to_half_a_second(pool) -> None:
    start = time.monotonic()
    outcomes = pool.map(tasks.act, [("sleep", 0), ("hang", 1)], deadline=0.7)
    assert statuses(outcomes) == ["timeout", "timeout"]
    assert 0.7 <= time.monotonic() - start < 1.2
    assert pool.map(tasks.slow_double, [(0.4, 4)], deadline=0.7)[0].value == 8


def test_each_item_of_a_chunk_has_the_whole_deadline() -> None:
    with WorkerPool(1) as pool:  # four items to a message at first
        outcomes = pool.map(tasks.slow_double, [(0.2, i) for i in range(8)], deadline=0.6)
    assert values(outcomes) == list(range(0, 16, 2))


def test_a_batch_deadline_ends_all_with_a_warning(caplog) -> None:
    items = [(0.0, i) for i in range(4)] + [(0.4, i) for i in range(30)]
    with WorkerPool(2, batch_deadline=1.0) as pool:
        pool.map(tasks.double, [(1,)])
        start = time.monotonic()
        with caplog.at_level(logging.WARNING):
            outcomes = pool.map(tasks.slow_double, items)
        assert time.monotonic() - start < 1.7
        assert len(outcomes) == 34 and set(statuses(outcomes)) == {"ok", "timeout"}
        assert values(outcomes)[:4] == [0, 2, 4, 6]
        late = [outcome for outcome in outcomes if outcome.status == "timeout"]
        assert late[0].detail == "no result within the batch deadline of 1 s"
        assert f"{len(late)} of 34 items had no result" in caplog.text
        assert values(pool.map(tasks.double, [(1,)])) == [2]
        assert len(caplog.records) == 1


def test_the_alarm_of_the_host_still_fires(pool) -> None:
    fired = []
    before = signal.signal(signal.SIGALRM, lambda *_: fired.append(time.monotonic()))
    try:
        start = time.monotonic()
        signal.alarm(1)
        assert statuses(pool.map(tasks.act, [("sleep", 0)], deadline=1.2)) == ["timeout"]
        assert len(fired) == 1 and fired[0] - start < 1.3
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_handler_that_raises_drops_the_batch_and_not_the_pool(pool) -> None:
    def ring(*_) -> None:
        raise TimeoutError("the host's own limit")

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        start = time.monotonic()
        with pytest.raises(TimeoutError, match="the host's own limit"):
            pool.map(tasks.act, [("sleep", i) for i in range(20)], deadline=20)
        assert values(pool.map(tasks.double, [(1,), (2,)])) == [2, 4]
        assert time.monotonic() - start < 5
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
