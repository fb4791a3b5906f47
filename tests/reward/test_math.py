"""The verifier and the reward function: alignment, statuses, modes, and what a gold may be."""

import asyncio
import math
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reward
from reward.cache import VerdictCache
from reward.extract import GSM8K
from reward.math import MathReward, MathVerifier, math_reward, validate_golds
from reward.pool import WorkerPool
from tests.reward.hostile import HOSTILE

ROOT = Path(reward.__file__).parents[1]
SLOW = r"\boxed{\sum_{i=1}^{10^6}\sum_{j=1}^{10^6}\frac{i}{j+i}}"


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2) as workers:
        yield workers


@pytest.fixture
def verifier(pool: WorkerPool) -> MathVerifier:
    return MathVerifier(pool=pool)


def box(answer: str) -> str:
    return f"So the answer is $\\boxed{{{answer}}}$."


def test_the_last_box_is_compared_with_the_gold(verifier: MathVerifier) -> None:
    assert verifier.verify("4", r"\boxed{3}, no, \boxed{4}").score == 1.0
    assert verifier.verify("4", r"\boxed{4}, no, \boxed{3}").score == 0.0
    assert verifier.verify(r"\sqrt{8}", box(r"2\sqrt{2}")).detail == "box: equal by the engine"


@pytest.mark.parametrize(
    ("completion", "status"),
    [
        ("", "no_answer"),
        ("4", "no_answer"),
        (r"\boxed{}", "no_answer"),
        (r"\boxed{4", "no_answer"),
        (r"<think>\boxed{4}</think>", "no_answer"),
        (r"<think> maybe \boxed{4}", "truncated"),
        (box("5"), "wrong"),
        (box("5=4"), "wrong"),
        (box("4,5"), "wrong"),
        (box("x" * 2001), "too_long"),
        (box("1" * 401), "wrong"),
    ],
    ids=range(11),
)
def test_a_bad_completion_scores_zero_and_says_why(
    verifier: MathVerifier, completion: str, status: str
) -> None:
    verdict = verifier.verify("4", completion)
    assert (verdict.score, verdict.status) == (0.0, status)


def test_a_completion_cut_at_the_length_limit_is_not_paid(verifier: MathVerifier) -> None:
    assert verifier.verify("4", box("4"), truncated=True).status == "truncated"
    rewards = math_reward(
        ["p"] * 2, [box("4")] * 2, answer=["4"] * 2, finish_reasons=["stop", "length"]
    )
    assert rewards == [1.0, 0.0]


@pytest.mark.parametrize(
    "gold",
    ["", " ", "$$", "?", r"\text{}", "{", r"\frac{1}{", None, float("nan"), float("inf"), [], [""],
     {}, True, b"4", "1" * 2001, 10**500, r"\boxed{}", [[1]]],
    ids=lambda gold: repr(gold)[:12],
)  # fmt: skip
def test_only_a_gold_that_cannot_be_graded_leaves_the_score_open(
    verifier: MathVerifier, gold: object
) -> None:
    for completion in (box("4"), "", r"\boxed{"):
        verdict = verifier.verify(gold, completion)
        assert (verdict.score, verdict.status) == (None, "gold_unparsable")


@pytest.mark.parametrize(
    "gold",
    [4, 4.0, "4", "$4$", " 4. ", r"so $\boxed{4}$.", "work\n#### 4", ["5", "4"], (4,), ["", "4"]],
    ids=repr,
)
def test_a_gold_may_be_text_a_number_a_solution_or_a_list(
    verifier: MathVerifier, gold: object
) -> None:
    assert verifier.verify(gold, box("4")).score == 1.0
    assert verifier.verify(gold, box("6")).score == 0.0


def test_any_gold_of_a_list_may_be_matched_by_the_engine(verifier: MathVerifier) -> None:
    golds = [r"\sqrt{3}", r"\sqrt{8}"]
    assert verifier.verify(golds, box(r"2\sqrt{2}")).score == 1.0
    assert verifier.verify(golds, box(r"3\sqrt{2}")).score == 0.0


