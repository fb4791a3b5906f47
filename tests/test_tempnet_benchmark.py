"""benchmarks/tempnet.py: its splits, its samplers, and a run of seconds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import tempnet
from benchmarks.temperature import data, samplers
from benchmarks.temperature.samplers import ENTROPY, FIXED, NET, Sampler
from llm_xrisk.models import TempNet
from llm_xrisk.serving import TempNetLogitsProcessor

SMALL = replace(data.Sizes(), validation=20, test=12)


@pytest.fixture(scope="module")
def parts() -> dict[str, data.Part]:
    return data.steps(SMALL)


@pytest.fixture(scope="module")
def calculator(parts: dict[str, data.Part]):
    return data.frozen_model("steps", 0, Path(), parts["train"], SMALL)


def test_no_prompt_is_in_two_splits(parts: dict[str, data.Part]):
    prompts = [text for part in parts.values() for text in part.texts]
    assert len(set(prompts)) == len(prompts)
    assert [len(parts[name]) for name in ("validation", "test")] == [20, 12]


@pytest.mark.parametrize("configurations", [2, 8])
@pytest.mark.parametrize("name", list(tempnet.METRICS))
def test_every_method_has_as_many_configurations_as_any_other(name: str, configurations: int):
    found = samplers.grid(name, configurations)
    assert {len(set(chosen)) for chosen in found.values()} == {configurations}
    assert set(samplers.NET_ENTROPIES[name]) <= set(samplers.ENTROPIES[name])


def test_samplers_of_equal_temperatures_draw_equal_answers(parts, calculator):
    net = TempNet(102, rho=1.0, tau_min=0.4, tau_max=0.8)
    with torch.no_grad():
        net.last.weight.zero_()  # tau is the middle of its range, whatever the logits
    pair = (samplers.FixedTemperature(0.6), TempNetLogitsProcessor(net))
    first, second = (samplers.sampled(calculator, parts["test"], d, 3) for d in pair)
    assert first["right"] == second["right"] and first["tokens"] == second["tokens"]
    hot = samplers.sampled(calculator, parts["test"], samplers.FixedTemperature(2.0), 3)
    assert sum(hot["right"]) < sum(first["right"])


def test_the_likelihood_of_an_answer_is_that_of_the_model(parts, calculator):
    part = parts["test"]
    found = samplers.predicted(
        samplers.gold_logits(calculator, part), part.completions, samplers.FixedTemperature(1.0)
    )
    for i in range(3):
        ids = torch.tensor([part.prompts[i] + part.completions[i]])
        labels = ids.clone()
        labels[0, : len(part.prompts[i])] = -100
        expected = calculator(input_ids=ids, labels=labels).loss.item() * found["lengths"][i]
        assert found["nll"][i] == pytest.approx(expected, rel=1e-4)


def test_no_temperatures_have_less_loss_than_the_oracle_of_a_tempnet():
    logits = 3 * torch.randn(50, 102, generator=torch.Generator().manual_seed(0))
    net = TempNet(102, rho=3.0)
    found = samplers.beside_the_oracle(logits, net, 1.5, (0.2, 0.5, 1.0))
    assert 0 < found["constant_above"] < found["loss_above"]
    assert found["log_ratio"] > 0.1


def test_a_toy_run_is_reported_and_not_repeated(tmp_path: Path):
    bench = tempnet.Bench(tmp_path, tempnet.TOY, seeds=2)
    found = json.loads(json.dumps(tempnet.Report(bench, "steps").as_json()))
    assert set(found["differences"]) == {"pass@1", "pass@8", "nll"}
    assert {row["method"] for row in found["test"]} == {FIXED, ENTROPY, NET}
    for row in found["test"]:
        assert 0 <= row["pass@1"]["estimate"] <= row["pass@8"]["estimate"] <= 1
        assert row["perplexity"] >= 1 and row["tokens_per_cpu_second"] > 0
    nets = [row for row in found["validation"] if row["method"] == NET]
    assert len(nets) == 2 and all(row["training_cpu_seconds"] > 0 for row in nets)

    path = bench.path
    lines = path.read_text().splitlines()  # the first is empty
    path.write_text("\n".join([*lines[:-1], lines[-1][:40]]))  # killed while writing
    again = tempnet.Bench(tmp_path, tempnet.TOY, seeds=2)
    assert len(again.done) == len(lines) - 2
    repeated = json.loads(json.dumps(tempnet.Report(again, "steps").as_json()))
    assert repeated["differences"] == found["differences"]
    assert len(tempnet.Bench(tmp_path, tempnet.TOY, seeds=2).done) == len(lines) - 1


def test_models_of_text_are_made_once_and_differ_by_seed(tmp_path: Path):
    rows = data.Part([*range(4)], [""] * 4, [[7]] * 4, [[8, 9, 10]] * 4)
    sizes = tempnet.TOY
    first, again, other = (
        data.frozen_model("text", seed, tmp_path, rows, sizes) for seed in (0, 0, 1)
    )
    name = "model.embed_tokens.weight"
    weights = [dict(model.named_parameters())[name] for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_each_metric_chooses_its_own_configuration():
    cold, hot = Sampler(FIXED, 0.5), Sampler(FIXED, 1.0)
    rights, nlls = {cold: [16, 0], hot: [4, 4]}, {cold: [3.0, 3.0], hot: [2.0, 1.0]}
    entries = {s: [{"right": rights[s], "nll": nlls[s], "lengths": [1, 1]}] for s in (cold, hot)}
    assert tempnet.best([cold, hot], entries, "pass@1") is cold
    assert tempnet.best([cold, hot], entries, "pass@8") is hot
    assert tempnet.best([cold, hot], entries, "nll") is hot
