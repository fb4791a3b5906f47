"""Model cards: the method, the data, the evaluation with intervals, the settings, the versions."""

import dataclasses
import importlib.metadata
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from llm_xrisk.evaluation.compare import format_range, format_value
from llm_xrisk.evaluation.pass_at_k import Evaluation
from llm_xrisk.evaluation.results import heading, tabulate

_COMMON = (
    *("learning_rate", "lr_scheduler_type", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "num_train_epochs", "max_steps", "seed"),
)
_LEFT_OUT = {
    *("model_init_kwargs", "vllm_kwargs", "resume_from_checkpoint"),  # may hold paths and tokens
    *("reference_init_kwargs", "reference_cache"),
    *("logging_steps", "logging_nan_inf_filter", "remove_unused_columns"),
}
_PACKAGES = ("llm-xrisk", "transformers", "torch", "datasets", "peft")
_TEMPLATE = "[More Information Needed]"  # of PEFT
_GENERATED = ("- llm-xrisk", _TEMPLATE)
_SECTION = "## Evaluation"
_SPEED = ("runtime", "samples_per_second", "steps_per_second")


def model_card(
    name: str,
    *,
    method: str,
    source: str,
    base: str,
    settings: Mapping[str, Any],
    metadata: Mapping[str, Any],
    data: str = "",
    history: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The text of a card.

    Args:
        name: The model's name.
        method: The method in a few words.
        source: Where it is described.
        base: Name or path of the model that training started from; a path is cut to its last part.
        settings: What the table lists.
        metadata: For the head of the card: tags, library_name, datasets and so on.
        data: What it was trained on, as :func:`described` says it.
        history: The trainer's log; the last evaluation in it is shown.

    Example:
        >>> card = model_card("calc", method="DFT", source="arXiv", base="/models/base",
        ...     settings={"gamma": 0.9}, metadata={"tags": ["llm-xrisk"]})
        >>> print(card.split("---")[2].split("##")[0].strip())
        # calc
        <BLANKLINE>
        `base`, trained by DFT (arXiv).
    """
    import yaml

    local = Path(base).is_absolute() or Path(base).exists()
    head = {**metadata, "model_name": name} | ({} if local or not base else {"base_model": base})
    known = {key: value for key, value in head.items() if value}
    shown = Path(base).name if local else base
    sections = [
        f"# {name}\n\n{f'`{shown}`' if shown else 'A model'}, trained by {method} ({source}).\n",
        f"## Data\n\n{data}.\n" if data else "",
        _of_training(history),
        f"## Settings\n\n{_table(('setting', 'value'), settings.items())}",
        f"## Versions\n\n{', '.join(_versions())}\n",
    ]
    head = yaml.safe_dump(known, sort_keys=False)
    return f"---\n{head}---\n\n" + "\n".join(text for text in sections if text)


def described(dataset: Any) -> str:
    """A data set in a few words: its name where it has one, rows, columns.

    Example:
        >>> described([{"prompt": "1+1=", "answer": "2"}])
        '1 rows with answer, prompt'
    """
    if dataset is None or not len(dataset):
        return ""
    name = getattr(getattr(dataset, "info", None), "dataset_name", None)
    size = f"{len(dataset):,} rows with {', '.join(sorted(dataset[0]))}"
    return f"{name}: {size}" if name else size


def add_evaluation(
    folder: str | Path,
    evaluation: Evaluation,
    *,
    dataset: str,
    split: str | None = None,
    verifier: str | None = None,
) -> Path:
    """Put an evaluation into a model's card: values in its head, a table with intervals below.

    The head has the Hub's ``model-index``, values as shares of 1. An earlier evaluation on the
    same data at the same temperature is replaced; whatever else the card says is kept, also in
    one written by hand, and a folder without a card gets one.

    Args:
        folder: The model's folder.
        evaluation: What ``llm-xrisk evaluate`` found and wrote to its ``--results_file``.
        dataset: Name of the data; a path is cut to its last part.
        split: Its split.
        verifier: What graded the answers.

    Returns:
        The card's path.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the card's head cannot be read.
    """
    path = Path(folder) / "README.md"
    if not path.parent.is_dir():
        raise FileNotFoundError(f"got {folder}, which is no folder; need that of a saved model")
    name = path.parent.resolve().name
    card = _read_card(path.read_text(encoding="utf-8") if path.is_file() else f"# {name}\n", path)
    data: Any = card.data
    dataset = Path(dataset).name if Path(dataset).exists() else dataset
    temperature = float(evaluation.sampling.get("temperature", 1.0))
    config = f"temperature {temperature:g}"
    measured = [m for m in evaluation.metrics if m.startswith(("pass@", "greedy"))]
    fresh = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type="accuracy" if metric == "greedy" else metric,
            metric_value=round(evaluation.mean(metric), 4),
            metric_config="greedy decoding" if metric == "greedy" else config,
        )
        for metric in measured
    ]
    earlier = data.eval_results or []
    kept = [old for old in earlier if not any(old.is_equal_except_value(new) for new in fresh)]
    data.eval_results = [*kept, *fresh]
    data.model_name = data.model_name or name
    title = ", ".join([dataset, *([split] if split else []), config])
    card.text = _with_part(card.text, title, _measured(evaluation, verifier))
    path.write_text(str(card), encoding="utf-8")
    return path


def hand_over_card(text: str, *, name: str, base: str | None, kind: str) -> str:
    """The card of a merged model: that of its source, which no longer speaks of an adapter.

    Args:
        text: The source's card; empty where it has none.
        name: The merged model's name.
        base: The model that the source was trained on, if it is an adapter or a TempNet.
        kind: What the source is: "adapter", "model" or "TempNet".
    """
    shown = Path(base).name if base and Path(base).exists() else base
    if not text or _TEMPLATE in text:
        text = f"# {name}\n" + (f"\nA {kind} of `{shown}`.\n" if kind == "TempNet" else "")
    card = _read_card(text, Path(name))
    data: Any = card.data
    if kind == "adapter":
        first, *others = re.split(r"(?m)^(?=## )", card.text, maxsplit=1)
        merged = f"The adapter is merged into `{shown}`: plain weights, which need no PEFT.\n"
        card.text = "\n".join([f"{first.rstrip()}\n\n{merged}", *others])
    data.library_name = "transformers"
    if Path(data.base_model or "").is_absolute():  # PEFT writes paths down
        data.base_model = None
    tags = [t for t in data.tags or [] if t != "lora" and not t.startswith("base_model:")]
    data.tags = tags or None
    return str(card)


def own_settings(*configs: Any) -> dict[str, Any]:
    """The settings that this package declares, and those by which runs differ most.

    Args:
        *configs: Dataclass instances, such as a trainer's ``args``.
    """
    found: dict[str, Any] = {}
    for config in configs:
        ours = {
            name
            for kind in type(config).__mro__
            if kind.__module__.startswith("llm_xrisk.")
            for name in vars(kind).get("__annotations__", {})
        }
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            listed = field.name in ours or field.name in _COMMON
            if listed and value is not None and field.name not in _LEFT_OUT:
                found[field.name] = getattr(value, "value", value)
    return found


def write_card(directory: str, text: str) -> None:
    """Write ``README.md``, unless there is one that somebody wrote."""
    path = Path(directory) / "README.md"
    if path.is_file() and not any(mark in path.read_text() for mark in _GENERATED):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _read_card(text: str, path: Path) -> ModelCard:
    if not text.startswith("---"):
        text = f"---\n{{}}\n---\n\n{text}"
    try:
        return ModelCard(text)
    except Exception as error:  # YAML's and the Hub's are many
        raise ValueError(
            f"{path} has a head that is no model card's ({str(error).splitlines()[0]}); need YAML "
            "between two lines of ---: mend it, or move the file away"
        ) from error


def _of_training(history: Sequence[Mapping[str, Any]]) -> str:
    """The last evaluation that a trainer logged; several data sets may share its step."""
    evaluated = [line for line in history if any(key.startswith("eval_") for key in line)]
    if not evaluated:
        return ""
    step = evaluated[-1].get("step")
    rows = {
        key.removeprefix("eval_"): f"{value:.4g}"
        for line in evaluated
        if line.get("step") == step
        for key, value in line.items()
        if key.startswith("eval_") and not key.endswith(_SPEED)
    }
    table = _table(("metric", "value"), rows.items())
    note = "Means over the trainer's evaluation rows; `llm-xrisk evaluate` gives intervals."
    return _with_part("", f"In training, step {step}", f"{table}\n{note}\n").lstrip()


def _measured(evaluation: Evaluation, verifier: str | None) -> str:
    """An evaluation as a paragraph and a table with intervals."""
    results = tabulate({evaluation.name: evaluation})
    cells = results.rows[0].cells
    rows = [
        (heading(name), format_value(name, c.interval.estimate), format_range(name, c.interval))
        for name, c in cells.items()
    ]
    graded = f", graded by `{verifier}`" if verifier else ""
    some = evaluation.ungradable
    left_out = f"; {some} more could not be graded" if some else ""
    table = _table(("metric", "value", "95 % interval"), rows)
    return (
        f"{results.num_prompts:,} prompts with {results.num_generations} sampled answers each"
        f"{graded}{left_out}.\n\n{table}\n{results.method}.\n"
    )


def _table(heads: Sequence[str], rows: Any) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _with_part(body: str, title: str, part: str) -> str:
    """The body with ``### title`` under :data:`_SECTION`, in place of an earlier one."""
    sections = re.split(r"(?m)^(?=## )", body)
    place = next((k for k, s in enumerate(sections) if s.startswith(f"{_SECTION}\n")), None)
    if place is None:
        ours = ("## Settings\n", "## Versions\n")
        place = next((k for k, s in enumerate(sections) if s.startswith(ours)), len(sections))
        sections.insert(place, f"{_SECTION}\n\n")
        if place and sections[place - 1].strip():
            sections[place - 1] = sections[place - 1].rstrip() + "\n\n"
    heads = re.split(r"(?m)^(?=### )", sections[place])
    parts = [p for p in heads if not p.startswith(f"### {title}\n")]
    parts.append(f"### {title}\n\n{part}")
    last = place == len(sections) - 1
    sections[place] = "\n\n".join(p.strip() for p in parts) + ("\n" if last else "\n\n")
    return "".join(sections)


def _versions() -> Iterator[str]:
    for package in _PACKAGES:
        try:
            yield f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