def test_the_order_of_gold_and_answer_matters(verifier: MathVerifier) -> None:
    assert verifier.verify("1<x<2", box("(1,2)")).score == 1.0
    assert verifier.verify("(1,2)", box("1<x<2")).score == 0.0


def test_the_modes_differ_in_where_they_look_and_what_they_take(pool: WorkerPool) -> None:
    strict, lenient = (MathVerifier(mode=mode, pool=pool) for mode in ("strict", "lenient"))
    for gold, text in [("4", "The answer is $4$."), ("7", box("3+4")), ("0.458", box("27/59"))]:
        assert strict.verify(gold, text).score == 0.0
        assert lenient.verify(gold, text).score == 1.0


def test_a_pattern_takes_the_place_of_the_box(pool: WorkerPool) -> None:
    verifier = MathVerifier(pattern=GSM8K, pool=pool)
    assert verifier.verify("1,080", "6 answers\n#### 1080").score == 1.0
    assert verifier.verify("1,080", box("1080")).status == "no_answer"


def test_an_answer_that_takes_too_long_is_a_timeout_and_costs_nobody_else(
    pool: WorkerPool,
) -> None:
    verifier = MathVerifier(mode="lenient", deadline=0.5, pool=pool)
    golds = ["4"] + [r"\sqrt{8}"] * 60
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verdicts = verifier.verify_batch(golds, [SLOW] + [box(r"2\sqrt2")] * 60)
    assert [verdict.status for verdict in verdicts] == ["timeout"] + ["correct"] * 60
    assert verdicts[0].score == 0.0
    assert verifier.verify("4", SLOW).status == "timeout"  # not kept


def test_many_timeouts_in_a_batch_warn_once(pool: WorkerPool) -> None:
    verifier = MathVerifier(mode="lenient", deadline=0.3, pool=pool)
    slow = [SLOW, SLOW.replace("^6", "^7")]
    with pytest.warns(RuntimeWarning, match="2 of 4 comparisons ran into their deadline") as caught:
        verifier.verify_batch(["4"] * 4, [*slow, box("4"), box("5")])
    assert len(caught) == 1


def test_statuses_and_extracted_answers_reach_the_logs() -> None:
    metrics: dict[str, float] = {}
    extra: dict[str, list] = {}
    rewards = math_reward(
        prompts=["p"] * 5,
        completions=[box("4"), box("5"), "x", "<think>", box("4")],
        completion_ids=[[1]] * 5,
        answer=["4", "4", "4", "4", ""],
        log_metric=metrics.__setitem__,
        log_extra=extra.__setitem__,
        trainer_state=None,
        other=["column"] * 5,
    )
    assert rewards == [1.0, 0.0, 0.0, 0.0, None]
    statuses = ["correct", "wrong", "no_answer", "truncated", "gold_unparsable"]
    assert metrics == {f"math/{status}_rate": 1 / 5 for status in statuses}
    assert extra["math_status"] == statuses
    assert extra["math_extracted"] == ["4", "5", None, None, None]


def test_a_timeout_reaches_the_metrics(pool: WorkerPool) -> None:
    function = MathReward(mode="lenient", deadline=0.3)
    metrics: dict[str, float] = {}
    with pytest.warns(RuntimeWarning, match="1 of 1"):
        function(["p"], [SLOW], answer=["4"], log_metric=metrics.__setitem__)
    assert metrics == {"math/timeout_rate": 1.0}


