"""Data sets: a pool to draw training and holdout rows from, validation rows, locked test rows."""

import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_xrisk.data.drrho_dataset import prepare_drrho_dataset
from llm_xrisk.data.gsm8k_steps import load_steps
from llm_xrisk.data.synthetic_steps import expression_key
from llm_xrisk.data.tiny_calculator import char_tokenizer

Pair = tuple[str, str]  # prompt, completion
Rows = list[dict[str, Any]]

SPLIT_SEED = 0
MAX_TOKENS = 16  # of a step with its answer; 95 % of the steps have no more
PROMPT = 32  # characters of a sentence
NOISE = (0.0, 0.2)

_ANNOTATION = re.compile(r"([^\n]*?)<<([^<>\n]*=)([^<>=\n]*)>>")


@dataclass(frozen=True)
class Sizes:
    """How many rows there are of each kind, and how they are trained on."""

    train: int
    holdout: int
    validation: int
    test: int
    batch: int
    reference_passes: int = 2

    @property
    def reference_rows(self) -> int:
        """Rows that the reference model sees while it trains, with repetitions."""
        return self.reference_passes * self.holdout


@dataclass(frozen=True)
class DataSet:
    """Pairs of text that no two parts share.

    Args:
        pool: Training and holdout rows are drawn from these.
        validation: Clean rows to choose by.
        test: Clean rows to report.
    """

    pool: list[Pair]
    validation: list[Pair]
    test: list[Pair]

    def draw(self, sizes: Sizes, noise: float, seed: int) -> tuple[list[Pair], list[Pair]]:
        """Training rows, of which a share has answers of others of them, and clean holdout rows.

        The rows depend on the seed alone, and so do the holdout rows of all noise rates.
        """
        rng = random.Random(f"rows/{seed}")
        drawn = rng.sample(self.pool, sizes.train + sizes.holdout)
        train, holdout = drawn[: sizes.train], drawn[sizes.train :]
        noisy = sorted(rng.sample(range(len(train)), round(noise * len(train))))
        wrong = rotated([train[k][1] for k in noisy], rng)
        for k, completion in zip(noisy, wrong, strict=True):
            train[k] = (train[k][0], completion)
        return train, holdout


def steps(sizes: Sizes) -> DataSet:
    """Calculator steps of GSM8K; the packaged held-out steps are the validation set.

    Steps whose expressions are equal but for the way numbers are written are one step. The test
    rows are drawn from the file of training steps: trials of the protocol had looked at the
    held-out ones.
    """

    def short(name: Any) -> dict[str, Pair]:
        rows = [(row["prompt"], row["answer"]) for row in load_steps(name)]
        kept = [pair for pair in rows if len(pair[0]) + len(pair[1]) < MAX_TOKENS]
        return {expression_key(pair[0].removesuffix("=")): pair for pair in reversed(kept)}

    training, held_out = short("train"), short("test")
    pool = _shuffled(training.values())
    validation = _shuffled(pair for key, pair in held_out.items() if key not in training)
    return DataSet(pool[sizes.test :], validation[: sizes.validation], pool[: sizes.test])


def sentences(sizes: Sizes) -> DataSet:
    """The same calculations where they stand: the text before an annotation, and its result.

    Read from $XRISK_DATA/gsm8k, the test rows from the test solutions. A prompt is what stands on
    the line up to the annotation's equals sign, the last characters of it.
    """
    training, held_out = (dict(_annotations(name)) for name in ("train", "test"))
    pool = _shuffled(training.items())
    test = _shuffled(pair for pair in held_out.items() if pair[0] not in training)
    return DataSet(pool[sizes.validation :], pool[: sizes.validation], test[: sizes.test])


SETS: dict[str, Callable[[Sizes], DataSet]] = {"steps": steps, "sentences": sentences}


def rotated(completions: list[str], rng: random.Random) -> list[str]:
    """Each row gets the completion of another one of the rows."""
    if len(completions) < 2:
        return completions
    shift = rng.randrange(1, len(completions))
    return completions[shift:] + completions[:shift]


def encode(pairs: Iterable[Pair], tokenizer: Any = None) -> Rows:
    """Token rows with an index, as ``DRRHOTrainer`` takes them."""
    rows = [
        {"index": k, "prompt": prompt, "completion": completion}
        for k, (prompt, completion) in enumerate(pairs)
    ]
    return prepare_drrho_dataset(rows, tokenizer=tokenizer or char_tokenizer(), max_length=64)


def _shuffled(pairs: Iterable[Pair]) -> list[Pair]:
    found = list(pairs)
    random.Random(SPLIT_SEED).shuffle(found)
    return found


def _annotations(name: str) -> Iterator[Pair]:
    """(`clips sold are 48/2 = <<48/2=`, `24`) of each annotation that the model can write."""
    for row in _gsm8k(name):
        for before, expression, result in _ANNOTATION.findall(row["answer"]):
            prompt = f"{before}<<{expression}"[-PROMPT:]
            short = len(expression) + len(result) < MAX_TOKENS and result
            if prompt.isascii() and short:
                yield prompt, result


def _gsm8k(name: str) -> list[dict[str, str]]:
    folder = os.environ.get("XRISK_DATA")
    path = Path(folder or ".") / "gsm8k" / f"{name}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there; set XRISK_DATA to a folder that holds gsm8k/{name}.jsonl of "
            "openai/grade-school-math, or pass --data steps"
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
