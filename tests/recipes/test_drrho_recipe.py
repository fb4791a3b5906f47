"""The DRRHO recipe on the embedded model: it parses its YAML, trains, saves what it promises."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from llm_xrisk.data.gsm8k_steps import tiny_model_path

RECIPES = Path(__file__).parents[2] / "recipes"
SHORT = (
    *("--max_steps", "2", "--per_device_train_batch_size", "4", "--limit", "16"),
    *("--gradient_accumulation_steps", "2", "--use_cpu", "true", "--save_strategy", "steps"),
    *("--save_steps", "2", "--logging_steps", "1", "--max_length", "64", "--disable_tqdm", "true"),
)


def run_recipe(*arguments: str) -> None:
    """Call the recipe's main as its command line would."""
    spec = importlib.util.spec_from_file_location("recipe_drrho", RECIPES / "drrho.py")
    assert spec is not None
    assert spec.loader is not None
    recipe: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = recipe
    spec.loader.exec_module(recipe)
    kinds = (recipe.ScriptArguments, recipe.DRRHOConfig, recipe.ModelConfig)
    parser = recipe.RecipeParser(kinds)
    config = ("--config", str(RECIPES / "drrho.yaml"))
    recipe.main(*parser.parse_args_and_config([*config, *SHORT, *arguments]))


@pytest.mark.parametrize(
    "choice",
    [
        ("--reference_model", tiny_model_path()),
        ("--objective", "CVaRDRO", "--alpha", "0.25", "--objective_kwargs", '{"nu_lr": 0.1}'),
        ("--objective", "KLConstrainedDRO", "--level", "token", "--rho", "0.2"),
        ("--selection", "rho_topk", "--keep_fraction", "0.5"),
        ("--objective", "CVaRDRO", "--alpha", "1", "--use_reference", "false"),
    ],
    ids=lambda choice: choice[1],
)
def test_the_recipe_runs_every_comparison_it_names(tmp_path: Path, choice: Any) -> None:
    run_recipe("--output_dir", str(tmp_path), *map(str, choice))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.model_type == "qwen3"
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert all(line["nll"] > 0 for line in state["log_history"] if "loss" in line)
    cached = (tmp_path / "reference_losses.safetensors").is_file()
    assert cached == ("--use_reference" not in choice)


def test_the_recipe_trains_an_adapter_evaluates_and_resumes(tmp_path: Path) -> None:
    adapter = ("--use_peft", "true", "--lora_target_modules", "all-linear")
    rows = [{"prompt": f"{k}+1=", "completion": str(k + 1)} for k in range(8)]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join(map(json.dumps, rows)))
    evaluation = ("--eval_dataset_name", str(held_out), "--eval_strategy", "steps")
    base = ("--output_dir", str(tmp_path), *adapter)
    run_recipe(*base, *evaluation, "--eval_steps", "2")
    assert (tmp_path / "adapter_model.safetensors").is_file()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert any("eval_nll" in line for line in state["log_history"])
    run_recipe(*base, "--resume_from_checkpoint", "true", "--max_steps", "3")
