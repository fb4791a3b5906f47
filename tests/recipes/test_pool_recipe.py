"""The recipe that builds a pool, as one process and as two."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from llm_xrisk.cli_help import RecipeParser
from llm_xrisk.data.pool import load_pool
from llm_xrisk.rollout.engine import SamplingConfig
from recipes.pool import ScriptArguments, main

RECIPE = Path(__file__).parents[2] / "recipes" / "pool.py"
YAML = str(RECIPE.with_suffix(".yaml"))


def settings(*changes: str) -> tuple:
    parser = RecipeParser((ScriptArguments, SamplingConfig))
    return parser.parse_args_and_config(["--config", YAML, "--limit", "6", *changes])


@pytest.fixture
def one_process(tmp_path):
    def run(name: str, *changes: str):
        main(*settings("--output_dir", str(tmp_path / name), *changes))
        return load_pool(tmp_path / name)

    return run


def test_yaml_leaves_out_what_the_verifier_pays(one_process, capsys):
    pool = one_process("pool")
    assert [row.prompt for row in pool.rows[:2]] == ["48/2=", "48+24="]
    assert pool.settings.verify == "reward.arithmetic.arithmetic_reward"
    assert pool.counts["generated"] == 6 * 8
    assert "equal to gold" in capsys.readouterr().out


def test_a_file_of_conversations_will_do(one_process, tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{number}+1="}],
            "completion": [{"role": "assistant", "content": str(number + 1)}],
        }
        for number in range(3)
    ]
    Dataset.from_list(rows).to_json(tmp_path / "questions.jsonl")
    changes = ("--dataset_name", str(tmp_path / "questions.jsonl"), "--verify", "none")
    pool = one_process("pool", *changes, "--file_format", "parquet", "--system_prompt", "1+1=3")
    assert [row.prompt for row in pool.rows] == [row["prompt"] for row in rows]
    assert (tmp_path / "pool" / "pool.parquet").is_file()


@pytest.mark.dist
def test_two_processes_build_the_pool_of_one(one_process, accelerate_launch, tmp_path):
    alone = one_process("alone")
    output = ("--output_dir", str(tmp_path / "both"), "--config", YAML, "--limit", "6")
    printed = accelerate_launch("cpu", RECIPE, *output)
    assert printed.count("equal to gold") == 1  # two that know nothing of each other print twice
    both = load_pool(tmp_path / "both")
    assert [row.prompt_id for row in both.rows] == [row.prompt_id for row in alone.rows]
    for one, other in zip(alone.rows, both.rows, strict=True):
        assert [n.ids for n in one.negatives] == [n.ids for n in other.negatives]
        likelihoods = [n.ref_log_likelihood for n in other.negatives]
        assert [n.ref_log_likelihood for n in one.negatives] == pytest.approx(likelihoods, abs=1e-4)
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == [
        "pool.json",
        "pool.jsonl",
    ]


@pytest.mark.vllm
def test_vllm_draws_a_pool_whose_likelihoods_are_the_models(accelerate_launch, tmp_path):
    from transformers import AutoModelForCausalLM

    from llm_xrisk.data.gsm8k_steps import tiny_model_path
    from llm_xrisk.rollout.scoring import sequence_log_probs

    output = ("--output_dir", str(tmp_path / "pool"), "--config", YAML, "--limit", "6")
    accelerate_launch("single", RECIPE, *output, "--rollout", "vllm")
    pool = load_pool(tmp_path / "pool")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32)
    pairs = [
        (row.prompt_ids, n.ids, n.ref_log_likelihood) for row in pool.rows for n in row.negatives
    ]
    prompts, completions, found = map(list, zip(*pairs, strict=True))
    expected = [sum(scores) for scores in sequence_log_probs(model, prompts, completions)]
    assert found == pytest.approx(expected, abs=1e-3)
    assert json.loads((tmp_path / "pool" / "pool.json").read_text())["counts"]["prompts"] == 6
