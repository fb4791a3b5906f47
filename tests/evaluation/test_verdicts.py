"""Graded answers: lines are read as they stand or refused by number, tables count by hand."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llm_xrisk.evaluation.verdicts import Answer, is_paid, read_answers, tables, write_graded
from reward.types import Verdict

RIGHT, WRONG = (
    Verdict(1.0, "correct", "24", "same text", 0.001),
    Verdict(0.0, "wrong", "25", "engine"),
)
OPEN = Verdict(None, "gold_unparsable", None, "gold '?' is not a number")


def file_of(folder: Path, *rows: Any) -> Path:
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def printed(answers: list[Answer], verdicts: list[Verdict], **options: Any) -> str:
    out = io.StringIO()
    console = Console(file=out, width=160)
    for table in tables(answers, verdicts, title="verifier test", **options):
        console.print(table)
    return out.getvalue()


def cells(text: str, first: str) -> list[str]:
    """The cells of the line whose first cell is the given one."""
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    return next(row[1:] for row in rows if row[0] == first)


def labelled(expected: bool | None, number: int = 1, **fields: Any) -> Answer:
    return Answer(number, fields, "text", "gold", expected=expected)


def test_both_names_of_a_column_are_read(tmp_path: Path) -> None:
    chat = [{"role": "assistant", "content": "24"}]
    path = file_of(
        tmp_path,
        {"completion": "24", "answer": "24"},
        {"prediction": "24", "gold": ["24", "25"], "style": "bare", "expected": True},
        {"prediction": "24", "gold": "24", "style": "text", "expected": False},
        {"completion": chat, "answer": 24, "finish_reason": "length"},
        {"completion": "def f(): ...", "test": "assert f()", "entry_point": "f"},
    )
    first, bare, text, cut, program = read_answers(path)
    assert (first.completion, first.gold, first.truncated, first.expected) == (
        "24",
        "24",
        False,
        None,
    )
    assert (bare.completion, bare.gold, bare.expected) == (r"\boxed{24}", ["24", "25"], True)
    assert (text.completion, text.expected) == ("24", False)
    assert (cut.completion, cut.gold, cut.truncated) == ("24", 24, True)
    assert program.gold["entry_point"] == "f"
    assert read_answers(path, box_bare=False)[1].completion == "24"


def test_a_line_is_what_ends_with_a_line_feed(tmp_path: Path) -> None:
    texts = ["a\u2028b", "a\x85b", "a\x0bb"]
    path = file_of(tmp_path, *({"completion": text, "answer": "1"} for text in texts))
    path.write_bytes(b"\n" + path.read_bytes().replace(b"\n", b"\r\n") + b"\n  \n")
    found = read_answers(path)
    assert [answer.completion for answer in found] == texts
    assert [answer.number for answer in found] == [2, 3, 4]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "hello",
            r"line 2 is 'hello', which is no JSON; need an object with completion and answer",
        ),
        ('{"completion": "1"', "line 2 is .* which is no JSON"),
        ("[" * 100_000, "line 2 is .* which is no JSON"),
        ("\ud800", "line 2 is .* which is no JSON"),
        ("[1]", "line 2 is .*; need an object"),
        ('{"completion": "1"}', r"line 2 has \['completion'\] and lacks \['answer'\]"),
        ('{"answer": "1"}', r"lacks \['completion'\]"),
        ('{"completion": null, "answer": "1"}', r"lacks \['completion'\]"),
        ('{"completion": 3, "answer": "1"}', "line 2 has the completion 3; need text"),
        ('{"completion": "1", "answer": "1", "style": "loud"}', "line 2 has style 'loud'"),
        ('{"completion": "1", "answer": "1", "expected": "yes"}', "expected 'yes'; need bare"),
    ],
)
def test_a_bad_line_is_an_error_that_names_it(tmp_path: Path, line: str, message: str) -> None:
    path = file_of(tmp_path, {"completion": "1", "answer": "1"})
    path.write_bytes(path.read_bytes() + line.encode("utf-8", "surrogatepass") + b"\n")
    with pytest.raises(ValueError, match=message):
        read_answers(path)


def test_a_file_that_is_not_there_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="which is no file; need JSON lines"):
        read_answers(tmp_path / "none")


def test_graded_lines_hold_what_stood_there_and_the_verdict(tmp_path: Path) -> None:
    rows = [
        {"completion": "\ud800 é\u2028", "answer": "1", "id": 7},
        {"completion": "", "answer": "1"},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "new" / "graded.jsonl"
    write_graded(out, read_answers(path), [RIGHT, OPEN])
    graded = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
    verdict = {"score": 1.0, "status": "correct", "extracted": "24", "detail": "same text"}
    assert graded[0] == rows[0] | verdict | {"seconds": 0.001}
    assert graded[1]["score"] is None
    assert list(out.parent.iterdir()) == [out]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "graded.jsonl"
    out.write_text("old")
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_graded(out, [labelled(None, odd={1, 2})], [RIGHT])
    assert out.read_text() == "old"


def test_labels_are_compared_by_tier_and_source() -> None:
    answers = [
        labelled(True, tier="core", source="a"),
        labelled(True, tier="core", source="b"),
        labelled(False, tier="core", source="b"),
        labelled(False, tier="rare", source="b"),
        labelled(True, tier="rare", source="b"),
        labelled(None, tier="rare", source="b"),
    ]
    text = printed(answers, [RIGHT, WRONG, RIGHT, WRONG, OPEN, RIGHT])
    assert "verdicts on 5 labelled answers" in text
    assert cells(text, "tier core") == ["3", "1", "1", "0", "1", "50.0 %", "0.0 %"]
    assert cells(text, "tier rare") == ["2", "0", "0", "1", "1", "0.0 %", "100.0 %"]
    assert cells(text, "source a") == ["1", "1", "0", "0", "0", "100.0 %", "-"]
    assert cells(text, "source b") == ["4", "0", "1", "1", "2", "0.0 %", "50.0 %"]
    assert cells(text, "all") == ["5", "1", "1", "1", "2", "33.3 %", "50.0 %"]


def test_rules_are_counted_without_what_they_quote() -> None:
    other = Verdict(None, "gold_unparsable", None, "gold 'x' is not a number")
    answers = [labelled(True), labelled(False), labelled(True), labelled(None)]
    text = printed(answers, [OPEN, other, RIGHT, RIGHT])
    assert cells(text, "gold ... is not a number") == ["2", "0", "0", "0", "1", "1"]
    assert cells(text, "same text") == ["2", "2", "1", "0", "0", "0"]
    assert cells(text, "gold_unparsable") == ["2", "50.0 %"]


def test_without_labels_there_is_nothing_to_compare() -> None:
    text = printed([labelled(None)], [RIGHT])
    assert "labelled" not in text
    assert "TP" not in text
    assert cells(text, "same text") == ["1", "1"]
    assert "0 answers, verifier test" in printed([], [])


def test_verdicts_against_their_label_are_listed_up_to_a_number() -> None:
    answers = [labelled(False, number) for number in range(1, 8)]
    text = printed(answers, [RIGHT] * 7, show=3)
    assert "7 verdicts against their label, the first 3" in text
    assert cells(text, "3") == ["FP", "gold", "24", "same text"]
    assert "│ 4 " not in text
    assert "against their label" not in printed(answers, [WRONG] * 7)
    assert "against their label" not in printed(answers, [RIGHT] * 7, show=0)


def test_latency_is_told_by_its_quantiles() -> None:
    verdicts = [Verdict(0.0, "wrong", seconds=k / 1000) for k in range(101)]
    text = printed([labelled(None)] * 101, verdicts)
    row = cells(text, "for one answer")
    assert row == ["50.00", "90.00", "99.00", "100.00", "5050.00"]


def test_text_of_a_model_neither_styles_the_table_nor_moves_the_cursor() -> None:
    hostile = "[red]x[/red]\x1b[2J\ud800\n│"
    text = printed(
        [Answer(1, {"tier": "[bold"}, hostile, hostile, expected=True)],
        [Verdict(0.0, "no_answer", None, hostile)],
    )
    assert "[red]x[/red]\\x1b[2J\\ud800\\n" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("verdict", "paid"),
    [(RIGHT, True), (WRONG, False), (OPEN, False), (Verdict(0.5, "wrong"), False)],
)
def test_only_a_full_score_counts_as_paid(verdict: Verdict, paid: bool) -> None:
    assert is_paid(verdict) is paid
