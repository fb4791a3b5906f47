"""Every registered objective is tested, documented and cheap to import."""

import doctest
import importlib
import inspect
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_xrisk.objectives import OBJECTIVES, Objective
from llm_xrisk.objectives.surrogates import Hinge, Surrogate
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


def arguments(kind: type[Objective]) -> dict[str, Any]:
    """What the contract builds an objective of this kind with."""
    contract = next(c for c in contracts() if getattr(c, "objective_class", None) is kind)()
    given = {"num_samples": contract.num_samples} | contract.options
    if "num_items" in inspect.signature(kind).parameters:
        given |= dict(zip(("num_items", "num_relevant"), torch.tensor([[3], [1]]), strict=True))
        given |= {"ideal_dcg": torch.ones(1)}
    return {k: v for k, v in given.items() if k in inspect.signature(kind).parameters}


def annotated(kind: type[Objective], *classes: Any) -> list[str]:
    """The arguments that are one of these, or one of these or a function or nothing."""

    def plain(kinds: tuple[Any, ...]) -> bool:
        return bool(set(classes) & set(kinds)) and torch.Tensor not in kinds

    found = inspect.signature(kind).parameters.items()
    return [n for n, p in found if plain(getattr(p.annotation, "__args__", (p.annotation,)))]


@pytest.mark.parametrize("kind", OBJECTIVES.values())
def test_every_number_of_a_constructor_must_be_one(kind: type[Objective]) -> None:
    given = arguments(kind)
    kind(**given)
    for name in annotated(kind, float, int):
        for wrong in ("0.5", True, [0.5], torch.tensor(0.5), float):
            with pytest.raises(TypeError, match=rf"^{name} of {kind.__name__} must be "):
                kind(**given | {name: wrong})
    for name in annotated(kind, float):
        for wrong in (math.nan, math.inf):
            with pytest.raises(ValueError, match=r"nan|inf"):
                kind(**given | {name: wrong})


@pytest.mark.parametrize("kind", OBJECTIVES.values())
def test_an_argument_no_objective_has_is_refused_with_those_it_has(kind: type[Objective]) -> None:
    name = kind.__name__
    with pytest.raises(TypeError, match=rf"keyword argument 'margin'; it takes {name}\("):
        kind(**arguments(kind), margin=1.0)


@pytest.mark.parametrize("kind", [k for k in OBJECTIVES.values() if annotated(k, Surrogate)])
def test_a_surrogate_by_name_or_as_a_class_is_refused_with_those_there_are(
    kind: type[Objective],
) -> None:
    for wrong in ("squared_hinge", torch.relu, None, 1.0):
        with pytest.raises(TypeError, match=r"surrogate of .* Surrogate, got .*SquaredHinge\(marg"):
            kind(**arguments(kind) | {"surrogate": wrong})
    with pytest.raises(TypeError, match=r"got the class Hinge; pass an instance, Hinge\("):
        kind(**arguments(kind) | {"surrogate": Hinge})


KEYLESS = [k for k in OBJECTIVES.values() if "num_samples" not in inspect.signature(k).parameters]
CLASSIC = ("AUCMargin", "PairwiseAUC", "KLDRO", "KLConstrainedDRO", "CVaRDRO", "Chi2DRO")


@pytest.mark.parametrize("kind", KEYLESS)
def test_a_number_of_samples_is_not_taken_for_something_else(kind: type[Objective]) -> None:
    with pytest.raises(TypeError, match="it keeps nothing for each sample, and takes no num_sampl"):
        kind(**arguments(kind), num_samples=600)
    if kind.__name__ in (*CLASSIC, "Chi2ConstrainedDRO"):
        with pytest.raises(TypeError, match=r"\(600\): too many positional arguments"):
            kind(600)


@pytest.mark.parametrize("kind", [k for k in OBJECTIVES.values() if k not in KEYLESS])
def test_a_missing_number_of_samples_is_asked_for(kind: type[Objective]) -> None:
    given = {k: v for k, v in arguments(kind).items() if k != "num_samples"}
    with pytest.raises(TypeError, match=r"missing .* 'num_samples'.*num_samples=len\(train_datas"):
        kind(**given)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"num_samples must be at least 1, got {wrong}"):
            kind(**given, num_samples=wrong)
