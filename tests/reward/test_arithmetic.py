"""The arithmetic verifier pays exact equality and nothing else, and never raises on model text."""

import ast
import pickle
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import reward
from reward.arithmetic import ArithmeticVerifier, arithmetic_reward, parse_rational
from reward.types import Verdict

HOSTILE = [
    "", " ", "\n", "\x00", "\ud800", "\ufeff24", "٢٤", "²", "24\u200b", "24\n24", "24 apples",
    "=24", "2" * 401, "2" * 5000, "9" * 1_000_000, "1/0", "0/0", "1/-2", "--3", "+-3", "1e3",
    "1_000", "1,000", "nan", "inf", "-inf", "0x18", ".", "+", "-", "/", "1/", "/2", "1/2/3", ".5.",
    "1.2.3", "24%", "$24", "__import__('os').system('true')", "48-24", "(24)", "24;", "2**5",
]  # fmt: skip

integers = st.integers(-(10**30), 10**30)
decimals = st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**9))


def verify(gold: object, completion: str, **options: bool) -> Verdict:
    return ArithmeticVerifier(**options).verify(gold, completion)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("24", Fraction(24)),
        ("24.0", Fraction(24)),
        ("24.", Fraction(24)),
        ("1/2", Fraction(1, 2)),
        ("-3", Fraction(-3)),
        (".5", Fraction(1, 2)),
        ("-.5", Fraction(-1, 2)),
        ("+007", Fraction(7)),
        ("-0", Fraction(0)),
        ("-6/4", Fraction(-3, 2)),
    ],
)
def test_number_forms_are_read_as_exact_rationals(text: str, value: Fraction) -> None:
    assert parse_rational(text) == value


@given(integers)
def test_every_integer_is_read_back(number: int) -> None:
    assert parse_rational(str(number)) == number


@given(decimals)
def test_every_decimal_is_read_as_the_decimal_module_reads_it(number: Decimal) -> None:
    assert parse_rational(f"{number:f}") == Fraction(number)


@given(integers, st.integers(1, 10**20))
def test_every_fraction_is_read_back(numerator: int, denominator: int) -> None:
    assert parse_rational(f"{numerator}/{denominator}") == Fraction(numerator, denominator)


@given(decimals, decimals)
def test_two_decimals_are_equal_exactly_when_their_values_are(
    gold: Decimal, other: Decimal
) -> None:
    assert (verify(f"{gold:f}", f"{other:f}").status == "correct") == (gold == other)


@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        (str(10**50), str(10**50 + 1)),
        ("0", "0." + "0" * 30 + "1"),
        (
            "0.1",
            "0.1000000000000000055511151231257827",
        ),  # the nearest float to 0.1 is another number
        ("1/3", "0.3333333333333333"),
    ],
)
def test_numbers_that_floats_confuse_are_told_apart(gold: str, completion: str) -> None:
    assert verify(gold, completion).score == 0.0
    assert verify(gold, gold).score == 1.0


