"""Every registered objective on the device against the CPU, and whether it waits for the device."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_xrisk.objectives import OBJECTIVES
from tests.contract import Batch, ObjectiveContract, Result, evaluate, state

TESTS = Path(__file__).resolve().parents[2] / "tests" / "objectives"
BARS = {torch.float64: 1e-10, torch.float32: 1e-5}
STEPS = 3


def check_objectives(device: str) -> dict[str, Any]:
    """Largest relative error of losses, gradients and state; and the objectives that wait."""
    kinds = contracts()
    missing = sorted(set(OBJECTIVES) - {kind.objective_class.__name__ for kind in kinds})
    rows = {kind.__name__: check_objective(kind(), device) for kind in kinds}
    worst = {
        f"worst_{name}": max(row[name] for row in rows.values()) for name in ("float64", "float32")
    }
    wait = sorted(name for name, row in rows.items() if row["waits"])
    ok = not missing and not wait and all(row["ok"] for row in rows.values())
    where = "CUDA, sync debug mode" if device == "cuda" else "the meta device"
    found = {"ok": ok, "missing": missing, "host_sync": wait, "host_sync_checked_on": where}
    return found | worst | {"objectives": rows}


def contracts() -> list[type[ObjectiveContract]]:
    """The contract test of each objective: it knows how to build it and what rows it takes."""
    for path in sorted(TESTS.glob("test_*.py")):
        importlib.import_module(f"tests.objectives.{path.stem}")
    found: list[type[ObjectiveContract]] = []
    queue = [ObjectiveContract]
    while queue:
        children = queue.pop().__subclasses__()
        found += children
        queue += children
    named = [kind for kind in found if hasattr(kind, "objective_class")]  # not what others share
    return sorted(named, key=lambda kind: kind.__name__)


def check_objective(contract: ObjectiveContract, device: str) -> dict[str, Any]:
    """Errors in both dtypes, and what the device was waited for, if it was."""
    row: dict[str, Any] = {}
    for dtype, bar in BARS.items():
        name = str(dtype).removeprefix("torch.")
        row[name] = largest_error(contract, device, dtype)
        row["ok"] = row.get("ok", True) and row[name] <= bar
    return row | {"waits": waits(contract, device)}


def largest_error(contract: ObjectiveContract, device: str, dtype: torch.dtype) -> float:
    """Of the loss, every gradient and the state over some steps."""
    here, there = (contract.build(state_dtype=dtype) for _ in range(2))
    there.to(device)
    error = 0.0
    for batch in contract.batches(STEPS):
        batch = batch.to(dtype)
        want, got = evaluate(here, batch), evaluate(there, batch.to(device))
        for name, value in numbers(want, state(here)).items():
            error = max(error, relative_error(numbers(got, state(there))[name], value))
    return error


def numbers(result: Result, held: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"loss": result.loss} | result.gradients | {f"state.{n}": v for n, v in held.items()}


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm; without the division where there is nothing."""
    got, want = got.detach().to("cpu", torch.float64), want.detach().to("cpu", torch.float64)
    size = float(want.norm())
    return float((got - want).norm()) / (size or 1.0)


def waits(contract: ObjectiveContract, device: str) -> str:
    """What forward or backward waited for the device with; empty if it never did."""
    place = "cuda" if device == "cuda" else "meta"  # reading a value of a meta tensor raises
    objective = contract.build(state_dtype=torch.float32).to(place)
    first, second = (b.to(torch.float32).to(place) for b in contract.batches(2))
    try:
        evaluate(objective, first)
        evaluate_without_waiting(objective, second, place)
    except RuntimeError as error:
        return str(error)[:200]
    return ""


def evaluate_without_waiting(objective: Any, batch: Batch, place: str) -> None:
    """Forward and backward; on CUDA any synchronising call raises."""
    if place != "cuda":
        evaluate(objective, batch)
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate(objective, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
