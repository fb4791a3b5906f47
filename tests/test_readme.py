"""The README tells the truth: its example runs, its table is complete, its files exist."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

from llm_xrisk.objectives import OBJECTIVES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_classic_example_runs_and_learns() -> None:
    block = next(b for b in python_blocks() if "AveragePrecision" in b)
    output = io.StringIO()
    with redirect_stdout(output):
        exec(compile(block, "README.md", "exec"), {})
    value = float(output.getvalue().rsplit(" ", 1)[1])
    assert 0.0 < value < 1.0


def test_every_example_compiles_and_imports_what_exists() -> None:
    blocks = python_blocks()
    assert len(blocks) == 4
    for block in blocks:
        compile(block, "README.md", "exec")
        imports = [line for line in block.splitlines() if line.startswith(("from ", "import "))]
        exec("\n".join(imports), {})


def test_the_table_names_every_objective() -> None:
    table = README.split("## Objectives")[1].split("##")[0]
    assert [name for name in OBJECTIVES if f"`{name}`" not in table] == []


def test_it_is_short_and_names_files_that_exist() -> None:
    assert len(README.splitlines()) <= 200
    named = re.findall(r"`((?:tests|recipes|benchmarks)/[\w/.]+)`", README)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_its_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