def test_plain_and_conversational_completions_score_alike() -> None:
    chats = [
        [{"role": "assistant", "content": box("4")}],
        [{"role": "user", "content": box("5")}, {"role": "assistant", "content": box("4")}],
        [{"role": "assistant", "content": [{"type": "text", "text": box("4")}]}],
        [{"role": "assistant", "content": None}],
        [],
        None,
        7,
    ]
    rewards = math_reward(["p"] * 7, chats, answer=["4"] * 7)
    assert rewards == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_the_column_of_the_golds_is_a_choice() -> None:
    named = MathReward(column="target", name="graded")
    assert named(["p"], [box("4")], target=["4"], answer=["5"]) == [1.0]
    assert named.__name__ == "graded"
    assert math_reward(["p"], [box("4")], solution=[r"thus $\boxed{4}$"]) == [1.0]
    assert math_reward(["p"], [box("4")], answer=["4"], solution=["5"]) == [1.0]
    with pytest.raises(ValueError, match=r"got the columns other, need 'answer' .* rename"):
        math_reward(["p"], [box("4")], other=["4"])


def test_lists_of_different_length_are_refused_by_their_sizes() -> None:
    with pytest.raises(
        ValueError, match=r"got 2 completions, 1 gold answers .* repeat the columns"
    ):
        math_reward(["p"] * 2, [box("4")] * 2, answer=["4"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "loose"}, "mode must be 'strict' or 'lenient', got 'loose'"),
        ({"deadline": 0.0}, "deadline must be above 0 s, got 0.0"),
        ({"pattern": "("}, "need a regular expression"),
    ],
)
def test_wrong_options_are_refused_when_given(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MathVerifier(**options)
    with pytest.raises(ValueError, match=message):
        MathReward(**options)


def test_verifier_and_reward_functions_pickle(verifier: MathVerifier) -> None:
    verifier.verify("4", box("4"))
    copy = pickle.loads(pickle.dumps(verifier))
    assert copy == verifier and copy.pool is None and len(copy.cache) == 0
    assert pickle.loads(pickle.dumps(math_reward)) is math_reward
    assert math_reward.__name__ == "math_reward"
    function = pickle.loads(pickle.dumps(MathReward(column="target")))
    assert function(["p"], [box("4")], target=["4"]) == [1.0]


def test_unscorable_golds_are_found_before_training() -> None:
    rows = [{"answer": answer} for answer in ("4", "", ["", "4"], [], None, 4.0, "{")]
    assert [number for number, _ in validate_golds(rows)] == [1, 3, 4, 6]
    assert dict(validate_golds(rows))[4] == "a gold of type NoneType, need text or a finite number"
    with pytest.raises(ValueError, match=r"got row 0 with answer, need 'gold'"):
        validate_golds(rows, column="gold")


MIXED = [
    ("4", box("4")), ("4", box("5")), (r"\sqrt8", box(r"2\sqrt2")), (r"\sqrt8", box(r"\sqrt7")),
    ("", box("4")), ("4", ""), ("4", None), (r"x+1", box("1+x")), ("4", box("9^{9^{9^9}}")),
    ("1,2", box("2,1")), (r"\pi", box("3.14")), ("4", "<think>"), ("y=2x", box("2x-y=0")),
]  # fmt: skip


def graded(verifier: MathVerifier, cases: list) -> list[tuple]:
    verdicts = verifier.verify_batch([gold for gold, _ in cases], [text for _, text in cases])
    return [(v.score, v.status, v.extracted, v.detail) for v in verdicts]


@given(st.lists(st.sampled_from(MIXED), max_size=20))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_batch_is_graded_as_its_items_are(pool: WorkerPool, cases: list) -> None:
    single = MathVerifier(pool=pool)
    alone = [graded(single, [case])[0] for case in cases]
    assert graded(MathVerifier(pool=pool), cases) == alone
    assert graded(MathVerifier(pool=pool), cases[::-1]) == alone[::-1]


def test_verdicts_depend_neither_on_the_cache_nor_on_the_number_of_workers(
    pool: WorkerPool, tmp_path: Path
) -> None:
    expected = graded(MathVerifier(pool=pool), MIXED)
    kept = MathVerifier(pool=pool, cache=VerdictCache(path=str(tmp_path / "verdicts.sqlite")))
    with WorkerPool(1) as one:
        alone = graded(MathVerifier(pool=one), MIXED)
    assert expected == alone == graded(kept, MIXED) == graded(kept, MIXED)
    assert kept.cache.hits > 0


def test_modes_share_no_verdicts(pool: WorkerPool) -> None:
    cache = VerdictCache()
    for mode, score in (("strict", 0.0), ("lenient", 1.0)):
        assert (
            MathVerifier(mode=mode, cache=cache, pool=pool).verify("7", box("3+4")).score == score
        )


def test_a_list_of_golds_is_not_kept_for_another_list(verifier: MathVerifier) -> None:
    assert verifier.verify(["4", "5"], box("5")).score == 1.0
    assert verifier.verify(["4"], box("5")).score == 0.0
    assert verifier.verify(["4", "6"], box("5")).score == 0.0


def test_threads_and_event_loops_get_the_serial_verdicts(verifier: MathVerifier) -> None:
    expected = graded(verifier, MIXED)
    calls = [(k % len(MIXED), *MIXED[k % len(MIXED)]) for k in range(500)]
    different: list[tuple] = []

    def work() -> None:
        for case, gold, text in calls:
            v = verifier.verify_batch([gold], [text])[0]
            if (v.score, v.status, v.extracted, v.detail) != expected[case]:
                different.append((case, v))
        finished.append(threading.get_ident())

    finished: list[int] = []
    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(finished) == 16
    assert different == []
    golds, texts = [gold for gold, _ in MIXED], [text for _, text in MIXED]

    async def both() -> list:
        fresh = MathVerifier(pool=verifier.pool)
        return await asyncio.gather(*(fresh.averify_batch(golds, texts) for _ in range(3)))

    for verdicts in asyncio.run(both()):
        assert [(v.score, v.status, v.extracted, v.detail) for v in verdicts] == expected


pieces = st.sampled_from(
    [
        *"0123456789xyein+-*/^!()[]{}|,=<>%_ .$\\",
        r"\boxed{",
        r"\frac",
        r"\sqrt",
        r"\text{",
        r"\pi",
        r"\infty",
        r"\cup",
        r"\pm",
        "<think>",
        "</think>",
        "Answer: ",
        "####",
        "}",
    ]
)
random_completions = st.text(max_size=80) | st.lists(pieces, max_size=40).map("".join)


@given(st.lists(random_completions | random_completions.map(box), min_size=25, max_size=25))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_completion_gets_zero_or_one(pool: WorkerPool, completions: list[str]) -> None:
    for mode in ("strict", "lenient"):
        for gold in ("4", r"\frac{x}{\sqrt2}"):
            verdicts = MathVerifier(mode=mode, pool=pool).verify_batch([gold] * 25, completions)
            scores = [verdict.score for verdict in verdicts]
            assert all(score in {0.0, 1.0} and math.isfinite(score) for score in scores)


def test_without_math_verify_the_import_works_and_the_first_use_says_what_to_install() -> None:
    code = """
import sys
sys.modules["math_verify"] = None
from importlib.machinery import PathFinder
real = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "math_verify" else real(name, *rest)
del sys.modules["math_verify"]
from reward.math import math_reward
try:
    math_reward(["p"], ["x"], answer=["4"])
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 'pip install "llm-xrisk[math]"' in done.stdout


def test_the_import_is_quick_and_brings_no_engine() -> None:
    code = """
import sys, time
start = time.perf_counter()
import reward.math
print(time.perf_counter() - start)
print({"torch", "sympy", "math_verify", "mpmath", "numpy"} & set(sys.modules))
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\n")
        for _ in range(3)
    ]
    assert min(float(run[0]) for run in runs) < 0.5
    assert all(run[1] == "set()" for run in runs)


def test_a_million_characters_with_a_box_cost_a_tenth_of_a_second(verifier: MathVerifier) -> None:
    prose = "Then $x_{1}$ is {small}. "
    text = prose * (1_000_000 // len(prose)) + box("4")
    assert min(verifier.verify("4", text).seconds for _ in range(3)) < 0.1
    assert verifier.verify("4", text).score == 1.0


def test_the_adversarial_list_is_long_enough() -> None:
    assert len(HOSTILE) >= 100
