"""The rules of the house that a machine can hold: layers, sizes, names, what may not be written."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llm_xrisk"
LAYERS = {
    "__init__": 0,
    "fcco": 0,
    "objectives": 1,
    "models": 1,
    "data": 1,
    "optim": 1,
    "rollout": 2,
    "trainers": 3,
    "evaluation": 3,
    "serving": 3,
    "trl": 3,
    "vllm_plugin": 3,
    "cli": 4,
    "cli_help": 4,
    "quickstart": 4,
}
ALLOWED = {
    "llm_xrisk/fcco": {"torch", "llm_xrisk.fcco"},
    "llm_xrisk/objectives": {"torch", "llm_xrisk.fcco", "llm_xrisk.objectives"},
    "llm_xrisk/optim": {"torch", "llm_xrisk.fcco", "llm_xrisk.optim"},
}
NOT_IN_REWARD = {"torch", "llm_xrisk", "transformers", "datasets", "recipes"}
MAX_MODULE, MAX_OBJECTIVE, MAX_RECIPE, MAX_FUNCTION, MAX_NESTING = 400, 150, 150, 60, 3
NESTING = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match, ast.AsyncFor, ast.AsyncWith)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def layer_of(module: str) -> int | None:
    """The layer of ``llm_xrisk.x.y``; None outside the package, an error where nobody placed it."""
    parts = module.split(".")
    if parts[0] != "llm_xrisk":
        return None
    return LAYERS[parts[1] if len(parts) > 1 else "__init__"]


def imports(path: Path) -> Iterator[str]:
    """Every imported module, those inside functions included, with relative names made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*start, *([node.module] if node.module else [])])
            parts = [f"{base}.{a.name}" for a in node.names if a.name in LAYERS]
            yield from parts if base == "llm_xrisk" and parts else [base]


def length(node: ast.AST, lines: int) -> int:
    """Lines of a node without those of its docstrings, inner ones included."""
    for inner in ast.walk(node):
        if isinstance(inner, DOCUMENTED) and ast.get_docstring(inner, clean=False) is not None:
            text = inner.body[0]
            lines -= text.end_lineno - text.lineno + 1
    return lines


def depth(node: ast.AST) -> int:
    """How deep blocks stand in each other; ``elif`` is the same block as its ``if``."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and [child] == node.orelse
        deepest = max(deepest, depth(child) + (isinstance(child, NESTING) and not is_elif))
    return deepest


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, FUNCTIONS))


PACKAGE_FILES = sources("llm_xrisk", "reward")
CODE_FILES = sources("llm_xrisk", "reward", "recipes", "tests", "benchmarks")


def test_imports_point_down():
    upward = []
    for path in sources("llm_xrisk"):
        own = LAYERS[path.relative_to(PACKAGE).with_suffix("").parts[0]]
        upward += [(name_of(path), m) for m in imports(path) if (layer_of(m) or 0) > own]
    assert not upward


@pytest.mark.parametrize("folder", ALLOWED)
def test_the_core_imports_torch_alone(folder):
    found = {(name_of(p), m) for p in sources(folder) for m in imports(p)}
    assert any(module.split(".")[0] == "torch" for _, module in found)
    roots = tuple(f"{name}." for name in ALLOWED[folder] | set(sys.stdlib_module_names))
    assert not {(path, module) for path, module in found if not f"{module}.".startswith(roots)}


def test_the_verifiers_stand_alone():
    found = {(name_of(p), m) for p in sources("reward") for m in imports(p)}
    assert found
    assert not {(p, m) for p, m in found if m.split(".")[0] in NOT_IN_REWARD}


def test_modules_are_short():
    sizes = {name_of(p): length(ast.parse(t := p.read_text()), t.count("\n")) for p in CODE_FILES}
    assert not {name: size for name, size in sizes.items() if size > MAX_MODULE}
    limit = MAX_OBJECTIVE
    assert not {n: s for n, s in sizes.items() if "llm_xrisk/objectives/" in n and s > limit}


def test_recipes_fit_on_three_screens():
    sizes = {name_of(path): path.read_text().count("\n") for path in sources("recipes")}
    assert not {name: size for name, size in sizes.items() if size > MAX_RECIPE}


def test_functions_are_short_and_shallow():
    found = [(f"{name_of(path)}:{f.name}", f) for path in CODE_FILES for f in functions(path)]
    lengths = {name: length(f, f.end_lineno - f.lineno + 1) for name, f in found}
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION}
    assert not {name: depth(f) for name, f in found if depth(f) > MAX_NESTING}


def test_no_module_is_named_utils():
    names = {"utils", "util", "helpers", "misc", "common"}
    assert not [name_of(path) for path in CODE_FILES if path.stem in names]


def test_nothing_prints_swallows_or_asserts():
    nodes = [(p, node) for p in PACKAGE_FILES for node in ast.walk(ast.parse(p.read_text()))]
    assert not [
        f"{name_of(path)}:{node.lineno}"
        for path, node in nodes
        if (isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print")
        or (isinstance(node, ast.ExceptHandler) and node.type is None)
        or isinstance(node, ast.Assert)  # raise an error that says got, need, do
    ]


def test_every_part_of_the_package_has_a_layer():
    parts = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir() if holds_code(p)}
    assert parts <= set(LAYERS)


def holds_code(path: Path) -> bool:
    return path.suffix == ".py" or (path.is_dir() and any(path.rglob("*.py")))


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_objectives_import_quickly_and_without_transformers():
    code = """
import sys, time, torch
start = time.perf_counter()
import llm_xrisk.objectives
print(time.perf_counter() - start)
print(*(m for m in ("transformers", "datasets", "accelerate", "trl") if m in sys.modules))
"""
    runs = [python(code).split("\n") for _ in range(3)]
    assert min(float(run[0]) for run in runs) <= 0.3  # the best of three: the machine may be busy
    assert all(run[1] == "" for run in runs)


def test_importing_the_package_imports_nothing_else():
    modules = ("torch", "transformers", "datasets", "numpy")
    code = f"import sys, llm_xrisk; print(*(m for m in {modules} if m in sys.modules))"
    assert python(code).strip() == ""


def test_reward_imports_without_torch():
    code = "import sys, reward; print(*(m for m in ('torch', 'llm_xrisk') if m in sys.modules))"
    assert python(code).strip() == ""
