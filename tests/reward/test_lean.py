"""The Lean verifier against a `lake` that is a script: what it is given, and how it is ended."""

import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reward import lean
from reward.lean import LeanVerifier, lean_reward

GOLD = "theorem two (n : Nat) : n + 0 = n := by sorry"
PROOF = "```lean\ntheorem two (n : Nat) :\n    n + 0 = n := by\n  simp\n```"
# Writes down what it reads, and acts by what stands in the proof.
SCRIPT = """#!/bin/sh
test "$1 $2" = "env lean" || exit 3
if grep -q xrisk_probe "$3"; then exit PROBE; fi
cat "$3" > "LOG/source"; pwd > "LOG/folder"; env > "LOG/environment"
if grep -q hang "$3"; then sleep 60 & echo $! > "LOG/child"; sleep 60; fi
if grep -q segfault "$3"; then kill -SEGV $$; fi
if grep -q flood "$3"; then yes | head -c 5000000; fi
if grep -q linger "$3"; then sleep 60 & echo $! > "LOG/child"; fi
if grep -q falsity "$3"; then echo "$3:3:2: error: unsolved goals"; exit 1; fi
if grep -q cheat "$3"; then echo "'two' depends on axioms: [propext, sorryAx]"; exit 0; fi
if grep -q silent "$3"; then exit 0; fi
if grep -q other "$3"; then echo "'other' depends on axioms: [propext]"; exit 0; fi
if grep -q choice "$3"; then
    echo "'two' depends on axioms: [propext, Classical.choice, Quot.sound]"; exit 0
fi
echo "'two' does not depend on any axioms"
"""


@pytest.fixture(autouse=True)
def no_memory_of_other_tests() -> Iterator[None]:
    lean._probe.cache_clear()
    yield
    lean._probe.cache_clear()


def fake_lake(folder: Path, *, probe: int = 0) -> str:
    path = folder / "bin" / "lake"
    path.parent.mkdir()
    path.write_text(SCRIPT.replace("LOG", str(folder)).replace("PROBE", str(probe)))
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def lake(tmp_path: Path) -> str:
    return fake_lake(tmp_path)


def block(proof: str) -> str:
    return f"Here it is.\n```lean4\n{proof}\n```\nDone."


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def is_gone(pid: int) -> bool:
    end = time.monotonic() + 5
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_alive(pid)


def test_without_lake_nothing_is_graded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    verdict = LeanVerifier().verify(GOLD, PROOF)
    assert (verdict.score, verdict.status) == (None, "unavailable")
    assert verdict.detail == "lake is not installed"
    assert lean_reward(["p"] * 2, [PROOF, "x"], answer=[GOLD] * 2) == [None, None]


def test_a_lake_that_checks_nothing_is_no_lake(tmp_path: Path) -> None:
    verdict = LeanVerifier(lake=fake_lake(tmp_path, probe=1)).verify(GOLD, PROOF)
    assert verdict.status == "unavailable"
    assert "fails on a one-line theorem" in verdict.detail


def test_a_project_that_is_not_there_is_no_project(lake: str, tmp_path: Path) -> None:
    verdict = LeanVerifier(str(tmp_path / "none"), lake=lake).verify(GOLD, PROOF)
    assert (verdict.score, verdict.status) == (None, "unavailable")
    assert "none is no directory" in verdict.detail


