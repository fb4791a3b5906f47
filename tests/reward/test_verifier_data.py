"""The figures the verifier is held to, on the labelled cases and data sets under $XRISK_DATA."""

import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reward.extract import GSM8K
from reward.math import MathVerifier, validate_golds
from reward.pool import WorkerPool

FOLDER = os.environ.get("XRISK_DATA", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="needs the data sets: set XRISK_DATA")
TINYV = "uw-nsl/TinyV"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(FOLDER) / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2, deadline=10.0) as workers:  # figures must not depend on the machine's load
        yield workers


def completion(row: dict[str, Any]) -> str:
    return rf"\boxed{{{row['prediction']}}}" if row["style"] == "bare" else row["prediction"]


def rates(cases: list[dict[str, Any]], scores: list[float | None]) -> tuple[float, float]:
    """Return recall and specificity."""
    counts = Counter((row["expected"], score) for row, score in zip(cases, scores, strict=True))
    right, wrong = (sum(n for (label, _), n in counts.items() if label == v) for v in (True, False))
    return counts[True, 1.0] / right, counts[False, 0.0] / wrong


def scores(verifier: MathVerifier, golds: list[Any], texts: list[str]) -> list[float | None]:
    return [verdict.score for verdict in verifier.verify_batch(golds, texts)]


def lenient(pool: WorkerPool, cases: list[dict[str, Any]]) -> list[float | None]:
    verifier = MathVerifier(mode="lenient", pool=pool, deadline=10.0)
    return scores(verifier, [row["gold"] for row in cases], [completion(row) for row in cases])


def test_the_labelled_cases_are_graded_as_labelled(pool: WorkerPool) -> None:
    cases = rows("verifier_cases_dev.jsonl")
    core = [row for row in cases if row["tier"] == "core"]
    recall, specificity = rates(core, lenient(pool, core))
    assert recall >= 0.99 and specificity >= 0.995
    hard = [row for row in cases if row["source"].startswith(TINYV)]
    recall, specificity = rates(hard, lenient(pool, hard))
    assert recall >= 0.75 and specificity >= 0.99
    recall, specificity = rates(cases, lenient(pool, cases))
    assert recall >= 0.89 and specificity >= 0.99


def test_strict_mode_pays_no_negative_and_keeps_most_of_the_core(pool: WorkerPool) -> None:
    cases = [row for row in rows("verifier_cases_dev.jsonl") if row["style"] == "bare"]
    verifier = MathVerifier(pool=pool, deadline=10.0)
    graded = scores(verifier, [row["gold"] for row in cases], [completion(row) for row in cases])
    core = [(row, score) for row, score in zip(cases, graded, strict=True) if row["tier"] == "core"]
    recall, specificity = rates([row for row, _ in core], [score for _, score in core])
    assert recall >= 0.95 and specificity == 1.0


def replaced(text: str, letters: dict[str, str]) -> str:
    """Replace the letters that are variables: not those of commands, words and ordinals."""
    return re.sub(
        r"\\text\{[^{}]*\}|\d(?:st|nd|rd|th)\b|\\[A-Za-z]+|[A-Za-z]{3,}|[A-Za-z]",
        lambda match: letters.get(match.group(), match.group()),
        text,
    )


def test_other_letters_in_the_same_places_keep_the_verdicts(pool: WorkerPool) -> None:
    cases = [row for row in rows("verifier_cases_dev.jsonl") if row["style"] == "bare"]
    old, new = "abckmnpqrtuvwxyz", "bcaqnmtrkpvuxwzy"
    letters = dict(zip(old, new, strict=True))
    mutated = [
        {
            **row,
            "gold": replaced(row["gold"], letters),
            "prediction": replaced(row["prediction"], letters),
        }
        for row in cases
    ]
    changed = sum(one["gold"] != two["gold"] for one, two in zip(cases, mutated, strict=True))
    assert changed > 50
    assert lenient(pool, mutated) == lenient(pool, cases)


def test_other_numbers_in_the_same_places_keep_the_verdicts(pool: WorkerPool) -> None:
    cases = [row for row in rows("verifier_cases_dev.jsonl") if re.fullmatch(r"\d+", row["gold"])]

    def shifted(text: str) -> str:
        return re.sub(r"(?<![\d.,])\d{1,9}(?![\d.,]*\d)", lambda m: str(3 * int(m[0]) + 1), text)

    mutated = [
        {**row, "gold": shifted(row["gold"]), "prediction": shifted(row["prediction"])}
        for row in cases
    ]
    same = [
        (one, two)
        for row, one, two in zip(cases, lenient(pool, cases), lenient(pool, mutated), strict=True)
        if not re.search(r"\d[.,]\d[\d.,]*[^\n]{0,4}$", row["prediction"])
    ]
    assert len(same) > 100
    assert all(one == two for one, two in same)


@pytest.mark.parametrize("mode", ["strict", "lenient"])
def test_math500_solutions_match_their_answers_and_no_neighbours(
    pool: WorkerPool, mode: Any
) -> None:
    problems = rows("math/math500.jsonl")
    answers = [row["answer"] for row in problems]
    verifier = MathVerifier(mode=mode, pool=pool, deadline=10.0)
    assert scores(verifier, answers, [row["solution"] for row in problems]) == [1.0] * 500
    boxed = [rf"\boxed{{{answer}}}" for answer in answers]
    assert scores(verifier, answers, boxed) == [1.0] * 500
    neighbours = scores(verifier, answers[:-1], boxed[1:])
    pairs = [(answers[i], answers[i + 1]) for i, score in enumerate(neighbours) if score]
    assert sorted(pairs) == [("3", "3"), ("5", "x=5"), ("7", "7")]


def test_gsm8k_solutions_match_their_own_answers(pool: WorkerPool) -> None:
    problems = [row for part in ("train", "test") for row in rows(f"gsm8k/{part}.jsonl")]
    golds = [row["answer"].rsplit("####", 1)[1].strip() for row in problems]
    verifier = MathVerifier(pattern=GSM8K, pool=pool)
    assert len(golds) == 8792
    assert scores(verifier, golds, [row["answer"] for row in problems]) == [1.0] * 8792
    assert validate_golds(problems) == []


def test_no_gold_of_the_public_sets_is_unscorable() -> None:
    for name in ("math500", "aime24", "aime25", "amc"):
        assert validate_golds(rows(f"math/{name}.jsonl")) == []
    problems = validate_golds(rows("math/olympiad_bench.jsonl"))
    assert len(problems) == 0, problems


def test_two_workers_grade_hundreds_a_second(pool: WorkerPool) -> None:
    problems = rows("math/math500.jsonl")
    answers = [row["answer"] for row in problems]
    texts = [row["solution"] for row in problems]
    golds = answers + answers
    texts += [rf"\boxed{{{answers[(7 * i + 3) % 500]}}}" for i in range(500)]
    verifier = MathVerifier(pool=pool)
    verifier.verify(r"\sqrt{8}", r"\boxed{2\sqrt{2}}")

    def rate(golds: list[str], texts: list[str]) -> float:
        start = time.perf_counter()
        verifier.verify_batch(golds, texts)
        return len(golds) / (time.perf_counter() - start)

    assert rate(golds, texts) >= 300
    assert rate(golds, texts) >= 1500
    source = random.Random(0)
    repeated = [source.choice(range(110)) for _ in range(800)]
    verifier = MathVerifier(pool=pool)
    assert rate([golds[i] for i in repeated], [texts[i] for i in repeated]) >= 300
    integers = [str(n) for n in range(3000)]
    assert rate(integers, [rf"\boxed{{{n}}}" for n in integers]) >= 1000
