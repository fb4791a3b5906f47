"""The cache of verdicts, in memory and in a file."""

import logging
import os
import pickle
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from reward.cache import NOT_STORED, VerdictCache
from reward.types import STATUSES, UNGRADABLE, Verdict

ROOT = Path(__file__).resolve().parents[2]
RIGHT = Verdict(1.0, "correct", "24", "exact", 0.25)
WRONG = Verdict(0.0, "wrong", "42", "another number", 0.5)


def status_verdict(status) -> Verdict:
    score = None if status in UNGRADABLE else float(status == "correct")
    return Verdict(score, status, "x")


def test_a_verdict_comes_back_as_it_went_in() -> None:
    cache = VerdictCache()
    cache.put(("exact", "24", "24"), RIGHT)
    assert cache.get(("exact", "24", "24")) == RIGHT
    assert (
        cache.get(
            (
                "exact",
                "2424",
            )
        )
        is None
    )
    assert (cache.hits, cache.misses) == (1, 1)


def test_the_verdict_used_longest_ago_leaves_first() -> None:
    cache = VerdictCache(size=2)
    cache.put(("a",), RIGHT)
    cache.put(("b",), RIGHT)
    assert cache.get(("a",)) is not None
    cache.put(("c",), WRONG)
    assert len(cache) == 2
    assert [cache.get((name,)) for name in "abc"] == [RIGHT, None, WRONG]


def test_putting_a_key_again_replaces_its_verdict(tmp_path) -> None:
    path = str(tmp_path / "verdicts.db")
    cache = VerdictCache(path=path)
    cache.put(("a",), RIGHT)
    cache.put(("a",), WRONG)
    cache.close()
    assert cache.get(("a",)) == WRONG
    assert VerdictCache(path=path).get(("a",)) == WRONG


@pytest.mark.parametrize("status", STATUSES)
def test_accidents_are_not_stored_and_judgements_are(status, tmp_path) -> None:
    assert {"timeout", "crash", "oom", "unavailable"} == NOT_STORED
    path = str(tmp_path / "verdicts.db")
    cache = VerdictCache(path=path)
    cache.put(("a",), status_verdict(status))
    expected = None if status in NOT_STORED else status_verdict(status)
    assert cache.get(("a",)) == expected
    assert VerdictCache(path=path).get(("a",)) == expected


def test_clear_forgets_and_counts_from_zero(tmp_path) -> None:
    path = str(tmp_path / "verdicts.db")
    cache = VerdictCache(path=path)
    cache.put(("a",), RIGHT)
    cache.get(("a",))
    cache.get(("b",))
    cache.clear()
    assert (cache.hits, cache.misses, len(cache)) == (0, 0, 0)
    assert cache.get(("a",)) is None
    assert VerdictCache(path=path).get(("a",)) is None


def test_the_file_remembers_what_memory_has_dropped(tmp_path) -> None:
    path = str(tmp_path / "verdicts.db")
    cache = VerdictCache(size=1, path=path)
    cache.put(("a",), RIGHT)
    cache.put(("b",), Verdict(None, "gold_unparsable"))
    assert cache.get(("a",)) == RIGHT
    later = VerdictCache(path=path)
    assert later.get(("a",)) == RIGHT
    assert later.get(("b",)) == Verdict(None, "gold_unparsable")
    assert (later.hits, later.misses) == (2, 0)


def test_keys_in_the_file_do_not_run_together(tmp_path) -> None:
    path = str(tmp_path / "verdicts.db")
    VerdictCache(path=path).put(("ab", "c"), RIGHT)
    cache = VerdictCache(path=path)
    assert [cache.get(key) for key in [("a", "bc"), ("abc",), ("ab", "c", "")]] == [None] * 3
    assert cache.get(("ab", "c")) == RIGHT


def test_a_lone_surrogate_is_kept_in_memory(tmp_path) -> None:
    cache = VerdictCache(path=str(tmp_path / "verdicts.db"))
    odd = Verdict(0.0, "wrong", "\ud800")
    cache.put(("\ud800",), odd)
    assert cache.get(("\ud800",)) == odd
    cache.put(("a",), RIGHT)
    assert VerdictCache(path=str(tmp_path / "verdicts.db")).get(("a",)) == RIGHT


def test_threads_share_a_cache(tmp_path) -> None:
    cache = VerdictCache(size=50, path=str(tmp_path / "verdicts.db"))
    wrong: list[object] = []

    def work(seed: int) -> None:
        for step in range(150):
            number = str((seed * 31 + step * 7) % 100)
            cache.put((number,), Verdict(1.0, "correct", number))
            found = cache.get((number,))
            if found is None or found.extracted != number:
                wrong.append((number, found))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (cache.hits, cache.misses, len(cache)) == (1200, 0, 50)


