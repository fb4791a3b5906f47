"""Model cards: by which method a model was trained, with which settings, by which versions."""

import dataclasses
import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
_GENERATED = ("- llm-xrisk", "[More Information Needed]")  # ours, and the template of PEFT


def model_card(
    name: str,
    *,
    method: str,
    source: str,
    base: str,
    settings: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> str:
    """The text of a card.

    Args:
        name: The model's name.
        method: The method in a few words.
        source: Where it is described.
        base: Name or path of the model that training started from; a path is cut to its last part.
        settings: What the table lists.
        metadata: For the head of the card: tags, library_name, datasets and so on.

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
    rows = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
    versions = ", ".join(_versions())
    return (
        f"---\n{yaml.safe_dump(known, sort_keys=False)}---\n\n# {name}\n\n"
        f"{f'`{shown}`' if shown else 'A model'}, trained by {method} ({source}).\n\n"
        f"## Settings\n\n| setting | value |\n|---|---|\n{rows}\n\n"
        f"## Versions\n\n{versions}\n"
    )


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


def _versions() -> Iterator[str]:
    for package in _PACKAGES:
        try:
            yield f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
