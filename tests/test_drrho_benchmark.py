"""What benchmarks/drrho.py compares: its data and noise, its metrics, and a whole toy run."""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.robust import sets
from benchmarks.robust.grid import ERM, METHODS, REFERENCE, Rates
from benchmarks.robust.sets import Sizes
from benchmarks.robust.training import measure, metrics
from llm_xrisk.data.gsm8k_steps import is_correct
from llm_xrisk.data.synthetic_steps import expression_key
from llm_xrisk.trainers.drrho_config import DRRHOConfig, robust_objective
from tests.conftest import ROOT, run

SIZES = Sizes(train=200, holdout=50, validation=40, test=60, batch=20)


@pytest.fixture(scope="module")
def steps() -> sets.DataSet:
    return sets.steps(SIZES)


def test_every_method_has_as_many_configurations_as_any_other_and_settings_that_exist():
    rates = Rates((1e-4, 2e-4), (1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4))
    for method in METHODS.values():
        assert len(method.settings) * len(rates.of(method)) == 6
        assert method.peer is None or method.peer in METHODS
        for setting in method.settings:
            given: dict[str, Any] = {**method.arguments, **setting}
            robust_objective(DRRHOConfig(output_dir="unused", use_cpu=True, **given), 100)


def test_plain_fine_tuning_weighs_all_rows_alike_also_once_their_losses_have_fallen():
    given: dict[str, Any] = dict(METHODS[ERM].arguments)
    objective = robust_objective(DRRHOConfig(output_dir="unused", use_cpu=True, **given), 100)
    for scale in (5.0, 1.0, 0.1):
        losses = (scale * torch.tensor([1.0, 2.0, 4.0])).requires_grad_()
        (grad,) = torch.autograd.grad(objective.train()(losses).loss, losses)
        torch.testing.assert_close(grad, torch.full((3,), 1 / 3))


def test_no_expression_stands_in_two_parts_of_the_steps(steps: sets.DataSet):
    parts = [steps.pool, steps.validation, steps.test]
    keys = Counter(expression_key(p.removesuffix("=")) for part in parts for p, _ in part)
    assert max(keys.values()) == 1
    assert [len(part) for part in parts[1:]] == [40, 60]


def test_a_seed_draws_the_same_rows_at_every_noise_rate_and_spoils_the_share(steps: sets.DataSet):
    clean, holdout = steps.draw(SIZES, 0.0, 3)
    noisy, same_holdout = steps.draw(SIZES, 0.2, 3)
    assert holdout == same_holdout and not {*clean} & {*holdout}
    assert [prompt for prompt, _ in clean] == [prompt for prompt, _ in noisy]
    assert all(is_correct(*pair) for pair in [*clean, *holdout] if pair[1] != "3/4")
    changed = [k for k in range(200) if clean[k] != noisy[k]]
    assert 30 <= len(changed) <= 40  # some answers, like 10, meet themselves
    assert Counter(a for _, a in clean) == Counter(a for _, a in noisy)
    assert steps.draw(SIZES, 0.2, 4)[0] != noisy


def test_sentences_end_where_their_result_begins_and_share_nothing():
    if not (Path(os.environ.get("XRISK_DATA", "")) / "gsm8k").is_dir():
        pytest.skip("needs XRISK_DATA with gsm8k/train.jsonl and gsm8k/test.jsonl")
    found = sets.sentences(SIZES)
    prompts = [prompt for part in vars(found).values() for prompt, _ in part]
    assert len(set(prompts)) == len(prompts) > 10_000
    assert max(map(len, prompts)) == sets.PROMPT
    for prompt, answer in [*found.validation, *found.test]:
        expression = prompt.rpartition("<<")[2]
        assert expression.endswith("=") and is_correct(expression, answer)


def test_greedy_and_likelihood_are_those_of_generated_and_scored_answers(tiny_model_path: str):
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    pairs = [("48/2=", "24"), ("3+4=", "7"), ("12*12=", "145"), ("5.5+1=", "6.5")]
    rows = sets.encode(pairs)
    found = metrics(measure(model, rows), rows)
    for k, (prompt, answer) in enumerate(pairs):
        batch = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**batch, max_new_tokens=8, do_sample=False)
        given = tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True)
        assert found["greedy"][k] == (given == answer)
        whole = tokenizer(prompt + answer + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        labels = whole.clone()
        labels[:, : len(prompt)] = -100
        nll = model(whole, labels=labels).loss.item()
        assert found["nll"][k] == pytest.approx(nll, rel=1e-4)
        assert found["pass@1"][k] == pytest.approx(np.exp(-nll * (len(answer) + 1)), rel=1e-3)
    assert 0 < found["greedy"].sum() < len(pairs)


def test_the_cvar_is_the_mean_of_the_worst_tenth():
    rows = [{"completion_ids": [1, 2]}] * 40
    nll = np.random.default_rng(0).exponential(size=40).astype(np.float32)
    found = metrics(np.stack([2 * nll, np.zeros_like(nll)]), rows)
    assert found["cvar"].mean() == pytest.approx(np.sort(nll)[-4:].mean(), rel=1e-6)


def test_a_toy_run_writes_its_table_and_a_second_one_trains_nothing(tmp_path: Path):
    results = tmp_path / "toy.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "drrho.py"), "--toy", "--data", "steps"]
    command += ["--seeds", "2", "--folder", str(tmp_path), "--results", str(results)]
    run(command)
    first = json.loads(results.read_text())
    rows = {row["method"]: row for row in first["steps"]["tables"]["20 % noise"]}
    assert list(rows) == list(METHODS)
    for row in rows.values():
        assert np.isfinite([value for found in row["metrics"].values() for value in found]).all()
        assert row["method"] == ERM or ERM in row["minus"]
    assert len({tuple(row["seeds"]["nll"]) for row in rows.values()}) == len(METHODS)
    gap = rows[REFERENCE]["metrics"]["nll"][0] - rows[ERM]["metrics"]["nll"][0]
    assert rows[REFERENCE]["minus"][ERM]["nll"][0] == pytest.approx(gap, abs=2e-5)
    for reference in tmp_path.glob("steps-*/references"):
        reference.rename(reference.with_name("gone"))  # a run that trains would miss it
    results.unlink()
    run(command)
    assert json.loads(results.read_text()) == first
