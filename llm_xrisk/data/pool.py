"""DFT's pool of negatives: for each prompt its gold answer and wrong ones, kept in a directory.

A pool is ``pool.jsonl`` (or ``pool.parquet``), a row per prompt, and ``pool.json``, which says what
made it: tokenizer, reference policy, sampler, filter, and how many samples went where.
:func:`llm_xrisk.rollout.negatives.build_pool` makes one.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llm_xrisk.data.fingerprint import Identity, tokenizer_identity
from llm_xrisk.data.tokenize import Text

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT_VERSION = 1
METADATA_FILE = "pool.json"
FileFormat = Literal["jsonl", "parquet"]
COUNTS = ("generated", "equal_to_gold", "verified_right", "duplicates", "surplus", "kept")


@dataclass(frozen=True)
class Negative:
    """An answer of the sampling policy that is not known to be right.

    Attributes:
        ids: Token ids behind ``prompt_ids``; they end in an end-of-sequence id unless truncated.
        text: The answer as text.
        truncated: Whether it was cut at the length limit.
        ref_log_likelihood: log pi_ref of all its tokens together, on the plain prompt, at
            temperature 1.
        generation: Which of the prompt's samples it was, from 0.
    """

    ids: list[int]
    text: str
    truncated: bool
    ref_log_likelihood: float
    generation: int


@dataclass(frozen=True)
class PoolRow:
    """A prompt with its gold answer and negatives.

    Attributes:
        prompt_id: Id of the prompt in the data set it comes from.
        prompt: Text or messages.
        completion: The gold answer, text or messages.
        prompt_ids: Token ids of the plain prompt.
        completion_ids: Token ids of the gold answer.
        negatives: In order of generation; empty if no sample was usable.
        counts: How many samples went where, by the names in ``COUNTS``.
        columns: Other columns of the data set's row.
    """

    prompt_id: int
    prompt: Text
    completion: Text
    prompt_ids: list[int]
    completion_ids: list[int]
    negatives: list[Negative]
    counts: dict[str, int]
    columns: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "PoolRow":
        """The row of a dictionary as ``dataclasses.asdict`` makes it."""
        return cls(**{**row, "negatives": [Negative(**negative) for negative in row["negatives"]]})


@dataclass(frozen=True)
class PoolSettings:
    """What a pool depends on. Pools and parts of pools with other settings are never mixed.

    Attributes:
        tokenizer: Of the model.
        reference: The policy of ``ref_log_likelihood``.
        sampler: Sampling settings, system prompt, samples per prompt, policy version.
        verify: Name of the reward function whose paid samples were left out, if any.
        rows: Hash of ids, prompts and gold answers.
    """

    tokenizer: Identity
    reference: Identity
    sampler: dict[str, Any]
    verify: str | None
    rows: str

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "PoolSettings":
        """The settings of a dictionary as ``dataclasses.asdict`` makes it."""
        named = {name: Identity(**settings[name]) for name in ("tokenizer", "reference")}
        return cls(**{**settings, **named})

    def differences(self, found: "PoolSettings") -> list[str]:
        """What sets other settings apart from these, one readable line each."""
        lines = [
            f"{what} is {theirs.name!r} ({theirs.fingerprint}), not {ours.name!r} "
            f"({ours.fingerprint})"
            for what, ours, theirs in (
                ("tokenizer", self.tokenizer, found.tokenizer),
                ("reference model", self.reference, found.reference),
            )
            if ours.fingerprint != theirs.fingerprint
        ]
        ours, theirs = (
            {**one.sampler, "verify": one.verify, "hash of prompts and gold answers": one.rows}
            for one in (self, found)
        )
        return lines + [
            f"{key} is {theirs.get(key)!r}, not {ours.get(key)!r}"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)
        ]


@dataclass(frozen=True)
class Pool:
    """Prompts with gold answers and negatives, and what made them."""

    rows: list[PoolRow]
    settings: PoolSettings

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def counts(self) -> dict[str, int]:
        """Samples by what became of them, the truncated ones kept, prompts with and without.

        ``generated`` is the sum of equal_to_gold, verified_right, duplicates, surplus and kept.
        """
        total: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
        for row in self.rows:
            total.update(row.counts)
        truncated = sum(negative.truncated for row in self.rows for negative in row.negatives)
        without = sum(not row.negatives for row in self.rows)
        prompts = {"prompts": len(self.rows), "prompts_without_negatives": without}
        return {**total, "truncated": truncated, **prompts}

    def to_dataset(self, *, with_empty: bool = False) -> "Dataset":
        """The pool as the data set that ``DFTTrainer`` takes.

        Args:
            with_empty: Keep prompts without negatives too, of which DFT only raises the gold
                answer.

        Returns:
            Columns index (0 to n-1, in the pool's order), prompt_id, prompt, completion,
            prompt_ids, completion_ids, negative_ids, ref_log_likelihoods, negative_truncated and
            the columns of the source.
        """
        from datasets import Dataset

        kept = [row for row in self.rows if row.negatives or with_empty]
        return Dataset.from_list([_dataset_row(index, row) for index, row in enumerate(kept)])


def load_pool(
    path: str | Path, *, tokenizer: Any = None, reference_model_fingerprint: str | None = None
) -> Pool:
    """Read a pool and check that it is whole and made for this run.

    Args:
        path: The pool's directory.
        tokenizer: The run's tokenizer; left out, it is not compared.
        reference_model_fingerprint: :func:`~llm_xrisk.data.fingerprint.model_fingerprint` of the
            run's reference policy; left out, it is not compared.

    Raises:
        FileNotFoundError: no finished pool there.
        ValueError: another tokenizer or reference model, a damaged file, an unknown format, or no
            usable negative at all.
    """
    directory = Path(path)
    if not (directory / METADATA_FILE).is_file():
        raise FileNotFoundError(
            f"no finished pool in {directory}: {METADATA_FILE} is missing; build one with "
            "llm-xrisk pool, which also resumes an interrupted one"
        )
    metadata = json.loads((directory / METADATA_FILE).read_text(encoding="utf-8"))
    if metadata["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"the pool in {directory} has format version {metadata['format_version']}, this "
            f"package reads {FORMAT_VERSION}; build the pool anew"
        )
    settings = PoolSettings.from_dict(metadata["settings"])
    if tokenizer is not None:
        _require_same("tokenizer", directory, settings.tokenizer, tokenizer_identity(tokenizer))
    if reference_model_fingerprint is not None:
        got = Identity("the run's reference model", reference_model_fingerprint)
        _require_same("reference model", directory, settings.reference, got)
    file = directory / metadata["file"]
    if not file.is_file() or file_hash(file) != metadata["sha256"]:
        raise ValueError(
            f"{file} is not the file that {METADATA_FILE} describes (missing, changed or cut); "
            f"restore it, or delete {directory} and build the pool anew"
        )
    pool = Pool([PoolRow.from_dict(row) for row in _read_rows(file)], settings)
    require_negatives(pool)
    return pool


def require_negatives(pool: Pool) -> None:
    """Refuse a pool in which no prompt has a negative.

    Raises:
        ValueError: with what became of the samples.
    """
    if any(row.negatives for row in pool.rows):
        return
    found = ", ".join(f"{name} {number}" for name, number in pool.counts.items() if number)
    raise ValueError(
        f"the pool has no usable negative ({found}); DFT needs wrong answers to push down: draw "
        "more samples per prompt, raise the temperature, or give an adversarial system_prompt"
    )


def rows_hash(rows: Sequence[Mapping[str, Any]]) -> str:
    """Hash of the ids, prompts and gold answers of tokenized rows."""
    digest = hashlib.sha256()
    for row in rows:
        parts = [row["prompt_id"], row["prompt_ids"], row["completion_ids"]]
        digest.update(json.dumps(parts).encode())
    return digest.hexdigest()[:16]


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_same(what: str, directory: Path, pool: Identity, run: Identity) -> None:
    if pool.fingerprint != run.fingerprint:
        raise ValueError(
            f"got {what} {run.name!r} ({run.fingerprint}), but the pool in {directory} was made "
            f"with {what} {pool.name!r} ({pool.fingerprint}); train with that one, or build a pool "
            "for this one"
        )


def _read_rows(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix == ".jsonl":
        with file.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines)
        return
    from pyarrow import parquet

    for row in parquet.read_table(file).to_pylist():
        nested = {name: json.loads(row[name]) for name in ("prompt", "completion", "columns")}
        yield {**row, **nested}


def _dataset_row(index: int, row: PoolRow) -> dict[str, Any]:
    negatives = row.negatives
    own = {entry.name: getattr(row, entry.name) for entry in fields(row)}
    del own["negatives"], own["counts"], own["columns"]
    return {
        **row.columns,
        "index": index,
        **own,
        "negative_ids": [negative.ids for negative in negatives],
        "ref_log_likelihoods": [negative.ref_log_likelihood for negative in negatives],
        "negative_truncated": [negative.truncated for negative in negatives],
    }
