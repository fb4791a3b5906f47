"""Who may call the pool, how its workers come and go, and that none stays behind."""

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reward import pool as pool_module
from reward.pool import Outcome, WorkerPool, shared_pool
from tests.reward import pool_tasks as tasks
from tests.reward.pool_checks import eventually, lives, script, statuses, values


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2) as pool:
        yield pool


# Callers


def test_sixteen_threads_share_the_workers(pool) -> None:
    wrong: list[object] = []

    def work(seed: int) -> None:
        for step in range(60):
            found = values(pool.map(tasks.double, [(seed,), (step,), (seed * step,)]))
            if found != [2 * seed, 2 * step, 2 * seed * step]:
                wrong.append((seed, step, found))
        if statuses(pool.map(tasks.act, [("exit", seed), ("double", 1)])) != ["crash", "ok"]:
            wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_small_batch_does_not_wait_for_a_large_one(pool) -> None:
    large = threading.Thread(target=pool.map, args=(tasks.slow_double, [(0.02, 1)] * 100))
    large.start()
    time.sleep(0.3)
    start = time.monotonic()
    assert pool.map(tasks.double, [(1,)])[0].value == 2
    assert time.monotonic() - start < 0.4
    assert large.is_alive()
    large.join()


def test_an_event_loop_goes_on_while_workers_work(pool) -> None:
    async def main() -> tuple[list[list[Outcome]], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.02)
                ticks += 1

        ticking = asyncio.create_task(tick())
        sleeps = pool.amap(tasks.act, [("sleep", 0)], deadline=0.6)
        found = await asyncio.gather(sleeps, *(pool.amap(tasks.double, [(i,)]) for i in range(50)))
        ticking.cancel()
        return found, ticks

    found, ticks = asyncio.run(main())
    assert found[0][0].status == "timeout"
    assert [outcomes[0].value for outcomes in found[1:]] == [2 * i for i in range(50)]
    assert ticks >= 10


def test_a_cancelled_task_drops_its_batch(pool) -> None:
    async def main() -> float:
        task = asyncio.create_task(pool.amap(tasks.act, [("sleep", 0)] * 20, deadline=20))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        start = time.monotonic()
        assert values(await pool.amap(tasks.double, [(4,)])) == [8]
        return time.monotonic() - start

    assert asyncio.run(main()) < 5


def test_a_function_of_a_script_without_a_guard_is_called() -> None:
    code = """
import operator
from reward.pool import WorkerPool
pool = WorkerPool(2)
print([o.value for o in pool.map(operator.add, [(1, 2), (3, 4)])])
"""
    process = script(code)
    assert process.communicate(timeout=60)[0] == "[3, 7]\n"
    assert process.returncode == 0


