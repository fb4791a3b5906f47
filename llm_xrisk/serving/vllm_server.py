"""``llm-xrisk serve``: vLLM's OpenAI-compatible server for a model, an adapter or a TempNet."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llm_xrisk.serving.tempnet_folder import SETTING, tempnet_folder

SERVER = "vllm.entrypoints.openai.api_server"  # vLLM for the CPU has no working `vllm serve`
# vLLM asks for `vllm serve` instead of the module that works everywhere
_PYTHON = ["-W", "ignore::DeprecationWarning:__main__", "-m", SERVER]
_ADAPTER, _MODEL, _TEMPNET = "adapter_config.json", "config.json", "tempnet_config.json"
_GENERATION = "generation_config.json"
_LARGEST_RANK = 512
_DESCRIPTION = """\
Serve a model by vLLM's OpenAI-compatible server, on 127.0.0.1 unless --host says otherwise.

MODEL is a model's name or folder, the folder of a LoRA adapter (its base model is served with it,
under the adapter's name), or that of a TempNet alone (the model it was trained for is served). A
TempNet in the folder gives every sampled token its own temperature; requests leave theirs at 1.
A request opts out by "vllm_xargs": {"tempnet": 0}."""
_EPILOG = f"""\
Every other option goes to vLLM as it is: --port 8000, --max-model-len 4096, --dtype bfloat16,
--tensor-parallel-size 2, --logprobs-mode processed_logprobs (log-probs at the temperatures), ...
They are listed by: python -m {SERVER} --help

  llm-xrisk serve outputs/tempnet --port 8000
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
       -d '{{"model": "outputs/tempnet", "prompt": "48/2=", "max_tokens": 16}}'"""


@dataclass(frozen=True)
class Served:
    """What a server loads.

    Attributes:
        name: What the user typed; requests name it.
        model: Name or folder of the model.
        adapter: Folder of a LoRA adapter on that model, or None.
        rank: The adapter's.
        tempnet: Folder of a TempNet, or None.
    """

    name: str
    model: str
    adapter: str | None = None
    rank: int = 0
    tempnet: str | None = None


def serve(arguments: Sequence[str]) -> int:
    """Start the server in place of this process, or say why not.

    Args:
        arguments: What stands after the verb: MODEL, ``--tempnet``, and vLLM's options.

    Returns:
        0 after ``--help``, 2 where the command line asks for something that is not there. A server
        that starts does not return: it has this process's id, receives its signals, and its exit
        code is the command's.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(list(arguments)[1:])
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(parser.format_help())
        return 0 if arguments else 2
    try:
        served = find_served(arguments[0], options.tempnet)
        command = server_command(served, rest)
        temperatures = _checked_tempnet(served, rest)
        _check_vllm()
    except (FileNotFoundError, ImportError, ValueError) as error:
        sys.stderr.write(f"llm-xrisk serve: {error}\n")
        return 2
    sys.stdout.write(f"{served.name}: {_summary(served, temperatures)}\n{shlex.join(command)}\n")
    sys.stdout.flush()
    os.execv(command[0], command)


def find_served(name: str, tempnet: str | None = None) -> Served:
    """What a name or folder stands for.

    Args:
        name: A model, an adapter's folder, or a TempNet's.
        tempnet: Folder of a TempNet to serve with it, ``"none"`` for none; by default the one in
            the folder, if there is one.

    Raises:
        FileNotFoundError: the name is a path where nothing is, or the folder names no base model.
        ValueError: MODEL is an option; an adapter that vLLM cannot serve.
    """
    if name.startswith("-"):
        raise ValueError(f"got {name} first; need MODEL before every option: llm-xrisk serve MODEL")
    folder = Path(name)
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".")):
        raise FileNotFoundError(f"got {name}, which is no folder; need that of a model")
    found = tempnet_folder(name, tempnet)
    if (folder / _ADAPTER).is_file():
        config = _read(folder / _ADAPTER)
        base = _base_of(folder, config.get("base_model_name_or_path"))
        ranks = [config.get("r", 0), *(config.get("rank_pattern") or {}).values()]
        return Served(name, base, str(folder), max(ranks), found)
    if folder.is_dir() and not (folder / _MODEL).is_file():
        if not (folder / _TEMPNET).is_file():
            raise FileNotFoundError(
                f"{name} has neither {_MODEL} nor {_ADAPTER} nor {_TEMPNET}; need the folder of a "
                "model, an adapter or a TempNet: that of a checkpoint-N, or what save_model wrote"
            )
        base = _base_of(folder, _read(folder / _TEMPNET).get("base_model"))
        if (Path(base) / _ADAPTER).is_file():
            inner = find_served(base, "none")
            return Served(name, inner.model, inner.adapter, inner.rank, found)
        return Served(name, base, tempnet=found)
    return Served(name, name, tempnet=found)


