"""The verifiers on real data: accuracy, rates and hostile answers; needs $XRISK_DATA.

    XRISK_DATA=DIR python benchmarks/verifier.py [--results FILE.json]

Rates are the median of five rounds on two workers. The labelled cases are those the rules were
adjusted to: expect less on others.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from reward.cache import VerdictCache  # noqa: E402
from reward.code import CodeVerifier  # noqa: E402
from reward.extract import GSM8K  # noqa: E402
from reward.math import MathVerifier, validate_golds  # noqa: E402
from reward.pool import WorkerPool  # noqa: E402
from reward.sandbox import isolation_level  # noqa: E402
from tests.reward.hostile import HOSTILE  # noqa: E402

ROUNDS, WORKERS = 5, 2
QUESTION_SETS = ("math500", "aime24", "aime25", "amc", "olympiad_bench")


def rows_of(data: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / name).read_text().splitlines()]


def paid(verifier: Any, golds: Sequence[Any], texts: Sequence[str]) -> int:
    return sum(v.score == 1.0 for v in verifier.verify_batch(golds, texts))


def labelled(data: Path, pool: WorkerPool) -> dict[str, Any]:
    """Recall and specificity on the labelled cases, by tier core, by TinyV, and of all."""
    cases = rows_of(data, "verifier_cases_dev.jsonl")
    boxed = [rf"\boxed{{{c['prediction']}}}" for c in cases]
    texts = [
        b if c["style"] == "bare" else c["prediction"] for b, c in zip(boxed, cases, strict=True)
    ]
    found: dict[str, Any] = {}
    for mode in ("lenient", "strict"):
        verifier = MathVerifier(mode=mode, pool=pool)
        verdicts = verifier.verify_batch([c["gold"] for c in cases], texts)
        graded = [(c, v.score == 1.0) for c, v in zip(cases, verdicts, strict=True)]
        for part, belongs in (
            ("core", lambda c: c["tier"] == "core"),
            ("tinyv", lambda c: "TinyV" in c["source"]),
            ("all", lambda c: True),
        ):
            right = [ok for c, ok in graded if belongs(c) and c["expected"]]
            wrong = [ok for c, ok in graded if belongs(c) and not c["expected"]]
            counts = {
                "paid_of_right": [sum(right), len(right)],
                "paid_of_wrong": [sum(wrong), len(wrong)],
            }
            found[f"{mode}/{part}"] = counts
    return found


def solutions(data: Path, pool: WorkerPool) -> dict[str, Any]:
    """Own solutions and neighbours' answers of MATH-500, own solutions of GSM8K, gold answers."""
    math = rows_of(data, "math/math500.jsonl")
    golds = [row["answer"] for row in math]
    found: dict[str, Any] = {}
    for mode in ("lenient", "strict"):
        verifier = MathVerifier(mode=mode, pool=pool)
        nexts = [rf"\boxed{{{gold}}}" for gold in golds[1:]]
        found[f"math500/{mode}/own"] = paid(verifier, golds, [row["solution"] for row in math])
        found[f"math500/{mode}/next"] = paid(verifier, golds[:-1], nexts)
    gsm = rows_of(data, "gsm8k/train.jsonl") + rows_of(data, "gsm8k/test.jsonl")
    texts = [row["answer"] for row in gsm]
    marker = MathVerifier(pattern=GSM8K, pool=pool)
    found["gsm8k/own"] = [
        paid(marker, [t.split("####")[-1].strip() for t in texts], texts),
        len(gsm),
    ]
    for name in QUESTION_SETS:
        questions = rows_of(data, f"math/{name}.jsonl")
        found[f"{name}/unscorable"] = [len(validate_golds(questions)), len(questions)]
    return found


def rate(run: Callable[[], int]) -> float:
    def once() -> float:
        start = time.perf_counter()
        return run() / (time.perf_counter() - start)

    return round(statistics.median(once() for _ in range(ROUNDS)), 1)


def rates(data: Path, pool: WorkerPool) -> dict[str, float]:
    """Verifications a second: labelled pairs without and with a cache, integers, symbols."""
    cases = rows_of(data, "verifier_cases_dev.jsonl")
    golds = [c["gold"] for c in cases]
    texts = [rf"\boxed{{{c['prediction']}}}" for c in cases]
    warm = MathVerifier(pool=pool)
    symbols = [(rf"x^{{{k}}}+{k}x+1", rf"\boxed{{1+{k}x+x^{{{k}}}}}") for k in range(2, 302)]

    def fresh(golds: Sequence[str], texts: Sequence[str]) -> int:
        cache = VerdictCache(size=1)  # keeps next to nothing
        return len(MathVerifier(pool=pool, cache=cache).verify_batch(golds, texts))

    numbers = [str(k) for k in range(1000)]
    return {
        "labelled pairs, uncached": rate(lambda: fresh(golds, texts)),
        "labelled pairs, cached": rate(lambda: len(warm.verify_batch(golds * 4, texts * 4))),
        "integers, uncached": rate(lambda: fresh(numbers, [rf"\boxed{{{n}.0}}" for n in numbers])),
        "symbolic, uncached": rate(lambda: fresh(*map(list, zip(*symbols, strict=True)))),
    }


def hostile(pool: WorkerPool) -> dict[str, Any]:
    """Slowest single call, scores and statuses over the hostile answers."""
    found: dict[str, Any] = {"answers": len(HOSTILE)}
    for mode in ("strict", "lenient"):
        verifier, slowest, none = MathVerifier(mode=mode, pool=pool), 0.0, 0
        for text in HOSTILE.values():
            start = time.perf_counter()
            none += verifier.verify("4", text).score is None
            slowest = max(slowest, time.perf_counter() - start)
        found[mode] = {"slowest_seconds": round(slowest, 3), "without_score": none}
    return found


def code(data: Path) -> dict[str, Any]:
    """HumanEval's own solutions, and how many programs a second are judged."""
    rows = rows_of(data, "code/HumanEval.jsonl")
    texts = [f"```python\n{r['prompt']}{r['canonical_solution']}\n```" for r in rows]
    verifier = CodeVerifier()
    count = paid(verifier, rows, texts)
    return {
        "isolation": isolation_level().level,
        "humaneval/canonical": [count, len(rows)],
        "programs a second": rate(lambda: len(verifier.verify_batch(rows, texts))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", help="JSON file for the figures")
    args = parser.parse_args()
    if "XRISK_DATA" not in os.environ:
        print(
            "XRISK_DATA is not set: it names the folder with the labelled cases; nothing measured"
        )
        return
    data = Path(os.environ["XRISK_DATA"])
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "math-verify": version("math-verify"),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "workers": WORKERS,
        "rounds": ROUNDS,
    }
    with WorkerPool(WORKERS) as pool:
        found["labelled"] = labelled(data, pool)
        found["solutions"] = solutions(data, pool)
        found["verifications a second"] = rates(data, pool)
        found["hostile"] = hostile(pool)
    found["code"] = code(data)
    text = json.dumps(found, indent=1)
    print(text)
    if args.results:
        Path(args.results).write_text(text + "\n")


if __name__ == "__main__":
    main()