def test_a_function_that_no_worker_can_import_is_refused(pool, tmp_path, monkeypatch) -> None:
    with pytest.raises(TypeError, match=r"lambda.*need a function at the top of a module"):
        pool.map(lambda x: x, [(1,)])
    (tmp_path / "broken_in_workers.py").write_text(
        "import sys\n"
        "if 'pytest' not in sys.modules:\n    raise OSError('no licence here')\n"
        "def work(number):\n    return number\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from broken_in_workers import work  # pyright: ignore[reportMissingImports]

    with pytest.raises(RuntimeError, match=r"could not import .*OSError: no licence here; need it"):
        pool.map(work, [(1,), (2,)])
    monkeypatch.setattr(work, "__module__", "__main__")
    with pytest.raises(TypeError, match=r"of the main module, need .*; move it there"):
        pool.map(work, [(1,)])
    with pytest.raises(TypeError, match=r"item 1 is of type int, need a tuple .*; write \(item,\)"):
        pool.map(tasks.double, [(1,), 2])  # pyright: ignore[reportArgumentType]
    assert values(pool.map(tasks.double, [(1,)])) == [2]


# Workers


def test_killed_workers_are_replaced() -> None:
    with WorkerPool(3) as pool:
        assert len(pool.map(tasks.double, [(i,) for i in range(100)])) == 100
        killed = set()
        for _ in range(5):
            pid = pool.pids()[0]
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
            assert eventually(lambda pid=pid: pid not in pool.pids() and len(pool.pids()) == 3)
        outcomes = pool.map(tasks.act, [("hang", i) for i in range(5)], deadline=0.2)
        assert statuses(outcomes) == ["timeout"] * 5
        assert len(killed) == 5
        assert eventually(lambda: len(pool.pids()) == 3 and all(map(lives, pool.pids())))
        assert values(pool.map(tasks.double, [(i,) for i in range(99)])) == list(range(0, 198, 2))


def test_workers_killed_before_they_are_ready_are_replaced_too() -> None:
    with WorkerPool(2) as pool:
        killed = set()
        while len(killed) < 6:
            for pid in set(pool.pids()) - killed:
                killed.add(pid)
                os.kill(pid, signal.SIGKILL)
        assert values(pool.map(tasks.double, [(3,)])) == [6]


def test_a_worker_is_recycled_after_its_share_of_items() -> None:
    with WorkerPool(1, recycle_after=40) as pool:
        served = values(pool.map(tasks.who, [(i,) for i in range(400)]))
    assert len(set(served)) >= 5
    assert max(served.count(pid) for pid in served) <= 40 + 32


def test_a_worker_is_recycled_when_it_has_grown() -> None:
    with WorkerPool(1, recycle_rss=200 << 20) as pool:
        small = [pool.map(tasks.swell_and_shrink, [(1,)])[0].value for _ in range(3)]
        pool.map(tasks.swell_and_shrink, [(256,)])
        assert len(set(small)) == 1
        assert pool.map(tasks.who, [(1,)])[0].value != small[0]


def test_fifty_thousand_items_keep_a_worker_small() -> None:
    with WorkerPool(2, recycle_after=10**9) as pool:
        pool.map(tasks.double, [(1,)])
        pids = set(pool.pids())
        assert statuses(pool.map(tasks.double, [(i,) for i in range(50_000)])) == ["ok"] * 50_000
        assert set(pool.pids()) == pids
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
    assert max(pages) * os.sysconf("SC_PAGE_SIZE") < 300 << 20


def test_ten_thousand_trivial_items_take_a_second(pool) -> None:
    pool.map(tasks.double, [(1,)] * 100)
    rates = []
    for _ in range(3):  # the best of three: the machine may be busy
        start = time.monotonic()
        pool.map(tasks.double, [(i,) for i in range(5000)])
        rates.append(5000 / (time.monotonic() - start))
    assert max(rates) >= 10_000


def test_cpu_seconds_of_a_worker_do_not_end_it() -> None:
    with WorkerPool(1) as pool:  # at most 3 s of CPU each, as 2 * 0.4 + 2 is rounded up
        outcomes = pool.map(tasks.spin, [(0.25,)] * 14, deadline=0.4)
    assert statuses(outcomes).count("ok") >= 13  # the machine may be busy
    assert all(o.detail.startswith("killed at its deadline") for o in outcomes if o.value is None)


def test_the_limit_of_cpu_time_moves_on_within_a_chunk(pool) -> None:
    first, second = pool.map(tasks.cpu_limits, [(1.1,)], deadline=10)[0].value
    assert second in (first + 1, first + 2)


def test_the_kernel_ends_an_item_while_the_parent_is_stopped() -> None:
    code = """
import sys
from reward.pool import WorkerPool
from tests.reward import pool_tasks as tasks
pool = WorkerPool(1)
pool.map(tasks.double, [(1,)])
print(*pool.pids(), flush=True)
print(pool.map(tasks.act, [("hang", 1)], deadline=0.5)[0].status, flush=True)
"""
    process = script(code)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    time.sleep(0.2)
    process.send_signal(signal.SIGSTOP)
    try:
        assert eventually(lambda: not lives(worker), seconds=15)
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == "timeout\n"


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"preload": ["no_such_module_anywhere"]}, "No module named 'no_such_module_anywhere'"),
        ({"memory_limit": 1 << 20}, "pool did not start: MemoryError"),
    ],
)
def test_workers_that_cannot_start_are_an_error_that_names_the_cause(arguments, cause) -> None:
    with WorkerPool(2, **arguments) as pool:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"{cause}.*need a worker that imports.*mend"):
                pool.map(tasks.double, [(1,)])
        assert not pool.usable
        assert eventually(lambda: pool.pids() == [])


# The end


