"""The recipes on the embedded model: they parse their YAML, run, and save what they promise."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from llm_xrisk.evaluation.pass_at_k import Evaluation

RECIPES = Path(__file__).parents[2] / "recipes"


def run_recipe(name: str, *arguments: str) -> Any:
    """Call a recipe's main as its command line would."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    recipe: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = recipe
    spec.loader.exec_module(recipe)
    kinds = {
        "dft": ("ScriptArguments", "DFTConfig", "ModelConfig"),
        "disco": ("ScriptArguments", "DisCOConfig", "RolloutConfig", "ModelConfig"),
        "evaluate": ("ScriptArguments", "SamplingConfig"),
        "verify": ("ScriptArguments",),
    }[name]
    parser = recipe.RecipeParser(tuple(getattr(recipe, kind) for kind in kinds))
    yaml = RECIPES / f"{name}.yaml"
    config = ["--config", str(yaml)] if yaml.exists() else []
    return recipe.main(*parser.parse_args_and_config([*config, *arguments]))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def test_dft_recipe_trains_on_a_file_and_saves_the_model(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{k}+1=", "completion": str(k + 1), "negatives": ["7", "9"]} for k in range(8)
    ]
    data, out = write_lines(tmp_path / "data.jsonl", rows), tmp_path / "out"
    run_recipe(
        "dft",
        *("--dataset_name", data, "--output_dir", str(out), "--max_steps", "2"),
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"),
        *("--use_cpu", "true", "--save_strategy", "steps", "--save_steps", "2"),
        *("--max_length", "32", "--disable_tqdm", "true"),
    )
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "qwen3"
    assert (out / "checkpoint-2" / "objective.safetensors").is_file()


def test_dft_recipe_trains_an_adapter_without_reference_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"{k}+1=", "completion": str(k + 1), "negatives": ["7"]} for k in range(4)]
    data, out = write_lines(tmp_path / "data.jsonl", rows), tmp_path / "out"
    run_recipe(
        "dft",
        *("--dataset_name", data, "--output_dir", str(out), "--max_steps", "1"),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"),
        *("--use_cpu", "true", "--save_strategy", "no", "--max_length", "32"),
        *("--use_peft", "true", "--lora_target_modules", "all-linear", "--disable_tqdm", "true"),
    )
    assert (out / "adapter_model.safetensors").is_file()
    assert not (out / "ref_log_likelihood.safetensors").exists()


@pytest.mark.parametrize("objective", ["DisCO", "GRPO", "DrGRPO", "DAPO"])
def test_disco_recipe_runs_every_objective(objective: str, tmp_path: Path) -> None:
    run_recipe(
        "disco",
        *("--output_dir", str(tmp_path), "--max_steps", "2", "--limit", "16"),
        *("--objective", objective, "--per_device_train_batch_size", "16"),
        *("--use_cpu", "true", "--save_steps", "2", "--disable_tqdm", "true"),
    )
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    logged = next(row for row in state["log_history"] if "reward" in row)
    assert 0 <= logged["reward"] <= 1
    assert (tmp_path / "model.safetensors").is_file()


