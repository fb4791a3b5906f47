"""Every registered objective is tested, documented and cheap to import."""

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from llm_xrisk.objectives import OBJECTIVES, Objective
from tests.contract import ObjectiveContract

FOLDER = Path(__file__).parent
SECTIONS = ("Args:", "Shapes:", "State:", "Departures:", "Raises:", "Example:", "Relations:")


def contracts() -> list[type[ObjectiveContract]]:
    for path in sorted(FOLDER.glob("test_*.py")):
        importlib.import_module(f"tests.objectives.{path.stem}")
    found, queue = [], [ObjectiveContract]
    while queue:
        children = queue.pop().__subclasses__()
        found += children
        queue += children
    return found


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_keeps_the_contract_with_a_worked_example_of_its_own(name: str) -> None:
    kind = OBJECTIVES[name]
    own = [c for c in contracts() if getattr(c, "objective_class", None) is kind]
    assert own, f"tests/objectives has no ObjectiveContract for {name}"
    assert all("test_worked_example" in vars(contract) for contract in own)


@pytest.mark.parametrize("objective", OBJECTIVES.values())
def test_every_objective_has_the_sections_of_its_documentation_in_order(
    objective: type[Objective],
) -> None:
    text = objective.__doc__ or ""
    assert ".. math::" in text
    places = [text.find(section) for section in (".. math::", *SECTIONS, "Source:")]
    assert -1 not in places, dict(zip((".. math::", *SECTIONS, "Source:"), places, strict=True))
    assert places == sorted(places)


@pytest.mark.parametrize("objective", OBJECTIVES.values())
def test_every_objective_has_an_example_that_shows_a_number(objective: type[Objective]) -> None:
    examples = doctest.DocTestFinder(recurse=False).find(objective)[0].examples
    assert 1 <= len(examples) <= 8
    assert any("tensor(" in example.want for example in examples)


def test_the_contract_has_its_properties() -> None:
    assert len([name for name in dir(ObjectiveContract) if name.startswith("test_")]) >= 27


def test_importing_the_objectives_imports_neither_transformers_nor_datasets() -> None:
    code = "import sys, llm_xrisk.objectives; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in modules
    assert not {"transformers", "datasets", "trl", "accelerate"} & set(modules)