def test_processes_that_start_together_share_a_file(tmp_path) -> None:
    path = str(tmp_path / "verdicts.db")
    code = """
import sys
from reward.cache import VerdictCache
from reward.types import Verdict
cache = VerdictCache(path=sys.argv[1])
for i in range(200):
    cache.put((sys.argv[2], str(i)), Verdict(1.0, "correct", str(i)))
cache.close()
"""
    command = [sys.executable, "-c", code, path]
    running = [subprocess.Popen([*command, str(i)], cwd=ROOT) for i in range(4)]
    assert [process.wait(timeout=60) for process in running] == [0] * 4
    cache = VerdictCache(path=path)
    found = [cache.get((str(p), str(i))) for p in range(4) for i in range(200)]
    assert [v.extracted if v else None for v in found] == [str(i) for i in range(200)] * 4


def test_a_forked_process_reads_and_writes_too(tmp_path) -> None:
    path = str(tmp_path / "verdicts.db")
    code = """
import os, sys
from reward.cache import VerdictCache
from reward.types import Verdict
cache = VerdictCache(path=sys.argv[1])
cache.put(("parent",), Verdict(1.0, "correct"))
pid = os.fork()
if pid == 0:
    cache.put(("child",), Verdict(1.0, "correct"))
    os._exit(0 if cache.get(("parent",)) else 1)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
sys.exit(code or (0 if cache.get(("child",)) else 2))
"""
    run = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, timeout=60)
    assert run.returncode == 0


def test_a_file_that_is_no_database_is_refused_by_name_and_left_alone(tmp_path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"these are my notes, not a database\n" * 100)
    with pytest.raises(ValueError, match=r"got the cache file .*notes\.txt.*; need .*: delete it"):
        VerdictCache(path=str(path))
    assert path.read_bytes() == b"these are my notes, not a database\n" * 100


def test_a_database_of_another_program_is_refused_by_name_and_left_alone(tmp_path) -> None:
    path = tmp_path / "other.db"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE verdicts (case_number INTEGER, guilty INTEGER)")
    other.commit()
    other.close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"other\.db, which another program or version made"):
        VerdictCache(path=str(path))
    assert path.read_bytes() == before


def test_a_file_of_a_later_version_is_refused(tmp_path) -> None:
    path = str(tmp_path / "verdicts.db")
    VerdictCache(path=path).close()
    later = sqlite3.connect(path)
    later.execute("PRAGMA user_version = 99")
    later.commit()
    later.close()
    with pytest.raises(ValueError, match="version 99"):
        VerdictCache(path=path)


def test_a_damaged_file_is_refused_by_name(tmp_path) -> None:
    path = tmp_path / "verdicts.db"
    cache = VerdictCache(path=str(path))
    for i in range(500):
        cache.put((str(i),), Verdict(0.0, "wrong", "x" * 50))
    cache.close()
    content = bytearray(path.read_bytes())
    content[5000:9000] = os.urandom(4000)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"verdicts\.db, which is damaged"):
        VerdictCache(path=str(path))


def test_a_directory_that_is_missing_is_named(tmp_path) -> None:
    with pytest.raises(OSError, match=r"nowhere/v\.db.*; need .*: name another one"):
        VerdictCache(path=str(tmp_path / "nowhere" / "v.db"))


def test_a_file_that_fails_later_costs_a_warning_and_no_run(tmp_path, caplog) -> None:
    path = str(tmp_path / "verdicts.db")
    cache = VerdictCache(path=path)
    other = sqlite3.connect(path)
    other.execute("DROP TABLE verdicts")
    other.commit()
    other.close()
    with caplog.at_level(logging.WARNING):
        cache.put(("a",), RIGHT)
        cache.put(("b",), WRONG)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "verdicts.db failed" in caplog.text
    assert (cache.get(("a",)), cache.get(("b",))) == (RIGHT, WRONG)


def test_a_pickled_cache_travels_empty_with_its_file(tmp_path) -> None:
    cache = VerdictCache(size=7, path=str(tmp_path / "verdicts.db"))
    cache.put(("a",), RIGHT)
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.size, len(copy), copy.get(("a",))) == (7, 0, RIGHT)


def test_a_size_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="size must be at least 1, got 0; make no cache"):
        VerdictCache(size=0)
