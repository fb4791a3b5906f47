"""Temperatures of their own for every token, in the generation of transformers."""

import math
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
)

from llm_xrisk.models.tempnet import TempNet
from llm_xrisk.serving import (
    FixedEntropyLogitsProcessor,
    TemperatureLogitsProcessor,
    TempNetLogitsProcessor,
)
from tests.trainers.build import tiny_model

V = 12
PROMPTS = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 2, 3], [4, 4, 4]])


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(vocab_size=V).eval()


def tempnet(**options: Any) -> TempNet:
    settings = {"rho": 0.5, "hidden_size": 8, "tau_min": 0.2, "tau_max": 3.0} | options
    net = TempNet(V, **settings)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
    return net.eval()


def generate(
    model: PreTrainedModel, *processors: Any, ids: Tensor = PROMPTS, **options: Any
) -> Any:
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 1, "pad_token_id": 0}
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        logits_processor=LogitsProcessorList(processors),
        return_dict_in_generate=True,
        output_scores=True,
        **settings | options,
    )


def next_logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(PROMPTS).logits[:, -1]


def fixed_entropy() -> FixedEntropyLogitsProcessor:
    return FixedEntropyLogitsProcessor(1.2, tau_min=0.05, tau_max=20.0)


@pytest.mark.parametrize("kind", ["tempnet", "fixed entropy"])
def test_samples_follow_the_softmax_at_the_temperature_of_each_row(model, kind):
    net = tempnet()
    processor = TempNetLogitsProcessor(net) if kind == "tempnet" else fixed_entropy()
    logits = next_logits(model)
    tau = processor.temperature(logits).detach()
    assert tau.max() > 1.05 * tau.min()  # the rows differ, and from 1
    assert bool(((tau - 1).abs() > 0.05).any())
    drawn = generate(model, processor, ids=PROMPTS.repeat_interleave(3000, 0)).sequences[:, -1]
    shares = (logits.double() / tau.double().unsqueeze(-1)).softmax(-1)
    plain = logits.double().softmax(-1)
    rejected = 0
    for row, tokens in enumerate(drawn.view(4, 3000)):
        counts = torch.bincount(tokens, minlength=V).numpy()
        common = (shares[row] * 3000 >= 5).numpy()

        def level(p: Tensor, counts: Any = counts, common: Any = common) -> float:
            expected = p.numpy() * 3000
            cells = [[*x[common], x[~common].sum()] for x in (counts, expected)]
            kept = [(a, b) for a, b in zip(*cells, strict=True) if b > 0]
            return chisquare(*zip(*kept, strict=True), sum_check=False).pvalue

        assert level(shares[row]) > 1e-3
        rejected += level(plain[row]) < 1e-6
    assert rejected >= 2  # the test tells the two apart


def test_generation_sees_the_logits_over_tau(model):
    net = tempnet()
    (scores,) = generate(model, TempNetLogitsProcessor(net)).scores
    logits = next_logits(model)
    wanted = (logits.double() / net(logits).double().unsqueeze(-1)).log_softmax(-1)
    assert (scores.double().log_softmax(-1) - wanted).abs().max() < 1e-6


def test_top_p_acts_on_the_divided_logits(model):
    net, logits = tempnet(tau_min=1.5, tau_max=3.0), next_logits(model)
    shares = (logits / net(logits).unsqueeze(-1)).softmax(-1).sort(-1, descending=True)
    before = shares.values.cumsum(-1) - shares.values
    kept = torch.zeros(4, V, dtype=torch.bool).scatter(1, shares.indices, before < 0.7)
    (scores,) = generate(model, TempNetLogitsProcessor(net), top_p=0.7).scores
    (plain,) = generate(model, top_p=0.7).scores
    assert torch.equal(scores.isfinite(), kept)
    assert not torch.equal(plain.isfinite(), kept)


@pytest.mark.parametrize("processor", [TempNetLogitsProcessor(tempnet()), fixed_entropy()])
def test_greedy_decoding_is_unchanged(model, processor):
    options = {"do_sample": False, "max_new_tokens": 20}
    plain, ours = generate(model, **options), generate(model, processor, **options)
    assert torch.equal(plain.sequences, ours.sequences)
    assert not torch.equal(plain.scores[0], ours.scores[0])


