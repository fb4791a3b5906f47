"""Data sets by name: a pool, a file, the shipped arithmetic, or one of the hub's."""

from pathlib import Path
from typing import Any

from llm_xrisk.data.gsm8k_steps import load_steps
from llm_xrisk.data.pool import METADATA_FILE, load_pool
from llm_xrisk.data.with_index import with_index

EMBEDDED = "gsm8k_steps"
_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_rows(
    name: str,
    split: str = "train",
    *,
    tokenizer: Any = None,
    reference_model_fingerprint: str | None = None,
    limit: int = 0,
) -> Any:
    """Load a data set and number its rows.

    Args:
        name: ``"gsm8k_steps"`` (shipped: prompt, completion, answer), the directory of a pool, a
            .json, .jsonl, .parquet or .csv file, or a name for ``datasets.load_dataset``.
        split: Split; pools have none.
        tokenizer: Of the run, which a pool is compared with.
        reference_model_fingerprint: Of the model the run starts from, likewise.
        limit: Keep the first so many rows; 0 keeps all.

    Returns:
        A ``datasets.Dataset`` with an ``index`` column.

    Raises:
        ValueError: a pool made with another tokenizer or model, or a split that does not exist.
        FileNotFoundError: nothing of that name, here or on the hub.

    Example:
        >>> load_rows("gsm8k_steps", "test", limit=2)["index"][:]
        [0, 1]
    """
    from datasets import Dataset

    path = Path(name)
    if name == EMBEDDED:
        if split not in ("train", "test"):
            raise ValueError(f'gsm8k_steps has the splits "train" and "test", got {split!r}')
        rows = Dataset.from_list(
            [{**step, "completion": step["answer"]} for step in load_steps(split)]  # pyright: ignore
        )
    elif (path / METADATA_FILE).is_file():
        pool = load_pool(
            path, tokenizer=tokenizer, reference_model_fingerprint=reference_model_fingerprint
        )
        rows = pool.to_dataset()
    else:
        rows = _load_dataset(name, split)
    rows.info.dataset_name = path.name if path.exists() else name  # a model's card names its data
    if limit:
        rows = rows.select(range(min(limit, len(rows))))
    return rows if "index" in rows.column_names else with_index(rows)


def _load_dataset(name: str, split: str) -> Any:
    from datasets import load_dataset

    kind = _FORMATS.get(Path(name).suffix)
    try:
        if kind is not None:
            return load_dataset(kind, data_files=name, split="train")
        return load_dataset(name, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"got the data set {name!r} and found none ({error}); need {EMBEDDED}, the directory "
            f"of a finished pool (llm-xrisk pool makes one), a {', '.join(_FORMATS)} file, or a "
            "data set of the hub"
        ) from error
