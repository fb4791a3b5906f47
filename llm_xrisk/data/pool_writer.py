"""Writing a pool so that nothing is lost: append, resume, and one atomic end."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm_xrisk.data.pool import (
    FORMAT_VERSION,
    METADATA_FILE,
    FileFormat,
    Pool,
    PoolRow,
    PoolSettings,
    file_hash,
    require_negatives,
)

PARTIAL = "pool.partial"


class PartialPool:
    """The rows finished so far by one process, in a file that only grows.

    The first line holds the settings, every further one a row. A run that is killed leaves at
    most its last line torn, which is dropped on the next start.

    Args:
        directory: Of the pool.
        settings: Of the run; those of the file must be the same.
        rank: Number of this process.
        world_size: Number of processes that share the rows.

    Raises:
        ValueError: the file was begun with other settings or by another number of processes, or
            is damaged before its last line.
    """

    def __init__(
        self, directory: Path, settings: PoolSettings, *, rank: int = 0, world_size: int = 1
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / partial_name(rank, world_size)
        self.settings = settings
        _refuse_other_world(directory, world_size)
        self.rows, self._ends = self._read() if self.path.exists() else ([], [])
        if not self._ends:
            head = _line({"format_version": FORMAT_VERSION, "settings": asdict(settings)})
            replace_file(self.path, head)
            self._ends = [len(head)]

    def keep(self, number: int) -> None:
        """Drop all but the first ``number`` rows."""
        del self.rows[number:], self._ends[number + 1 :]
        os.truncate(self.path, self._ends[-1])

    def append(self, rows: Iterable[PoolRow]) -> None:
        """Add finished rows; they are on the disk when this returns."""
        rows = list(rows)
        with self.path.open("ab") as file:
            for row in rows:
                file.write(_line(asdict(row)))
                self._ends.append(file.tell())
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows

    def _read(self) -> tuple[list[PoolRow], list[int]]:
        """Rows of the whole lines, and where each line ends."""
        lines = self.path.read_bytes().split(b"\n")[:-1]
        records = [self._parse(number, line) for number, line in enumerate(lines, start=1)]
        ends: list[int] = []
        for line in lines:
            ends.append((ends[-1] if ends else 0) + len(line) + 1)
        if records:
            self._require_same_settings(records[0])
            os.truncate(self.path, ends[-1])
        return [PoolRow.from_dict(record) for record in records[1:]], ends

    def _parse(self, number: int, line: bytes) -> Any:
        try:
            return json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"line {number} of {self.path} is not JSON, and only a last line may be torn; "
                "delete the file to start anew"
            ) from error

    def _require_same_settings(self, head: dict[str, Any]) -> None:
        if head.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{self.path} has format version {head.get('format_version')}, this package writes "
                f"{FORMAT_VERSION}; delete it to start anew"
            )
        found = PoolSettings.from_dict(head["settings"])
        require_same_settings(str(self.path), self.settings, found)


def partial_name(rank: int, world_size: int) -> str:
    """Name of the file of one process among several.

    Example:
        >>> partial_name(0, 1), partial_name(1, 2)
        ('pool.partial.jsonl', 'pool.partial-1-of-2.jsonl')
    """
    return f"{PARTIAL}.jsonl" if world_size == 1 else f"{PARTIAL}-{rank}-of-{world_size}.jsonl"


def require_same_settings(what: str, run: PoolSettings, found: PoolSettings) -> None:
    """Refuse to go on with a file that was begun otherwise.

    Raises:
        ValueError: naming every setting that differs.
    """
    differences = run.differences(found)
    if differences:
        raise ValueError(
            f"{what} was made with other settings: {'; '.join(differences)}. Run with those, or "
            "choose another path, or delete it"
        )


def merge_partials(
    directory: Path, settings: PoolSettings, *, world_size: int = 1
) -> list[PoolRow]:
    """Rows of all processes in the order of the data set, of which rank r did every r-th."""
    parts = [
        PartialPool(directory, settings, rank=rank, world_size=world_size).rows
        for rank in range(world_size)
    ]
    total = sum(map(len, parts))
    return [parts[number % world_size][number // world_size] for number in range(total)]


def write_pool(path: str | Path, pool: Pool, *, file_format: FileFormat = "jsonl") -> None:
    """Write a finished pool and remove the partial files it came from.

    ``pool.json`` comes last and holds the hash of the rows' file: until it is there, whole, there
    is no pool.

    Args:
        path: Directory.
        pool: What to write.
        file_format: Of the rows: ``"jsonl"`` or ``"parquet"`` (needs pyarrow).

    Raises:
        ValueError: no usable negative, or an unknown format.
    """
    if file_format not in ("jsonl", "parquet"):
        raise ValueError(f"got file_format={file_format!r}; choose 'jsonl' or 'parquet'")
    require_negatives(pool)
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"pool.{file_format}"
    encode = _as_jsonl if file_format == "jsonl" else _as_parquet
    replace_file(file, encode(pool.rows))
    metadata = {
        "format_version": FORMAT_VERSION,
        "file": file.name,
        "sha256": file_hash(file),
        "counts": pool.counts,
        "settings": asdict(pool.settings),
    }
    text = json.dumps(metadata, indent=2, ensure_ascii=False) + "\n"
    replace_file(directory / METADATA_FILE, text.encode())
    for leftover in directory.glob(f"{PARTIAL}*.jsonl"):
        leftover.unlink()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a temporary one, flushed to the disk, takes its place."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _refuse_other_world(directory: Path, world_size: int) -> None:
    ours = {partial_name(rank, world_size) for rank in range(world_size)}
    others = sorted(p.name for p in directory.glob(f"{PARTIAL}*.jsonl") if p.name not in ours)
    if others:
        raise ValueError(
            f"{directory} holds {others[0]}, begun by another number of processes than the "
            f"{world_size} of this run; launch as many as then, or delete it"
        )


def _line(record: dict[str, Any]) -> bytes:
    # Columns of the source may hold what JSON has no type for, such as dates: kept as text.
    return json.dumps(record, ensure_ascii=False, default=str).encode() + b"\n"


def _as_jsonl(rows: list[PoolRow]) -> bytes:
    return b"".join(_line(asdict(row)) for row in rows)


def _as_parquet(rows: list[PoolRow]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    records = [asdict(row) for row in rows]
    for record in records:  # text or messages, and columns of any kind, have no one type
        for name in ("prompt", "completion", "columns"):
            record[name] = json.dumps(record[name], ensure_ascii=False, default=str)
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(records), sink)
    return sink.getvalue().to_pybytes()