def server_command(served: Served, rest: Sequence[str] = ()) -> list[str]:
    """The command line of the server.

    Args:
        served: What to serve.
        rest: vLLM's options, which win over the ones given here.

    Raises:
        FileNotFoundError: the file of ``--config`` is not there.
        ValueError: ``--additional-config`` is no JSON object; speculative decoding with a TempNet;
            an adapter of a rank above 512.

    Example:
        >>> server_command(Served("m", "m"), ["--port", "8001"])[5:]
        ['--model', 'm', '--host', '127.0.0.1', '--port', '8001']
    """
    given = _given(rest)
    command = [sys.executable, *_PYTHON, "--model", served.model]
    if not given & {"host", "uds"}:
        command += ["--host", "127.0.0.1"]
    if served.name != served.model and served.adapter is None and "served-model-name" not in given:
        command += ["--served-model-name", served.name]
    if served.adapter is not None:
        command += _adapter_options(served, given)
    rest, own = list(rest), tempnet_folder(served.model)
    if served.tempnet != own:  # else the plug-in finds it, or finds none
        rest = _with_setting(rest, served.tempnet or False)
    if served.tempnet is not None:
        drafts = sorted(n for n in given if n.startswith("spec-") or n in _SPECULATIVE)
        if drafts:
            raise ValueError(
                f"got --{drafts[0]} and the TempNet of {served.tempnet}: drafts would be accepted "
                "at other temperatures, and vLLM would drop the TempNet silently; leave out one of "
                "them (--tempnet none)"
            )
        if _default_temperature(served.model) != 1 and not given & _OF_GENERATION:
            command += ["--override-generation-config", json.dumps({"temperature": 1.0})]
    return [*command, *rest]


_SPECULATIVE = {"speculative-config", "sc"}
_OF_GENERATION = {"generation-config", "override-generation-config"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llm-xrisk serve",
        usage="llm-xrisk serve MODEL [--tempnet FOLDER|none] [any option of vLLM's server]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    text = "a TempNet from another folder, or none though MODEL has one"
    parser.add_argument("--tempnet", metavar="FOLDER|none", help=text)
    return parser


def _given(arguments: Sequence[str]) -> set[str]:
    """Names of the options on a command line and in the file of its ``--config``, with dashes."""
    names = [a.lstrip("-").split("=")[0] for a in arguments if a.startswith("-")]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    path = parser.parse_known_args(list(arguments))[0].config
    if path is not None:
        import yaml

        if not Path(path).is_file():
            raise FileNotFoundError(f"got --config {path}, which is no file; need vLLM's YAML")
        names += yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    return {name.replace("_", "-").split(".")[0] for name in names}


def _adapter_options(served: Served, given: set[str]) -> list[str]:
    if served.rank > _LARGEST_RANK:
        raise ValueError(
            f"the adapter in {served.adapter} has rank {served.rank}, vLLM takes {_LARGEST_RANK} "
            f"at most; merge it: llm-xrisk merge {served.adapter} FOLDER"
        )
    module = {"name": served.name, "path": served.adapter, "base_model_name": served.model}
    options = ["--enable-lora", "--lora-modules", json.dumps(module)]
    if "max-lora-rank" not in given:
        rank = max(8, 1 << (served.rank - 1).bit_length())  # powers of two are what vLLM takes
        options += ["--max-lora-rank", str(rank)]
    return options


def _with_setting(rest: list[str], value: str | bool) -> list[str]:
    """``--additional-config`` with our entry; the user's other entries stay."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--additional-config", "--additional_config")
    known, rest = parser.parse_known_args(rest)
    try:
        settings = {**json.loads(known.additional_config or "{}"), SETTING: value}
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"got --additional-config {known.additional_config}; need a JSON object ({error})"
        ) from error
    return [*rest, "--additional-config", json.dumps(settings)]


def _checked_tempnet(served: Served, rest: Sequence[str]) -> str:
    """The bounds of the temperatures, of a TempNet that fits the model."""
    if served.tempnet is None:
        return ""
    from llm_xrisk.models.tempnet import TempNet, _model_vocabulary

    config = TempNet.from_pretrained(
        served.tempnet, vocab_size=_model_vocabulary(Path(served.model))
    ).config
    return f"{config.tau_min:g} to {config.tau_max:g}"


def _check_vllm() -> None:
    if find_spec("vllm") is not None:
        return
    import torch

    install = 'pip install "llm-xrisk[gpu]"'
    if not torch.cuda.is_available():
        install = (
            'pip install "llm-xrisk[cpu]" && pip uninstall -y torchvision torchaudio torchcodec'
        )
    raise ImportError(f"vLLM is not installed; need it to serve: {install}")


def _summary(served: Served, temperatures: str) -> str:
    parts = [f"the adapter on {served.model}"] if served.adapter else [f"model {served.model}"]
    if served.tempnet is None:
        parts.append("without a TempNet")
    else:
        parts.append(f"with the TempNet of {served.tempnet} (temperatures {temperatures})")
        default = _default_temperature(served.model)
        if default != 1:
            parts.append(f"requests at temperature 1, not the {default:g} of its {_GENERATION}")
    return ", ".join(parts)


def _default_temperature(model: str) -> float:
    path = Path(model) / _GENERATION
    found = _read(path).get("temperature") if path.is_file() else None
    return 1.0 if found is None else float(found)


def _base_of(folder: Path, named: str | None) -> str:
    if not named:
        raise FileNotFoundError(
            f"{folder} does not name the model it was trained for; serve that model: "
            f"llm-xrisk serve MODEL --tempnet {folder}, or for an adapter --enable-lora "
            f"--lora-modules NAME={folder}"
        )
    if Path(named).is_absolute() and not Path(named).is_dir():
        raise FileNotFoundError(
            f"{folder} was trained for {named}, which is not here; serve the model from where it "
            f"is: llm-xrisk serve MODEL --tempnet {folder}, or for an adapter --enable-lora "
            f"--lora-modules NAME={folder}"
        )
    return named


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
