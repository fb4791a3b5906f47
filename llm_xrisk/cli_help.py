"""The argument parser of the recipes: TRL's, with settings grouped by what they control."""

import argparse
import dataclasses
import difflib
import inspect
import os
from collections.abc import Iterable
from typing import Any

import yaml
from trl import TrlParser

from llm_xrisk.cli import LAUNCH_OPTIONS, PROGRAM_NAME

_LIBRARIES = ("trl", "transformers")  # their headings come after ours, in this order


class RecipeParser(TrlParser):
    """TRL's parser of dataclasses and YAML, with a heading for every dataclass.

    A setting stands under the class that declares it, so that a config derived from
    ``TrainingArguments`` shows its own fields first and the inherited ones under a heading of
    their own, last. Settings that nobody declares are an error, on the command line and in the
    file; launch options in the file are left to ``llm-xrisk``.

    Args:
        dataclass_types: The dataclasses to fill, in the order in which they are returned.
        **kwargs: Anything ``argparse.ArgumentParser`` takes, such as ``description``.

    Example:
        >>> from dataclasses import dataclass, field
        >>> @dataclass
        ... class Sampling:
        ...     '''How completions are drawn.'''
        ...     temperature: float = field(default=1.0, metadata={"help": "0 is greedy"})
        >>> (sampling,) = RecipeParser(Sampling).parse_args_and_config(["--temperature", "0.5"])
        >>> sampling.temperature
        0.5
    """

    def __init__(self, dataclass_types: Any, **kwargs: Any) -> None:
        single = isinstance(dataclass_types, type)
        types: list[Any] = [dataclass_types] if single else list(dataclass_types)
        kwargs.setdefault("prog", os.environ.get(PROGRAM_NAME))
        kwargs.setdefault("formatter_class", _HelpFormatter)
        kwargs.setdefault("usage", "%(prog)s [--config FILE.yaml] [--setting value ...]")
        super().__init__(types, **kwargs)
        self._group_by_owner(types)

    def parse_args_and_config(self, args: Iterable[str] | None = None, **_: Any) -> tuple[Any, ...]:
        """Fill the dataclasses from the defaults, the YAML of ``--config`` and the command line.

        Args:
            args: The arguments; those of the process if None.
            **_: TRL's options about leftovers; here leftovers are always an error.

        Returns:
            One instance per dataclass.
        """
        try:
            *parsed, unknown = super().parse_args_and_config(args, return_remaining_strings=True)
        except (OSError, ValueError, yaml.YAMLError) as error:  # the file, or a setting's range
            self.error(str(error))
        if unknown:
            self.error(
                f"got {' '.join(unknown)}; need settings that --help lists{self._hint(unknown)}"
            )
        return tuple(parsed)

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Take defaults from a YAML file's content, apart from what concerns the launch."""
        settings = {name: value for name, value in kwargs.items() if name not in LAUNCH_OPTIONS}
        return super().set_defaults_with_config(**settings)

    def _hint(self, unknown: list[str]) -> str:
        names = ["--config", *(f"--{name}" for name in LAUNCH_OPTIONS)]
        names += [option for action in self._actions for option in action.option_strings]
        written = next((text.partition("=")[0] for text in unknown if text.startswith("--")), "")
        found = difflib.get_close_matches(written, names, n=1)
        return f": did you mean {found[0]}?" if found else ""

    def _group_by_owner(self, types: list[type]) -> None:
        owners = {
            field.name: _owner(kind, field.name)
            for kind in types
            for field in dataclasses.fields(kind)
        }
        for owner in sorted(dict.fromkeys(owners.values()), key=_rank):
            group = self.add_argument_group(owner.__name__, _first_line(owner))
            for action in [
                a for a in self._optionals._group_actions if owners.get(a.dest) is owner
            ]:
                self._optionals._group_actions.remove(action)
                group._group_actions.append(action)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Descriptions as they were written, and the default of every setting."""


def _owner(kind: type, name: str) -> type:
    """Return the class that declares a field last: ours, where ours changes a default."""
    return next(cls for cls in kind.__mro__ if name in inspect.get_annotations(cls))


def _rank(owner: type) -> int:
    library = owner.__module__.split(".")[0]
    return _LIBRARIES.index(library) + 1 if library in _LIBRARIES else 0


def _first_line(owner: type) -> str | None:
    text = (owner.__doc__ or "").strip()
    return None if not text or text.startswith(f"{owner.__name__}(") else text.splitlines()[0]
