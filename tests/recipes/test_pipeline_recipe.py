"""The pipeline recipe: commands as one would type them, stages done once, errors that help."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from rich.console import Console
from transformers import AutoModelForCausalLM

from llm_xrisk.cli import launch_command_line
from llm_xrisk.cli_help import RecipeParser
from llm_xrisk.data.pool import load_pool
from llm_xrisk.models.tempnet import TempNet
from llm_xrisk.quickstart.pipeline import STAGES, Pipeline, Policy
from llm_xrisk.quickstart.stages import Stages, stage_progress
from recipes.pipeline import Commands, ScriptArguments, main

YAML = Path(__file__).parents[2] / "recipes" / "pipeline.yaml"
SHORT = "--max_steps 1 --per_device_train_batch_size 8 --use_cpu true --report_to none"
ADAPTER = "--use_peft true --lora_target_modules all-linear"


def settings(output: Path, *changes: str) -> Any:
    words = {
        "dft": f"{SHORT} --max_length 64 --learning_rate 1e-3",
        "dpo": f"{SHORT} --bf16 false --learning_rate 1e-3",
        "tempnet": f"{SHORT} --entropy 0.5 --tempnet_hidden_size 8",
        "pool": "--num_negatives 1 --max_new_tokens 8 --verify reward.arithmetic_reward",
        "evaluate": "--limit 8 --num_generations 2 --ks 1 --max_new_tokens 8",
    }
    arguments = [f"--{name}={text}" for name, text in words.items()]
    parser = RecipeParser((ScriptArguments, Commands))
    return parser.parse_args_and_config(
        ["--output_dir", str(output), "--limit", "16", *arguments, *changes]
    )


@pytest.fixture
def pipeline(tmp_path: Path) -> Iterator[Callable[..., Pipeline]]:
    """``pipeline(sft="--max_steps 1")``: one that shows its commands in ``.shown``."""
    with stage_progress() as progress:

        def build(**words: str) -> Pipeline:
            commands = dict.fromkeys([*STAGES, "lora", "pool", "evaluate"], "") | words
            console = Console(file=io.StringIO(), width=1000)
            return Pipeline(Stages(tmp_path / "run", progress), commands, console)

        yield build


def shown(pipeline: Pipeline) -> str:
    assert isinstance(pipeline.console.file, io.StringIO)
    return pipeline.console.file.getvalue()


def test_the_shipped_file_has_arguments_for_every_command() -> None:
    parser = RecipeParser((ScriptArguments, Commands))
    given, commands = parser.parse_args_and_config(["--config", str(YAML)])
    assert given.stages.split(",") == list(STAGES)
    assert all(text for name, text in vars(commands).items() if name != "lora")
    assert set(yaml.safe_load(YAML.read_text())) <= {*vars(given), *vars(commands)}


def test_it_runs_in_one_process_whatever_there_is() -> None:
    for verb in ("merge", "pipeline"):
        command = launch_command_line(verb, ["--accelerate_config", "zero3", "--limit", "1"])
        assert command[2].endswith("single.yaml")
        assert command[-2:] == ["--limit", "1"]


def test_unknown_stages_are_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got the stages \['rlhf'\]; need some of sft, dft, dpo"):
        main(*settings(tmp_path, "--stages", "sft,rlhf"))


@pytest.mark.dist
def test_a_stage_is_done_once_and_an_interrupted_one_resumes(
    pipeline: Callable[..., Pipeline], tiny_model_path: str, tmp_path: Path
) -> None:
    words = f"{SHORT} --bf16 false --max_steps 2 --save_strategy steps --save_steps 1"

    def run() -> tuple[Policy, str]:
        made = pipeline(sft=words)
        rows = made.write_rows("gsm8k_steps", 16)
        return made.train(1, "sft", made.start(tiny_model_path), rows), shown(made)

    policy, commands = run()
    model = tmp_path / "run" / "1-sft" / "sft"
    assert policy == Policy(str(model), "1-sft")
    assert commands.startswith(f"trl sft --model_name_or_path {tiny_model_path} --dataset_name ")
    wanted = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert run() == (policy, "")
    mark = model.parent / "stage.json"
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"done": False}))
    (model / "model.safetensors").unlink()
    shutil.rmtree(model / "checkpoint-2")  # it was killed after its first step
    assert f"--resume_from_checkpoint {model}/checkpoint-1" in run()[1]
    found = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert all(found[name].equal(value) for name, value in wanted.items())


@pytest.mark.slow
def test_adapters_of_both_families_are_handed_on_and_a_second_run_reuses_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings(tmp_path, "--stages", "dft,dpo,tempnet", f"--lora={ADAPTER}")
    last = Path(main(*given))
    printed = capsys.readouterr().out
    assert last == tmp_path / "3-tempnet" / "tempnet-merged"
    for line in ("llm-xrisk pool --model", "llm-xrisk dft --model", "trl dpo --model_name_or_path"):
        assert line in printed
    assert f"llm-xrisk merge {tmp_path}/2-dpo/dpo {tmp_path}/2-dpo/dpo-merged" in printed
    pool = load_pool(tmp_path / "2-dpo" / "pool")
    assert pool.settings.reference.name == str(tmp_path / "1-dft" / "dft-merged")
    lines = (tmp_path / "2-dpo" / "preferences" / "train.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    assert set(row) == {"prompt", "chosen", "rejected"} and row["chosen"] != row["rejected"]
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "2-dpo" / "dpo-merged")
    handed = AutoModelForCausalLM.from_pretrained(last)
    assert all(p.equal(q) for p, q in zip(policy.parameters(), handed.parameters(), strict=True))
    assert TempNet.from_pretrained(last).config.hidden_size == 8
    head: Any = ModelCard.load(last / "README.md").data
    assert len(head.eval_results) == 2
    before = (last / "model.safetensors").stat().st_mtime_ns
    assert main(*given) == str(last)
    again = capsys.readouterr().out
    assert "reused from" in again and "--model_name_or_path" not in again
    assert (last / "model.safetensors").stat().st_mtime_ns == before


def test_a_command_that_fails_is_shown_with_the_end_of_its_log(
    pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    made = pipeline(disco="--gama 0.9")
    made.stages.keys["data"] = "rows"
    start = made.start(str(tmp_path / "nothing"))
    error = r"llm-xrisk disco ended with \d+; mend its arguments .*got --gama 0\.9; need settings"
    with pytest.raises(RuntimeError, match=f"(?s){error}"):
        made.train(1, "disco", start, tmp_path)
    assert not json.loads((tmp_path / "run" / "1-disco" / "stage.json").read_text())["done"]
