"""The TempNet recipe on the embedded model: it parses its YAML, trains, saves what it promises."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from llm_xrisk.data.gsm8k_steps import tiny_model_path
from llm_xrisk.models.tempnet import TempNet

RECIPES = Path(__file__).parents[2] / "recipes"
SHORT = (
    *("--max_steps", "2", "--per_device_train_batch_size", "4", "--limit", "16"),
    *("--gradient_accumulation_steps", "2", "--use_cpu", "true", "--save_strategy", "steps"),
    *("--save_steps", "2", "--logging_steps", "1", "--max_length", "64", "--disable_tqdm", "true"),
)


def run_recipe(*arguments: str) -> None:
    """Call the recipe's main as its command line would."""
    spec = importlib.util.spec_from_file_location("recipe_tempnet", RECIPES / "tempnet.py")
    assert spec is not None
    assert spec.loader is not None
    recipe: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = recipe
    spec.loader.exec_module(recipe)
    kinds = (recipe.ScriptArguments, recipe.TempNetTrainingConfig, recipe.ModelConfig)
    parser = recipe.RecipeParser(kinds)
    config = ("--config", str(RECIPES / "tempnet.yaml"))
    recipe.main(*parser.parse_args_and_config([*config, *SHORT, *arguments]))


def test_the_recipe_trains_the_calculators_temperatures_and_names_it(tmp_path: Path) -> None:
    run_recipe("--output_dir", str(tmp_path))
    assert TempNet.from_pretrained(tmp_path).config.base_model == tiny_model_path()
    assert not (tmp_path / "model.safetensors").exists()
    card = (tmp_path / "README.md").read_text()
    assert "datasets: gsm8k_steps" in card and "16 rows with" in card
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    lines = [line for line in state["log_history"] if "loss" in line]
    assert [line["entropy/target"] for line in lines] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("peft", [False, True])
def test_the_recipe_trains_both_evaluates_and_resumes(tmp_path: Path, peft: bool) -> None:
    rows = [{"text": f"{k}+1={k + 1}"} for k in range(8)]
    data = tmp_path / "documents.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    adapter = ("--use_peft", "true", "--lora_target_modules", "all-linear") if peft else ()
    base = ("--output_dir", str(out), "--train_model", "true", "--learning_rate", "1e-3", *adapter)
    evaluation = ("--eval_dataset_name", str(data), "--eval_strategy", "steps")
    run_recipe(*base, "--dataset_name", str(data), *evaluation, "--eval_steps", "2")
    weights = "adapter_model.safetensors" if peft else "model.safetensors"
    assert (out / weights).is_file()
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "qwen3"
    assert str(tmp_path) not in (out / "README.md").read_text()
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert any("eval_entropy" in line for line in state["log_history"])
    resumed = ("--resume_from_checkpoint", "true", "--max_steps", "3")
    run_recipe(*base, "--dataset_name", str(data), *resumed)
