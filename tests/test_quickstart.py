"""The main job at toy size: every stage runs, a second run reuses, a killed one goes on."""

import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from llm_xrisk.quickstart import QuickstartConfig
from llm_xrisk.quickstart.run import run
from llm_xrisk.quickstart.stages import Stages, stage_progress

TOY = {
    "eval_questions": 12,
    "eval_samples": 8,
    "pool_questions": 32,
    "dft_steps": 2,
    "dft_batch": 8,
    "disco_steps": 2,
    "disco_questions": 8,
}


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[QuickstartConfig, str]:
    config = QuickstartConfig(
        output_dir=str(tmp_path_factory.mktemp("quickstart")), controls=True, **TOY
    )
    console = Console(record=True, width=120)
    run(config, console)
    return config, console.export_text()


def test_the_table_has_a_row_for_every_arm(first_run: tuple[QuickstartConfig, str]) -> None:
    config, text = first_run
    summary = json.loads((Path(config.output_dir) / "summary.json").read_text())
    rows = ["base", "base, T = 0.5", "DFT", "DisCO", "DFT then DisCO", "SFT", "GRPO"]
    assert sorted(summary["table"]) == sorted(rows)
    assert set(summary["auc"]) == {"base", "DFT", "SFT"}
    assert "12 held-out questions" in text
    for cells in summary["table"].values():
        mean, lower, upper = cells["pass@1"]
        assert 0 <= lower <= mean <= upper <= 1


def test_the_report_stands_alone(first_run: tuple[QuickstartConfig, str]) -> None:
    html = (Path(first_run[0].output_dir) / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?https?:""", html)
    assert "DFT then DisCO" in html and "<svg" in html


def test_a_second_run_reuses_everything_and_says_so(
    first_run: tuple[QuickstartConfig, str],
) -> None:
    config, _ = first_run
    model = Path(config.output_dir) / "seed-0" / "disco" / "model" / "model.safetensors"
    before = model.stat().st_mtime_ns
    console = Console(record=True, width=200)
    run(config, console)
    text = console.export_text()
    assert "reused from" in text and "train DFT then DisCO" in text
    assert model.stat().st_mtime_ns == before


def test_a_stage_runs_again_when_what_determines_it_changes(tmp_path: Path) -> None:
    done: list[str] = []

    def stage(name: str, lr: float, inputs: tuple[str, ...] = ()) -> None:
        stages.run(
            name,
            name,
            lambda directory, advance: done.append(name),
            total=1,
            settings={"lr": lr},
            inputs=inputs,
        )

    with stage_progress() as progress:
        for lr in (0.1, 0.1, 0.2):
            stages = Stages(tmp_path, progress)
            stage("first", lr)
            stage("second", 0.5, ("first",))
    assert done == ["first", "second", "first", "second"]


def test_an_interrupted_stage_keeps_what_it_had(tmp_path: Path) -> None:
    def interrupted(directory: Path, advance: object) -> None:
        (directory / "half").write_text("x")
        raise KeyboardInterrupt

    def resumed(directory: Path, advance: object) -> None:
        assert (directory / "half").read_text() == "x"

    with stage_progress() as progress:
        stages = Stages(tmp_path, progress)
        with pytest.raises(KeyboardInterrupt):
            stages.run("stage", "stage", interrupted, total=1, settings={})
        stages.run("stage", "stage", resumed, total=1, settings={})
        assert stages.reused == []