def test_the_largest_logit_stays_the_largest_where_division_rounds():
    class Thirds(TemperatureLogitsProcessor):
        def temperature(self, scores: Tensor) -> Tensor:
            return torch.full((len(scores),), 3.0)

    base = 1 + torch.rand(500)
    scores = torch.stack([base, torch.nextafter(base, torch.full_like(base, 9.0))], -1)
    scores = torch.cat([scores, -scores.flip(-1)])  # above 0 and below, the largest one last
    scores[500:] = scores[500:].sort(-1).values
    assert bool((scores.argmax(-1) == 1).all())
    assert bool(((scores / 3).argmax(-1) == 0).any())  # what plain division does
    divided = Thirds()(torch.zeros(1000, 1), scores)
    assert bool((divided.argmax(-1) == 1).all())
    torch.testing.assert_close(divided, scores / 3, rtol=3e-7, atol=0)


def test_bfloat16_logits_are_divided_in_float32():
    net = tempnet()
    scores = (8 * torch.randn(50, V)).bfloat16()
    divided = TempNetLogitsProcessor(net)(torch.zeros(50, 1), scores)
    assert divided.dtype == torch.float32
    assert torch.equal(divided.argmax(-1), scores.argmax(-1))


def test_a_network_in_training_mode_samples_without_dropout_and_stays_so():
    net = tempnet()
    scores = torch.randn(5, V)
    wanted = TempNetLogitsProcessor(net)(torch.zeros(5, 1), scores)
    net.train()
    found = TempNetLogitsProcessor(net)(torch.zeros(5, 1), scores)
    assert torch.equal(found, wanted)
    assert not found.requires_grad
    assert all(module.training for module in net.modules())


def test_tokens_that_are_ruled_out_before_stay_so():
    scores = torch.randn(3, V)
    scores[:, 1] = -math.inf
    for processor in (TempNetLogitsProcessor(tempnet()), fixed_entropy()):
        divided = processor(torch.zeros(3, 1), scores)
        assert bool((divided[:, 1] == -math.inf).all())
        assert bool(divided[:, 2:].isfinite().all())


def test_it_is_read_from_the_folder_of_a_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    net = tempnet()
    net.save_pretrained(tmp_path)
    scores = torch.randn(5, V)
    wanted = TempNetLogitsProcessor(net)(torch.zeros(5, 1), scores)
    found = TempNetLogitsProcessor.from_pretrained(tmp_path)(torch.zeros(5, 1), scores)
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="vocabulary of 12, the model has 13"):
        TempNetLogitsProcessor.from_pretrained(tmp_path, vocab_size=13)


@pytest.mark.parametrize(
    "setting",
    [{"temperature": 0.7}, {"repetition_penalty": 1.2}, {"sequence_bias": [[[3], 1.0]]}],
)
def test_settings_that_would_act_first_or_twice_are_refused(setting):
    processor = TempNetLogitsProcessor(tempnet())
    processor.check(GenerationConfig())
    processor.check(GenerationConfig(do_sample=True, temperature=1.0, top_p=0.9, top_k=5))
    with pytest.raises(ValueError, match=f"{next(iter(setting))}=.* of the generation config"):
        processor.check(GenerationConfig(do_sample=True, **setting))


def test_a_penalty_behind_it_sees_the_divided_logits(model):
    """What the refusal of a repetition penalty in the config tells one to do."""
    net = tempnet()
    (scores,) = generate(
        model, TempNetLogitsProcessor(net), RepetitionPenaltyLogitsProcessor(1.3)
    ).scores
    logits = next_logits(model)
    divided = logits / net(logits).unsqueeze(-1)
    torch.testing.assert_close(scores, RepetitionPenaltyLogitsProcessor(1.3)(PROMPTS, divided))


def test_nan_logits_are_refused_before_a_token_is_drawn():
    scores = torch.randn(2, V)
    scores[1, 3] = math.nan
    with pytest.raises(ValueError, match="met NaN: the logits"):
        TempNetLogitsProcessor(tempnet())(torch.zeros(2, 1), scores)


@pytest.mark.parametrize("options", [{"entropy": 0.0}, {"entropy": 1.0, "tau_min": 3.0}])
def test_a_fixed_entropy_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match="need entropy > 0"):
        FixedEntropyLogitsProcessor(**options)
