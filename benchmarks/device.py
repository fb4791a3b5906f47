"""Checks and times this checkout on a GPU; `benchmarks/device.sh` is the command.

(a) the tests of fcco, objectives and log-probs on the device; (b) gradients of every objective and
of DFT and DisCO steps against the CPU's, and that no objective waits for the device; (c) time and
memory of DFT and DisCO steps of a random 0.5 B model in bf16, against supervised fine-tuning, and
of log-probs against log_softmax; (d) a JSON file with versions, seeds and hardware.

`--device cpu --toy` runs all of it at toy size, which tests the program and measures nothing.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # nothing is installed on such a machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Trainer would spread over several

import torch  # noqa: E402

PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "tokenizers", "numpy")
PARTS = ("tests", "objectives", "gradients", "log_probs", "training")
ROWS = 32


def main() -> int:
    """Run the parts asked for, write the file, print the tables; 1 if a part failed."""
    arguments = parse_arguments()
    device, toy = arguments.device, arguments.toy
    run = runners(device, toy, arguments.rows)
    start = time.perf_counter()
    results = facts(device, toy) | {name: part(name, run[name]) for name in arguments.parts}
    results["seconds"] = time.perf_counter() - start
    failed = [name for name in arguments.parts if not results[name]["ok"]]
    for path in destinations(arguments, results["hardware"]["name"]):
        write(path, results)
    print(table(results, arguments.parts))
    print(f"FAILED: {', '.join(failed)}" if failed else "all parts passed")
    return 1 if failed else 0


def runners(device: str, toy: bool, rows: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """What does each part; imported here, so that wrong arguments are refused at once."""
    from benchmarks.on_device.gradients import check_gradients
    from benchmarks.on_device.objectives import check_objectives
    from benchmarks.on_device.suite import run_suite
    from benchmarks.on_device.timing import time_log_probs, time_trainers
    from benchmarks.on_device.trainers import FULL, TOY

    scale = TOY if toy else replace(FULL, rows=rows)
    return {
        "tests": lambda: run_suite(device, toy=toy),
        "objectives": lambda: check_objectives(device),
        "gradients": lambda: check_gradients(device),
        "log_probs": lambda: time_log_probs(device, scale),
        "training": lambda: time_trainers(device, scale),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=found)
    parser.add_argument("--toy", action="store_true", help="toy sizes; always so on a CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    rows = "rows of a training step, a multiple of 16; fewer for a GPU of less than 80 GB"
    parser.add_argument("--rows", type=int, default=ROWS, help=rows)
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results)")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("got --device cuda and torch sees no GPU; try --device cpu --toy")
    if arguments.rows % 16 or arguments.rows < 16:
        parser.error(f"--rows must be a multiple of 16, got {arguments.rows}")
    arguments.toy = arguments.toy or arguments.device == "cpu"
    return arguments


def part(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run one part; an error in it is its result, and the next part still runs."""
    start = time.perf_counter()
    try:
        found = run()
    except Exception:  # whatever it is belongs in the file
        found = {"ok": False, "error": traceback.format_exc()[-4000:]}
    found["seconds"] = time.perf_counter() - start
    verdict = "passed" if found["ok"] else f"FAILED: {found.get('error', '')}"
    print(f"{name}: {verdict} ({found['seconds']:.0f} s)", file=sys.stderr, flush=True)
    return found


def facts(device: str, toy: bool) -> dict[str, Any]:
    """What was run where."""
    versions = {name: version_of(name) for name in PACKAGES}
    hardware: dict[str, Any] = {"name": f"cpu-{platform.machine()}", "cpus": os.cpu_count()}
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        memory = gpu.total_memory / (1 << 30)
        hardware |= {"name": gpu.name, "memory_gib": memory, "cuda": torch.version.cuda}
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": device,
        "toy": toy,
        "hardware": hardware,
        "versions": {"python": platform.python_version(), **versions},
        "seed": 0,  # of models, rows and rollouts
    }


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def destinations(arguments: argparse.Namespace, hardware: str) -> list[Path]:
    """The results folder for real runs or the file asked for, and $OUT where it is set."""
    name = re.sub(r"[^a-z0-9]+", "-", f"device-{hardware}".lower()).strip("-") + ".json"
    chosen = [arguments.output] if arguments.output else []
    if not chosen and not arguments.toy:
        chosen = [ROOT / "benchmarks" / "results" / name]
    return chosen + ([Path(os.environ["OUT"]) / name] if os.environ.get("OUT") else [])


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    print(f"wrote {path}", file=sys.stderr)


def table(results: dict[str, Any], parts: list[str]) -> str:
    """What a reader wants to know, as text."""
    lines = [f"{results['hardware']['name']}, torch {results['versions']['torch']}"]
    for name in parts:
        lines += ["", f"{name}: {'ok' if results[name]['ok'] else 'FAILED'}"]
        lines += SUMMARIES[name](results[name]) if "error" not in results[name] else []
    return "\n".join(lines)


def tests_summary(found: dict[str, Any]) -> list[str]:
    counts = f"  {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"
    left_out = [f"  left out: {name} (needs a missing package)" for name in found["left_out"]]
    return [counts, *left_out, *(f"  {name}" for name in found["failures"][:20])]


def objectives_summary(found: dict[str, Any]) -> list[str]:
    rows = [[n, r["float64"], r["float32"], r["waits"]] for n, r in found["objectives"].items()]
    return columns(["relative error to the CPU", "float64", "float32", "waits"], rows)


def gradients_summary(found: dict[str, Any]) -> list[str]:
    return columns(
        ["relative error to the CPU", "float32"], list(map(list, found["steps"].items()))
    )


def log_probs_summary(found: dict[str, Any]) -> list[str]:
    rows = [[n, found[n]["seconds"], found[n]["extra_gib"]] for n in ("ours", "log_softmax")]
    return columns(["forward and backward", "seconds", "GiB beyond the logits"], rows)


def training_summary(found: dict[str, Any]) -> list[str]:
    names = ("step_s", "tokens_per_s", "peak_gib", "time_vs_sft", "first_update_s")
    rows = [[v, *(row.get(n) for n in names)] for v, row in found["variants"].items()]
    heads = ["trainer", "step, s", "tokens/s", "peak, GiB", "time / SFT's", "first update, s"]
    return columns(heads, rows)


SUMMARIES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "tests": tests_summary,
    "objectives": objectives_summary,
    "gradients": gradients_summary,
    "log_probs": log_probs_summary,
    "training": training_summary,
}


def columns(heads: list[str], rows: list[list[Any]]) -> list[str]:
    """Aligned text: the first column left, numbers right."""
    cells = [heads, *([shown(value) for value in row] for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(heads))]
    first, *others = widths
    lines = [[row[0].ljust(first), *map(str.rjust, row[1:], others)] for row in cells]
    return ["  ".join(["", *line]) for line in lines]


def shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
