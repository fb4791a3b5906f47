"""Grade answers in a file: how each verdict came about, and how good the verifier is on labels.

    llm-xrisk verify answers.jsonl --output graded.jsonl
    llm-xrisk verify programs.jsonl --verifier code
    llm-xrisk verify labelled.jsonl --mode strict --show 50

Lines are JSON objects with `completion` (text or messages) and `answer`. In their place there may
be `prediction`, with `style` bare for an answer that stands alone, and `gold`; for code, `test` and
`entry_point`. `finish_reason` length marks a completion that was cut. Where lines carry `expected`,
true or false, verdicts are compared with it, by `tier` and by `source`. No model is needed.

Expect, for math and lenient on answers that a rule can decide: recall 99 %, specificity 99.5 %.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import track

from llm_xrisk.cli_help import RecipeParser
from llm_xrisk.evaluation.verdicts import Answer, read_answers, tables, write_graded
from reward.by_name import reward_function
from reward.types import Verdict

VERIFIERS = {
    "math": "reward.math.MathVerifier",
    "arithmetic": "reward.arithmetic.ArithmeticVerifier",
    "code": "reward.code.CodeVerifier",
}
CHUNK = 128  # answers between two looks at the progress bar


@dataclass
class ScriptArguments:
    """What is graded, and how.

    Args:
        file: JSON lines; `llm-xrisk verify FILE` is short for it.
        verifier: What grades: math, arithmetic (exact numbers and nothing else) or code.
        mode: For math: strict grades as training does, lenient also finds an answer out of a box.
        output: Where the lines go with their verdicts; not written by default.
        show: How many of the verdicts against their label are listed.
    """

    file: str = field(metadata={"help": "JSON lines with completion and answer."})
    verifier: Literal["math", "arithmetic", "code"] = field(
        default="math", metadata={"help": "What grades."}
    )
    mode: Literal["strict", "lenient"] = field(
        default="lenient", metadata={"help": "For math: strict is what training uses."}
    )
    output: str | None = field(default=None, metadata={"help": "Where graded lines go."})
    show: int = field(default=20, metadata={"help": "Verdicts against their label to list."})


def grade(answers: Sequence[Answer], args: ScriptArguments, console: Console) -> list[Verdict]:
    """Return one verdict for each answer, in order."""
    options = {"mode": args.mode} if args.verifier == "math" else {}
    verifier = reward_function(VERIFIERS[args.verifier])(**options)
    verdicts = list[Verdict]()
    for start in track(range(0, len(answers), CHUNK), "verify", console=console):
        part = answers[start : start + CHUNK]
        rows = [(answer.gold, answer.completion, answer.truncated) for answer in part]
        if hasattr(verifier, "verify_batch"):
            verdicts += verifier.verify_batch(*map(list, zip(*rows, strict=True)))
        else:
            verdicts += [verifier.verify(gold, text, truncated=cut) for gold, text, cut in rows]
    return verdicts


def main(script_args: ScriptArguments) -> None:
    """Grade every line, print the tables."""
    console = Console()
    answers = read_answers(Path(script_args.file), box_bare=script_args.verifier == "math")
    verdicts = grade(answers, script_args, console)
    if script_args.output:
        write_graded(Path(script_args.output), answers, verdicts)
    mode = f" {script_args.mode}" if script_args.verifier == "math" else ""
    title = f"verifier {script_args.verifier}{mode}"
    for table in tables(answers, verdicts, title=title, show=script_args.show):
        console.print(table)


def with_file(arguments: list[str]) -> list[str]:
    """Take a file that stands first, without its option."""
    stands_first = bool(arguments) and not arguments[0].startswith("-")
    return ["--file", *arguments] if stands_first else arguments


if __name__ == "__main__":
    parser = RecipeParser(ScriptArguments, description=__doc__)
    main(*parser.parse_args_and_config(with_file(sys.argv[1:])))
