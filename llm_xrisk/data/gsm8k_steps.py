"""Real arithmetic for the embedded default: the calculator steps of GSM8K's own solutions.

GSM8K's authors annotated each calculation of a solution, `<<48/2=24>>`. A step is such an
annotation, split after the equals sign: the prompt is `48/2=`, the answer `24`. The package ships
every distinct step of the training solutions and, as a held-out set, those of the test solutions
that are not among them.

Needs neither torch nor transformers. Extraction from the source files:

    python -m llm_xrisk.data.gsm8k_steps "$XRISK_DATA/gsm8k" llm_xrisk/assets/gsm8k_steps
"""

import json
import operator
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, TypedDict

ASSETS = Path(__file__).resolve().parents[1] / "assets"
NUMBER = re.compile(r"\d+\.?\d*|\.\d+")
MAX_EXPRESSION = 200

_ANNOTATION = re.compile(r"<<(.*?)>>", re.DOTALL)
_TOKEN = re.compile(rf"{NUMBER.pattern}|//|[-+*/()]")
_NORMALISE = str.maketrans({"\u00d7": "*", "\u00f7": "/", "\u2212": "-", "$": "", ",": ""})
_PRODUCT: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "*": operator.mul,
    "/": operator.truediv,
    "//": lambda left, right: Fraction(left // right),
}


class Step(TypedDict):
    """One row of the shipped files; `id` is its line number, stable across releases."""

    id: int
    prompt: str
    answer: str


@dataclass(frozen=True)
class Extraction:
    """The distinct steps of one file, and what was left out of them.

    Args:
        steps: (prompt, answer) pairs in order of first appearance.
        annotations: how many annotations the file holds.
        repeated: annotations equal to an earlier one.
        malformed: distinct annotations that are not `expression=number`.
        inexact: distinct annotations whose result is rounded or wrong.
    """

    steps: list[tuple[str, str]]
    annotations: int
    repeated: int
    malformed: int
    inexact: int


def exact_value(expression: str) -> Fraction:
    """Value of an arithmetic expression as an exact fraction.

    Numbers, `+ - * / //` (`//` rounds down), signs and parentheses, with the usual precedence;
    nothing else, and never `eval`.

    Args:
        expression: at most 200 characters, without spaces.

    Raises:
        ValueError: the expression is too long, malformed or divides by zero.

    Example:
        >>> exact_value("(1+2)/4*.5")
        Fraction(3, 8)
    """
    if len(expression) > MAX_EXPRESSION:
        raise ValueError(
            f"expression has {len(expression)} characters; "
            f"at most {MAX_EXPRESSION} are read, shorten it"
        )
    tokens = _TOKEN.findall(expression)
    if "".join(tokens) != expression:
        raise ValueError(f"expression {expression!r} needs numbers, + - * / and parentheses only")
    tokens.append("")
    try:
        value = _sum(tokens)
    except ZeroDivisionError as error:
        raise ValueError(f"expression {expression!r} divides by zero; it has no value") from error
    if tokens != [""]:
        raise ValueError(f"expression {expression!r} is malformed at {tokens[0]!r}")
    return value


def _sum(tokens: list[str]) -> Fraction:
    value = _product(tokens)
    while tokens[0] in ("+", "-"):
        value += _product(tokens) if tokens.pop(0) == "+" else -_product(tokens)
    return value


def _product(tokens: list[str]) -> Fraction:
    value = _factor(tokens)
    while tokens[0] in _PRODUCT:
        value = _PRODUCT[tokens.pop(0)](value, _factor(tokens))
    return value


def _factor(tokens: list[str]) -> Fraction:
    token = tokens.pop(0)
    if token in ("+", "-"):
        return _factor(tokens) if token == "+" else -_factor(tokens)
    if token == "(":
        value = _sum(tokens)
        if tokens[0] != ")":
            raise ValueError(f"expected ')' and got {tokens[0]!r}; close the parenthesis")
        tokens.pop(0)
        return value
    if not NUMBER.fullmatch(token):
        raise ValueError(f"expected a number and got {token!r}; complete the expression")
    return Fraction(token)


