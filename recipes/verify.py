"""Grade answers in a file: one verdict per line and a table of statuses.

    llm-xrisk verify --file answers.jsonl --output graded.jsonl

Lines of the file are JSON objects with `completion` and `answer`; the verifier compares exact
numbers (`24.0` is right for 24, the unevaluated `48/2` is not). No model is needed.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from llm_xrisk.cli_help import RecipeParser
from reward.arithmetic import ArithmeticVerifier


@dataclass
class ScriptArguments:
    """Which file is graded.

    Args:
        file: JSON lines with `completion` and `answer`.
        output: Where the lines go with their verdicts; not written by default.
    """

    file: str = field(metadata={"help": "JSON lines with completion and answer."})
    output: str | None = field(default=None, metadata={"help": "Where graded lines go."})


def _row(number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"line {number} is {line[:60]!r}, which is no JSON; need an object with completion "
            "and answer on every line"
        ) from error
    missing = [name for name in ("completion", "answer") if name not in row]
    if missing:
        raise ValueError(f"line {number} has {sorted(row)} and lacks {missing}")
    return row


def main(script_args: ScriptArguments) -> None:
    """Grade every line, print the table."""
    verifier, console = ArithmeticVerifier(), Console()
    path = Path(script_args.file)
    if not path.is_file():
        raise FileNotFoundError(f"got --file {path}, which is no file; need JSON lines")
    lines = path.read_text(encoding="utf-8").splitlines()
    graded, statuses = list[str](), Counter[str]()
    for number, line in enumerate(track(lines, "verify", console=console), start=1):
        row = _row(number, line)
        verdict = verifier.verify(row["answer"], row["completion"])
        statuses[str(verdict.status)] += 1
        extra = {"score": verdict.score, "status": str(verdict.status)}
        graded.append(json.dumps(row | extra, ensure_ascii=False))
    table = Table("status", "answers", "share", title=f"{len(lines)} answers")
    for status, count in statuses.most_common():
        table.add_row(status, str(count), f"{100 * count / len(lines):.1f} %")
    console.print(table)
    if script_args.output:
        Path(script_args.output).write_text("\n".join(graded) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = RecipeParser(ScriptArguments, description=__doc__)
    main(*parser.parse_args_and_config())
