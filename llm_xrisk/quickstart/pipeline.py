"""A pipeline of TRL's trainers and ours: every stage is a command line, done once."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from llm_xrisk.data.load import load_rows
from llm_xrisk.data.pool import load_pool
from llm_xrisk.data.tokenize import as_completion
from llm_xrisk.evaluation.pass_at_k import Evaluation
from llm_xrisk.quickstart.stages import Stages
from llm_xrisk.trainers.checkpoint import last_complete_checkpoint

TRLS = ("sft", "dpo", "grpo")
STAGES = ("sft", "dft", "dpo", "disco", "grpo", "tempnet")
_SAMPLED = ("dft", "dpo")  # they train on wrong answers of the policy they start from
_NOT_PLAIN = ("adapter_config.json", "tempnet_config.json")
_TAIL = 12
_Advance = Callable[[float], None]


@dataclass(frozen=True)
class Policy:
    """A model of the pipeline.

    Attributes:
        model: Its name or folder.
        key: Of the stage that made it.
    """

    model: str
    key: str


class Pipeline:
    """Runs what is not done yet.

    Args:
        stages: Where stages run and how they are shown.
        commands: Arguments of each command besides model, data and output, as one would type
            them; those of ``lora`` are added for every stage that trains the model.
        console: Where commands are shown before they run.
    """

    def __init__(self, stages: Stages, commands: Mapping[str, str], console: Console) -> None:
        self.stages, self.commands, self.console = stages, commands, console

    def start(self, model: str) -> Policy:
        """The model of the first stage; another one, or other files, make all stages anew."""
        self.stages.keys["start"] = _identity(model)
        return Policy(model, "start")

    def write_rows(self, dataset: str, limit: int) -> Path:
        """Write the data set of all stages, and return its folder.

        Args:
            dataset: Name or file of rows with prompt, completion and answer.
            limit: The first so many; 0 is all.
        """

        def work(folder: Path, advance: _Advance) -> None:
            _write(folder, load_rows(dataset, limit=limit))

        settings = {"dataset": _identity(dataset), "limit": limit}
        return self.stages.run("data", "write the rows", work, total=1, settings=settings)

    def train(self, number: int, name: str, start: Policy, data: Path) -> Policy:
        """Do a stage, from negatives to a plain folder.

        Args:
            number: Its place, from 1.
            name: One of :data:`STAGES`.
            start: The model it starts from.
            data: Folder of the rows.

        Raises:
            RuntimeError: a command failed.
        """
        key = f"{number}-{name}"
        words = self.commands[name]
        if name != "tempnet":
            words += f" {self.commands['lora']}"
        settings = {"words": words, "pool": self.commands["pool"] if name in _SAMPLED else ""}

        def work(folder: Path, advance: _Advance) -> None:
            log, source, saved = folder / "log.txt", data, folder / name
            if name in _SAMPLED:
                source = folder / "pool"
                self._run(log, "pool", start.model, data / "train.jsonl", source, settings["pool"])
                advance(1)
            if name == "dpo":
                source = _write(folder / "preferences", _preferences(source))
            if name in ("disco", "tempnet"):
                source = data / "train.jsonl"
            self._run(log, name, start.model, source, saved, f"{words} {_resume(saved)}")
            advance(1)
            if any((saved / file).is_file() for file in _NOT_PLAIN):
                merged = str(folder / f"{name}-merged")
                self._command(log, "merge", str(saved), merged, "--overwrite", "true")

        total = 3 if name in _SAMPLED else 2
        inputs = (start.key, "data")
        folder = self.stages.run(key, key, work, total=total, settings=settings, inputs=inputs)
        merged = folder / f"{name}-merged"
        return Policy(str(merged if merged.is_dir() else folder / name), key)

    def evaluate(self, policy: Policy) -> Evaluation:
        """Evaluate a model; one that the pipeline made gets the results into its card.

        Args:
            policy: The model.

        Raises:
            RuntimeError: the command failed.
        """
        words, ours = shlex.split(self.commands["evaluate"]), policy.key != "start"

        def work(folder: Path, advance: _Advance) -> None:
            given = ["--model_name_or_path", policy.model, *words]
            given += ["--results_file", str(folder / "evaluation.json")]
            self._command(folder / "log.txt", "evaluate", *given, *["--update_card", "true"] * ours)

        key = f"evaluate-{policy.key}"
        settings = {"words": words}
        folder = self.stages.run(
            key, f"evaluate {policy.key}", work, total=1, settings=settings, inputs=(policy.key,)
        )
        return Evaluation.load(folder / "evaluation.json")

    def _run(self, log: Path, name: str, model: str, data: Path, output: Path, words: str) -> None:
        given = ["--model_name_or_path", model, "--dataset_name", str(data)]
        self._command(log, name, *given, "--output_dir", str(output), *shlex.split(words))

    def _command(self, log: Path, name: str, *arguments: str) -> None:
        """Show a command, run it, keep what it prints."""
        program, module = ("llm-xrisk", "llm_xrisk.cli")
        if name in TRLS:
            program, module = ("trl", "trl.cli.main")
        shown = f"{program} {name} {shlex.join(arguments)}"
        self.console.print(shown, soft_wrap=True, highlight=False, markup=False)
        with log.open("a", encoding="utf-8") as file:
            command = [sys.executable, "-m", module, name, *arguments]
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        if code:
            text = log.read_text(encoding="utf-8", errors="replace")
            end = "\n".join(text.splitlines()[-_TAIL:])
            raise RuntimeError(
                f"{program} {name} ended with {code}; mend its arguments and start again, done "
                f"stages are reused. The end of {log}:\n{end}"
            )


def check_stages(names: Iterable[str]) -> None:
    """Refuse names of no stage.

    Raises:
        ValueError: with the names there are.

    Example:
        >>> check_stages(["sft", "dft"])
    """
    unknown = sorted(set(names) - set(STAGES))
    if unknown:
        raise ValueError(
            f"got the stages {unknown}; need some of {', '.join(STAGES)}, with commas between them"
        )


def _identity(name: str) -> str:
    """A name, with what tells of a change where it is that of a file or a folder."""
    path = Path(name)
    files = sorted(path.glob("*.*")) if path.is_dir() else [path] if path.is_file() else []
    return f"{name} {[(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]}"


def _write(folder: Path, rows: Iterable[Any]) -> Path:
    """Write rows where ``--dataset_name FOLDER`` of TRL finds them; ours take the file."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    return folder


def _preferences(pool: Path) -> Iterable[dict[str, Any]]:
    """Each gold answer and a wrong one of the policy's, in TRL's format."""
    for row in load_pool(pool).rows:
        if row.negatives:
            rejected = as_completion(row.prompt, row.negatives[0].text)
            yield {"prompt": row.prompt, "chosen": row.completion, "rejected": rejected}


def _resume(folder: Path) -> str:
    """The argument by which an interrupted training goes on."""
    try:
        return shlex.join(["--resume_from_checkpoint", last_complete_checkpoint(str(folder))])
    except ValueError:
        return ""