def test_evaluate_recipe_keeps_the_counts(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    run_recipe(
        "evaluate",
        *("--limit", "10", "--num_generations", "4", "--ks", "1,4", "--results_file", str(path)),
    )
    found = Evaluation.load(path)
    assert len(found.correct) == 10
    assert all(0 <= count <= 4 for count in found.correct)


def test_verify_recipe_grades_lines_and_names_a_bad_one(tmp_path: Path) -> None:
    rows = [{"completion": "24.0", "answer": "24"}, {"completion": "48/2", "answer": "24"}]
    data, out = write_lines(tmp_path / "answers.jsonl", rows), tmp_path / "graded.jsonl"
    run_recipe("verify", "--file", data, "--output", str(out), "--verifier", "arithmetic")
    graded = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["score"] for row in graded] == [1.0, 0.0]
    assert [row["completion"] for row in graded] == ["24.0", "48/2"]
    bad = write_lines(tmp_path / "bad.jsonl", [{"completion": "1"}])
    with pytest.raises(ValueError, match=r"line 1 .* lacks \['answer'\]"):
        run_recipe("verify", "--file", bad)
    (tmp_path / "torn.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match="line 1 is 'hello', which is no JSON; need an object"):
        run_recipe("verify", "--file", str(tmp_path / "torn.jsonl"))
    with pytest.raises(FileNotFoundError, match="which is no file; need JSON lines"):
        run_recipe("verify", "--file", str(tmp_path / "nope.jsonl"))


def test_verify_recipe_compares_mathematics_with_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("math_verify")
    rows = [
        {"prediction": r"\frac{1}{2}", "style": "bare", "gold": "0.5", "expected": True},
        {"prediction": "so it is 24.", "style": "text", "gold": "24", "expected": True},
        {"prediction": r"\boxed{25}", "style": "text", "gold": "24", "expected": False},
        {"prediction": r"\boxed{24}", "style": "text", "gold": "24", "finish_reason": "length"},
    ]
    data = write_lines(tmp_path / "cases.jsonl", [row | {"tier": "core"} for row in rows])
    shares = {}
    for mode in ("lenient", "strict"):
        out = tmp_path / f"{mode}.jsonl"
        run_recipe("verify", "--file", data, "--mode", mode, "--output", str(out))
        graded = [json.loads(line) for line in out.read_text().splitlines()]
        shares[mode] = [row["score"] for row in graded]
        assert graded[3]["status"] == "truncated"
        printed = capsys.readouterr().out
        assert f"4 answers, verifier math {mode}" in printed
        assert "verdicts on 3 labelled answers" in printed
    assert shares == {"lenient": [1.0, 1.0, 0.0, 0.0], "strict": [1.0, 0.0, 0.0, 0.0]}


def test_verify_takes_its_file_first() -> None:
    path = RECIPES / "verify.py"
    spec = importlib.util.spec_from_file_location("recipe_verify", path)
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    sys.modules["recipe_verify"] = recipe
    spec.loader.exec_module(recipe)
    parser = recipe.RecipeParser(recipe.ScriptArguments)
    (first,) = parser.parse_args_and_config(recipe.with_file(["a.jsonl", "--mode", "strict"]))
    (named,) = parser.parse_args_and_config(
        recipe.with_file(["--mode", "strict", "--file", "a.jsonl"])
    )
    assert first == named
    assert (first.file, first.mode, first.verifier) == ("a.jsonl", "strict", "math")


def test_training_and_evaluation_take_a_reward_function_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "def odd(completions, **columns):\n    return [float(len(c) % 2) for c in completions]\n"
    (tmp_path / "rewards_of_this_test.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    data = write_lines(tmp_path / "questions.jsonl", [{"prompt": f"{k}+1="} for k in range(8)])
    reward, out = "rewards_of_this_test.odd", tmp_path / "out"
    run_recipe(
        "disco",
        *("--output_dir", str(out), "--max_steps", "1", "--dataset_name", data),
        *("--per_device_train_batch_size", "16", "--reward_funcs", reward),
        *("--use_cpu", "true", "--save_steps", "1", "--disable_tqdm", "true"),
    )
    state = json.loads((out / "checkpoint-1" / "trainer_state.json").read_text())
    assert (out / "README.md").is_file()
    assert state["global_step"] == 1
    counts = str(tmp_path / "counts.json")
    arguments = ["--num_generations", "4", "--ks", "1,4", "--results_file", counts]
    run_recipe("evaluate", "--dataset_name", data, "--reward_func", reward, *arguments)
    assert len(Evaluation.load(counts).correct) == 8
    with pytest.raises(ValueError, match=r"arithmetic_reward asks for \['answer'\]"):
        run_recipe("evaluate", "--dataset_name", data, *arguments)
    with pytest.raises(ValueError, match="got ks='1;4', need numbers and commas"):
        run_recipe("evaluate", "--dataset_name", data, "--ks", "1;4")
