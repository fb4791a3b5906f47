"""Completions written to hang, swell, crash or cheat: each ends in time, with a score of zero."""

import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reward.math import MathVerifier
from reward.pool import WorkerPool
from tests.reward.hostile import HOSTILE

DEADLINE = 2.0
GOLDS = ["1729", r"\frac{x^2+17}{\sqrt{3}}"]


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2, deadline=DEADLINE) as workers:
        MathVerifier(pool=workers).verify(r"\sqrt{8}", r"\boxed{2\sqrt{2}}")  # workers are up
        yield workers


@pytest.mark.parametrize("gold", GOLDS)
def test_every_hostile_completion_ends_in_time_and_is_not_paid_in_strict_mode(
    pool: WorkerPool, gold: str
) -> None:
    verifier = MathVerifier(pool=pool, deadline=DEADLINE)
    late, paid = {}, {}
    for name, text in HOSTILE.items():
        start = time.perf_counter()
        verdict = verifier.verify(gold, text)
        late[name] = time.perf_counter() - start
        if verdict.score != 0.0:
            paid[name] = verdict
    assert not {name: seconds for name, seconds in late.items() if seconds > DEADLINE + 0.5}
    assert not paid


def test_the_whole_list_is_graded_as_one_batch_in_lenient_mode(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    verifier = MathVerifier(mode="lenient", pool=pool, deadline=0.5)
    start = time.perf_counter()
    verdicts = [verifier.verify("1729", text) for text in HOSTILE.values()]
    assert time.perf_counter() - start < 60
    assert all(verdict.score == 0.0 for verdict in verdicts)
    assert not list(tmp_path.iterdir())  # no payload ran
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_two_bombs_delay_a_thousand_easy_answers_by_less_than_their_deadline(
    pool: WorkerPool,
) -> None:
    bombs = [
        r"\boxed{\sum_{i=1}^{10^6}\sum_{j=1}^{10^6}\frac{i}{j+i}}",
        r"\boxed{\prod_{k=1}^{10^8}\frac{k}{k+2}}",
    ]
    easy = [f"\\boxed{{\\sqrt{{{n * n * 2}}}}}" for n in range(1, 501)] * 2
    golds = ["4", "4"] + [f"{n}\\sqrt{{2}}" for n in range(1, 501)] * 2
    verifier = MathVerifier(mode="lenient", pool=pool, deadline=DEADLINE)
    start = time.perf_counter()
    verdicts = verifier.verify_batch(golds, bombs + easy)
    assert time.perf_counter() - start < 15
    assert [verdict.score for verdict in verdicts] == [0.0] * 2 + [1.0] * 1000


def test_an_alarm_of_the_host_still_fires(pool: WorkerPool) -> None:
    fired = []
    before = signal.signal(signal.SIGALRM, lambda *_: fired.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        MathVerifier(pool=pool).verify(r"\sqrt{18}", r"\boxed{3\sqrt{2}}")
        time.sleep(0.5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert fired == [True]