@pytest.mark.parametrize("completion", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_completion_scores_zero(completion: str) -> None:
    verdict = verify("24", completion)
    assert verdict.score == 0.0
    assert verdict.status in {"no_answer", "too_long"}


@given(st.text())
def test_any_text_gets_a_binary_score(completion: str) -> None:
    assert verify("24", completion).score in {0.0, 1.0}


@given(st.recursive(st.none() | st.text() | st.integers() | st.binary(), st.lists, max_leaves=8))
def test_a_completion_of_any_shape_scores_zero_or_one(completion: object) -> None:
    assert arithmetic_reward(["p"], [completion], answer=["24"])[0] in {0.0, 1.0}


@pytest.mark.parametrize(
    "gold",
    ["", " ", "a lot", "1/0", None, 0.5, True, [], ["x", None], 10**5000, "9" * 500, {}],
    ids=lambda gold: type(gold).__name__,
)
def test_only_an_unreadable_gold_leaves_the_score_open(gold: object) -> None:
    verdict = verify(gold, "24")
    assert (verdict.score, verdict.status) == (None, "gold_unparsable")
    assert arithmetic_reward(["p"], ["24"], answer=[gold]) == [None]


def test_any_gold_of_a_list_may_be_matched() -> None:
    assert verify(["x", 24, "25"], "24").score == 1.0
    assert verify(["x", "24", "25"], "26").score == 0.0


@pytest.mark.parametrize(("gold", "question"), [("24", "48/2"), ("0.5", "1/2"), ("1/2", "2/4")])
def test_repeating_the_question_is_not_paid(gold: str, question: str) -> None:
    assert verify(gold, question).status == "wrong"
    assert verify(gold, question, allow_unevaluated=True).status == "correct"


def test_a_fraction_in_lowest_terms_answers_a_gold_fraction() -> None:
    assert verify("1/2", "1/2").score == 1.0
    assert verify("2/4", "1/2").score == 1.0
    assert verify(["0.5", "1/2"], "1/2").score == 1.0
    assert verify("-1/2", "-0.5").score == 1.0


def test_a_truncated_number_is_not_an_answer() -> None:
    rewards = arithmetic_reward(
        ["p", "p"], ["24", "24"], answer=["24", "24"], finish_reasons=["stop", "length"]
    )
    assert rewards == [1.0, 0.0]


def test_a_million_characters_cost_less_than_a_millisecond_each() -> None:
    text = "1" * 1_000_000
    assert min(verify("1", text).seconds for _ in range(5)) < 1e-3


def test_conversational_and_plain_completions_score_alike() -> None:
    chats = [
        [{"role": "assistant", "content": "24"}],
        [{"role": "user", "content": "7"}, {"role": "assistant", "content": " 24.0\n"}],
        [{"role": "assistant", "content": [{"type": "text", "text": "2"}, {"text": "4"}]}],
        [{"role": "assistant", "content": None}],
        [],
        [{"role": "assistant"}],
        None,
    ]
    rewards = arithmetic_reward(["p"] * len(chats), chats, answer=["24"] * len(chats))
    assert rewards == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_rates_and_extracted_answers_reach_the_logs() -> None:
    metrics: dict[str, float] = {}
    extra: dict[str, list] = {}
    rewards = arithmetic_reward(
        prompts=["p"] * 4,
        completions=["24", "23", "x", "24"],
        completion_ids=[[1]] * 4,
        answer=["24", "24", "24", "?"],
        log_metric=metrics.__setitem__,
        log_extra=extra.__setitem__,
        trainer_state=None,
    )
    assert rewards == [1.0, 0.0, 0.0, None]
    assert metrics == {
        "arithmetic/correct_rate": 1 / 4,
        "arithmetic/gold_unparsable_rate": 1 / 4,
        "arithmetic/no_answer_rate": 1 / 4,
        "arithmetic/wrong_rate": 1 / 4,
    }
    assert extra["arithmetic_extracted"] == ["24", "23", None, None]
    assert extra["arithmetic_status"] == ["correct", "wrong", "no_answer", "gold_unparsable"]


@given(st.permutations(range(6)))
def test_permuting_the_batch_permutes_the_rewards(order: list[int]) -> None:
    completions = ["24", "x", "1/2", "0.5", "", "24"]
    golds = ["24", "24", "1/2", "1/2", "24", "?"]
    expected = arithmetic_reward(["p"] * 6, completions, answer=golds)
    shuffled = arithmetic_reward(
        ["p"] * 6, [completions[i] for i in order], answer=[golds[i] for i in order]
    )
    assert shuffled == [expected[i] for i in order]


def test_lists_of_different_length_are_refused_by_their_sizes() -> None:
    with pytest.raises(
        ValueError, match=r"got 2 completions, 1 gold answers .* repeat the columns"
    ):
        arithmetic_reward(["p", "p"], ["1", "2"], answer=["1"])


def test_the_reward_function_pickles_and_has_a_name() -> None:
    assert pickle.loads(pickle.dumps(arithmetic_reward)) is arithmetic_reward
    assert arithmetic_reward.__name__ == "arithmetic_reward"


@pytest.mark.parametrize(
    ("score", "status", "message"),
    [
        (1.0, "right", "unknown status 'right'"),
        (None, "wrong", "status 'wrong' with score None"),
        (0.0, "gold_unparsable", "status 'gold_unparsable' with score 0.0"),
        (float("nan"), "wrong", "must be finite"),
        (0.0, "correct", "'correct' with score 0.0"),
    ],
)
def test_a_contradictory_verdict_cannot_be_built(
    score: float | None, status: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Verdict(score, status)  # pyright: ignore[reportArgumentType]


def test_reward_imports_neither_torch_nor_the_toolkit() -> None:
    code = "import sys, reward; print({'torch', 'numpy', 'llm_xrisk'} & set(sys.modules))"
    root = Path(reward.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_no_verifier_can_execute_text() -> None:
    """Programs are run by the two children of the sandbox, and by nothing else."""
    forbidden = {"eval", "exec", "compile", "parse_expr", "sympify", "parse_latex", "__import__"}
    children = {"judge.py", "solution_runner.py"}
    found: dict[str, set[str]] = {}
    for path in Path(reward.__file__).parent.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        names |= {a.name for node in nodes if isinstance(node, ast.ImportFrom) for a in node.names}
        calls = {n.func for n in nodes if isinstance(n, ast.Call)}
        methods = {f.attr for f in calls if isinstance(f, ast.Attribute)} - {
            "compile"
        }  # re.compile
        found[path.name] = (names | methods) & forbidden
    assert {name for name, used in found.items() if used} <= children
    assert found["judge.py"]  # the test sees what it looks for