def test_lake_is_found_on_the_path(
    lake: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", f"{Path(lake).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("LEAN_PROJECT", str(tmp_path))
    monkeypatch.setenv("LEAN_HEADER", "import Mathlib")
    metrics: dict[str, float] = {}
    rewards = lean_reward(
        ["p"] * 4,
        [[{"role": "assistant", "content": PROOF}], block("by falsity"), PROOF, PROOF],
        answer=[GOLD, GOLD, "two plus two", GOLD],
        finish_reasons=["stop", "stop", "stop", "length"],
        log_metric=metrics.__setitem__,
    )
    assert rewards == [1.0, 0.0, None, 0.0]
    assert metrics == {
        f"lean/{status}_rate": 0.25
        for status in ("correct", "wrong", "gold_unparsable", "truncated")
    }
    assert (tmp_path / "folder").read_text().strip() == str(tmp_path.resolve())
    assert (tmp_path / "source").read_text().startswith("import Mathlib\n\ntheorem two (n : Nat)")


@pytest.mark.parametrize(
    "ending", [":=", ":= by", ":= by sorry", ":=\n  sorry", ":= by\n  sorry\n"]
)
@pytest.mark.parametrize(
    "completion",
    [
        PROOF,
        block("  simp"),
        block("by\n  simp"),
        block(":= by\n  simp"),
        block("import Mathlib\nopen Nat\n\ntheorem two (n : Nat) : n + 0 = n := by\n  simp"),
        block("theorem one : 1 = 1 := sorry") + block("by\n  simp"),
    ],
)
def test_the_theorem_is_the_golds_and_the_proof_the_completions(
    ending: str, completion: str, lake: str, tmp_path: Path
) -> None:
    gold = f"theorem two (n : Nat) : n + 0 = n {ending}"
    assert LeanVerifier(lake=lake).verify(gold, completion).status == "correct"
    source = " ".join((tmp_path / "source").read_text().split())
    assert source == "theorem two (n : Nat) : n + 0 = n := by simp #print axioms two"


def test_another_theorem_is_no_proof_of_this_one(lake: str, tmp_path: Path) -> None:
    LeanVerifier(lake=lake).verify(GOLD, block("theorem two : True := trivial"))
    source = (tmp_path / "source").read_text()
    assert source.split()[:11] == GOLD.split()[:11]
    assert ":= by\n  theorem two : True" in source  # which Lean refuses


@pytest.mark.parametrize(
    ("proof", "status", "detail"),
    [
        ("by choice", "correct", "checked, standard axioms"),
        ("by falsity", "wrong", "unsolved goals"),
        ("by cheat", "wrong", "rests on sorryAx"),
        ("by other", "wrong", "lean does not list the axioms of the theorem"),
        ("by silent", "wrong", "lean does not list the axioms of the theorem"),
        ("by segfault", "crash", "lean ended on signal 11"),
        ("by sorry", "wrong", "sorry in the proof: refused unread"),
        ("by exact IO.println", "wrong", "IO in the proof: refused unread"),
        ("by simp\n#eval 1", "wrong", "#eval in the proof: refused unread"),
        ("by simp\n#eval! 1", "wrong", "#eval in the proof: refused unread"),
        ("by native_decide", "wrong", "native_decide in the proof: refused unread"),
        ("by simp -- x" + "x" * 20_000, "too_long", "20012 characters"),
        ("", "no_answer", "no ```lean block with a proof in it"),
    ],
)
def test_how_a_proof_ends_is_told_apart(proof: str, status: str, detail: str, lake: str) -> None:
    verdict = LeanVerifier(lake=lake).verify(GOLD, block(proof))
    assert (verdict.status, verdict.detail) == (status, detail)
    assert verdict.score == float(status == "correct")


@pytest.mark.parametrize(
    "completion", ["", "simp", "```lean\nby simp", "```\nby simp\n```", "\x00"]
)
def test_text_without_a_closed_block_has_no_proof(completion: str, lake: str) -> None:
    verdict = LeanVerifier(lake=lake).verify(GOLD, completion)
    assert (verdict.score, verdict.status) == (0.0, "no_answer")


@pytest.mark.parametrize("gold", ["", None, 3, [], "two", "theorem two : True", "x := by"])
def test_only_a_gold_that_is_no_theorem_leaves_the_score_open(gold: object, lake: str) -> None:
    verdict = LeanVerifier(lake=lake).verify(gold, PROOF)
    assert (verdict.score, verdict.status) == (None, "gold_unparsable")


def test_a_proof_that_hangs_is_killed_with_all_it_started(lake: str, tmp_path: Path) -> None:
    verifier = LeanVerifier(lake=lake, timeout=1.0)
    start = time.monotonic()
    verdict = verifier.verify(GOLD, block("by hang"))
    assert time.monotonic() - start < 3.0
    assert (verdict.score, verdict.status) == (0.0, "timeout")
    assert is_gone(int((tmp_path / "child").read_text()))


def test_a_child_that_stays_behind_is_killed_and_not_waited_for(lake: str, tmp_path: Path) -> None:
    start = time.monotonic()
    assert LeanVerifier(lake=lake).verify(GOLD, block("by linger")).status == "correct"
    assert time.monotonic() - start < 10.0
    assert is_gone(int((tmp_path / "child").read_text()))


def test_a_flood_of_output_is_read_and_dropped(lake: str) -> None:
    verdict = LeanVerifier(lake=lake).verify(GOLD, block("by flood"))
    assert verdict.status == "wrong"  # the line on axioms comes after what is kept


def test_lean_gets_no_secrets_of_the_trainer(
    lake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secret")
    LeanVerifier(lake=lake).verify(GOLD, PROOF)
    assert "secret" not in (tmp_path / "environment").read_text()


def test_the_private_file_is_gone_after_the_check(
    lake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    LeanVerifier(lake=lake, timeout=1.0).verify(GOLD, block("by hang"))
    assert (tmp_path / "source").is_file()
    assert not list(temporary.iterdir())


def test_a_long_text_is_searched_in_linear_time(lake: str) -> None:
    verifier = LeanVerifier(lake=lake)
    verifier.unavailable()
    for text in ("```lean\n" * 30_000, block("theorem two " * 20_000), block(" " * 200_000 + "x")):
        start = time.perf_counter()
        verifier.verify(GOLD, text)
        assert time.perf_counter() - start < 1.0


def test_a_check_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="timeout must be a positive number of seconds, got 0"):
        LeanVerifier(timeout=0)


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 completions, 1 theorems and 2 finish reasons"):
        lean_reward(["p"] * 2, ["x"] * 2, answer=[GOLD])


def test_the_verifier_and_its_reward_pickle() -> None:
    assert pickle.loads(pickle.dumps(LeanVerifier(timeout=3.0))) == LeanVerifier(timeout=3.0)
    assert pickle.loads(pickle.dumps(lean_reward)) is lean_reward
    assert lean_reward.__name__ == "lean_reward"