def test_closing_twice_is_closing_once() -> None:
    pool = WorkerPool(2)
    pool.map(tasks.double, [(1,)])
    pids = pool.pids()
    pool.close()
    assert not any(map(lives, pids))
    pool.close()
    with pytest.raises(RuntimeError, match=r"got a batch for a closed pool, need .*: make a new"):
        pool.map(tasks.double, [(1,)])


def test_a_map_that_waits_hears_of_the_close() -> None:
    pool = WorkerPool(1)
    pool.map(tasks.double, [(1,)])
    threading.Timer(0.3, pool.close).start()
    with pytest.raises(RuntimeError, match="closed while it worked on a batch"):
        pool.map(tasks.act, [("sleep", 1)], deadline=20)


def test_a_pool_that_nobody_holds_ends_its_workers() -> None:
    pool = WorkerPool(1)
    pool.map(tasks.double, [(1,)])
    pids = pool.pids()
    del pool
    assert eventually(lambda: not any(map(lives, pids)))


HOLD = """
import sys, threading, time
from reward.pool import WorkerPool
from tests.reward import pool_tasks as tasks
pool = WorkerPool(2)
pool.map(tasks.double, [(1,)])
threading.Thread(
    target=pool.map, args=(tasks.act, [("hang", 1), ("double", 2)]), kwargs={"deadline": 50},
    daemon=True,
).start()
time.sleep(0.3)
print(*pool.pids(), flush=True)
if sys.argv[1] == "wait":
    time.sleep(50)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, None])
def test_no_worker_outlives_its_parent(how) -> None:
    process = script(HOLD, "wait" if how else "end", stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    assert how is None or all(map(lives, pids))
    if how is not None:
        process.send_signal(how)
    process.wait(timeout=20)
    process.stdout.close()
    assert eventually(lambda: not any(map(lives, pids)), seconds=3)


def test_workers_do_not_end_with_the_thread_that_asked_first(pool) -> None:
    found: list[WorkerPool] = []
    thread = threading.Thread(target=lambda: found.append(WorkerPool(1)))
    thread.start()
    thread.join()
    with found[0] as pool:
        first = pool.map(tasks.who, [(1,)])[0].value
        time.sleep(0.3)
        assert pool.map(tasks.who, [(1,)])[0].value == first


def test_a_forked_process_gets_a_shared_pool_of_its_own() -> None:
    code = """
import os, sys
from reward.pool import shared_pool
from tests.reward import pool_tasks as tasks
pool = shared_pool()
pool.map(tasks.who, [(0,)])
parents = set(pool.pids())
pid = os.fork()
if pid == 0:
    try:
        pool.map(tasks.double, [(1,)])
    except RuntimeError as error:
        refused = "use shared_pool()" in str(error)
    own = shared_pool().map(tasks.who, [(1,)])[0].value
    pool.close()
    shared_pool().close()
    os._exit(0 if refused and own not in parents else 1)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
after = pool.map(tasks.who, [(1,)])[0].value
print(code, after in parents, shared_pool() is pool)
"""
    process = script(code)
    assert process.communicate(timeout=60)[0] == "0 True True\n"


def test_the_shared_pool_is_one_until_it_is_closed() -> None:
    first = shared_pool()
    assert shared_pool() is first
    assert first.map(tasks.double, [(1,)])[0].value == 2
    first.close()
    second = shared_pool()
    assert second is not first
    assert second.map(tasks.double, [(1,)])[0].value == 2
    second.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers must be above 0, got 0"),
        ({"deadline": 0}, "deadline must be above 0, got 0"),
        ({"deadline": float("nan")}, "deadline must be above 0, got nan"),
        ({"preload": "reward"}, r"preload must be a list, got 'reward'; write \['reward'\]"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        WorkerPool(**arguments)


def test_the_ranks_of_a_machine_share_its_cores(monkeypatch, tmp_path) -> None:
    cores = len(os.sched_getaffinity(0))
    limits = tmp_path / "cpu.max"
    for text, quota in [("max 100000", float("inf")), ("150000 100000", 1.5)]:
        limits.write_text(f"{text}\n")
        assert pool_module._quota(str(limits)) == quota
    monkeypatch.setattr(pool_module, "_quota", lambda: 64.0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cores))
    with WorkerPool() as pool:
        assert pool.workers == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    with WorkerPool() as pool:
        assert pool.workers == cores