def is_correct(prompt: str, completion: str) -> bool:
    """Whether `completion` is a number of the step's value, however it is written.

    Example:
        >>> is_correct("8/2=", "4.00"), is_correct("8/2=", "6"), is_correct("8/2=", "8/2")
        (True, False, False)
    """
    if not NUMBER.fullmatch(completion.removeprefix("-")) or len(completion) > MAX_EXPRESSION:
        return False
    return Fraction(completion) == exact_value(prompt.removesuffix("="))


def read_extraction(path: str | Path) -> Extraction:
    """Read a GSM8K file and return its distinct exact steps with the counts of what was dropped.

    Args:
        path: JSON lines with the fields `question` and `answer`.

    Raises:
        ValueError: a line has no `answer`.
    """
    annotations = [text for answer in _answers(Path(path)) for text in _ANNOTATION.findall(answer)]
    distinct = dict.fromkeys("".join(text.split()).translate(_NORMALISE) for text in annotations)
    steps: list[tuple[str, str]] = []
    malformed = inexact = 0
    for text in distinct:
        expression, equals, answer = text.rpartition("=")
        try:
            exact = exact_value(expression) == exact_value(answer)
        except ValueError:
            malformed += 1
            continue
        if exact:
            steps.append((expression + equals, answer))
        else:
            inexact += 1
    repeated = len(annotations) - len(distinct)
    return Extraction(steps, len(annotations), repeated, malformed, inexact)


def _answers(path: Path) -> Iterable[str]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        if "answer" not in row:
            raise ValueError(
                f"{path.name}, line {number} has the fields {sorted(row)}; "
                "a GSM8K row needs 'answer', pass a file of openai/grade-school-math"
            )
        yield row["answer"]


def extract_steps(path: str | Path) -> list[tuple[str, str]]:
    """Distinct calculator steps of a GSM8K file, pairs such as (`"48/2="`, `"24"`).

    They stand in order of first appearance. Spaces, currency signs and thousands separators are
    removed, typographic operators replaced. Every step kept is exact in rational arithmetic;
    `read_extraction` also tells how many were dropped (none, in GSM8K).

    Args:
        path: JSON lines with the fields `question` and `answer`.
    """
    return read_extraction(path).steps


def load_steps(split: Literal["train", "test"]) -> list[Step]:
    """Shipped steps: 11,021 of training solutions, or 1,434 of test solutions not among them.

    A step is its prompt and its written answer. 59 prompts of the test split therefore occur in
    the training split too, with the answer written otherwise (`4` and `4.00`); leave them out
    where that matters. One answer, that of `3/4=`, is a fraction; the others are plain numbers.

    Args:
        split: "train" or "test".

    Raises:
        ValueError: another split.

    Example:
        >>> load_steps("train")[0]
        {'id': 0, 'prompt': '48/2=', 'answer': '24'}
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    text = (ASSETS / "gsm8k_steps" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def tiny_model_path() -> str:
    """Directory of the shipped model `tiny-calculator`, for `from_pretrained`."""
    return str(ASSETS / "tiny-calculator")


def write_steps(source: str | Path, target: str | Path, report: Callable[[str], object]) -> None:
    """Write `train.jsonl` and `test.jsonl` of the package from GSM8K's files of the same names.

    Args:
        source: directory of GSM8K's `train.jsonl` and `test.jsonl`.
        target: directory to write to; made if absent.
        report: called with one line per split.
    """
    seen: set[tuple[str, str]] = set()
    Path(target).mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        found = read_extraction(Path(source) / f"{split}.jsonl")
        kept = [step for step in found.steps if step not in seen]
        seen.update(kept)
        rows = (
            json.dumps({"id": number, "prompt": prompt, "answer": answer}) + "\n"
            for number, (prompt, answer) in enumerate(kept)
        )
        (Path(target) / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
        report(
            f"{split}: {found.annotations} annotations, {found.repeated} repeated, "
            f"{found.malformed} malformed, {found.inexact} inexact, "
            f"{len(found.steps) - len(kept)} already in train, {len(kept)} written\n"
        )


if __name__ == "__main__":
    write_steps(sys.argv[1], sys.argv[2], sys.stdout.write)
