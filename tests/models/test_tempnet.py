"""TempNet against its formula and plain autograd; its files."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_xrisk.models import logprobs
from llm_xrisk.models.tempnet import TempNet, TempNetConfig
from llm_xrisk.models.tempnet_loss import tempered_loss
from tests.models.tempnets import RHO, V, batch, close, net_of, plain_temperature
from tests.trainers.build import tiny_model


def test_the_network_is_the_formula():
    net, (logits, _) = net_of(), batch()
    close(net(logits), plain_temperature(net, logits), 1e-12)


def test_a_worked_example():
    """Zero weights in the first layer: hidden units of 1/2, so q = (1, 0) for any logits."""
    net = TempNet(2, hidden_size=2, rho=0.5, tau_min=0.5, tau_max=1.5).eval()
    with torch.no_grad():
        net.project.weight.zero_()
        net.project.bias.zero_()
        net.mix.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
        net.mix.bias.zero_()
    p = math.e / (math.e + 1)
    expected = 0.5 + 1 / (1 + math.exp(-(p - 0.5)))
    for logits in ([3.0, 1.0], [-50.0, -60.0]):
        assert net(torch.tensor(logits)).item() == pytest.approx(expected, rel=1e-6)


def test_it_starts_a_little_above_the_middle_of_its_range():
    tau = TempNet(1000, rho=3.0, tau_min=0.5, tau_max=1.5).eval()(5 * torch.randn(50, 1000))
    assert bool((tau > 1.0).all())
    assert bool((tau < 1.05).all())


@pytest.mark.parametrize(("vocab_size", "millions"), [(32000, 8.26), (151936, 38.96)])
def test_the_number_of_parameters_is_that_of_the_paper(vocab_size, millions):
    with torch.device("meta"):
        net = TempNet(vocab_size)
    count = sum(parameter.numel() for parameter in net.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)


def test_the_level_and_the_scale_of_the_logits_do_not_matter():
    net, (logits, _) = net_of(), batch()
    close(net(logits + 1000), net(logits), 1e-9)
    close(net(7 * logits), net(logits), 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_normalised_in_float32(dtype):
    """Large bfloat16 logits: normalised in bfloat16, x would be off by 1 in 256."""
    net, (logits, _) = net_of().float(), batch(scale=30.0)
    rounded = (logits + 100).to(dtype)
    tau = net(rounded)
    assert tau.dtype == torch.float32
    close(tau.double(), net.double()(rounded.double()), 1e-6)


def test_tokens_that_are_masked_out_and_flat_logits_give_finite_temperatures():
    net = net_of()
    logits = torch.zeros(2, V, dtype=torch.float64)
    logits[0, 3:] = -math.inf
    close(net(logits)[0], net(logits)[1])


def test_tau_sends_no_gradient_into_the_logits():
    net, (logits, _) = net_of(), batch()
    net(logits.requires_grad_()).sum().backward()
    assert logits.grad is None


def test_gradients_of_the_network_are_those_of_autograd_whatever_the_chunks(monkeypatch):
    net, (logits, _) = net_of(), batch()
    weight = torch.randn(3, 5, dtype=torch.float64)
    wanted = torch.autograd.grad((weight * plain_temperature(net, logits)).sum(), net.parameters())
    for numbers in (1, 2 * V, 7 * V, 1 << 24):
        monkeypatch.setattr(logprobs, "_CHUNK_NUMBERS", numbers)
        found = torch.autograd.grad((weight * net(logits)).sum(), net.parameters())
        for one, other in zip(found, wanted, strict=True):
            close(one, other)


def test_shapes_of_one_two_and_three_dimensions_agree():
    net, (logits, targets) = net_of(), batch()
    whole = net(logits)
    close(net(logits[1]), whole[1], 1e-14)
    close(net(logits[1, 2]), whole[1, 2], 1e-14)
    with torch.no_grad():  # few tokens, as in generation, and many
        close(net(logits), whole.detach(), 1e-14)
        close(net(logits[1]), whole[1].detach(), 1e-14)
        close(net(logits[1, 2]), whole[1, 2].detach(), 1e-14)
        close(net(logits.repeat(9, 1, 1)), whole.detach().repeat(9, 1), 1e-14)
    flat = net.loss(logits.flatten(0, 1), targets.flatten())
    close(flat.loss, net.loss(logits, targets).loss, 1e-14)
    assert flat.values.shape == flat.entropy.shape == flat.tau.shape == (15,)


def test_dropout_acts_in_training_alone():
    net, (logits, _) = net_of(hidden_size=64), batch()
    assert torch.equal(net(logits), net(logits))
    net.train()
    assert not torch.equal(net(logits), net(logits))


def test_it_is_saved_beside_a_model_and_read_back(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    net = TempNet(102, rho=2.0, hidden_size=8, tau_min=0.1, tau_max=1.2)
    net.save_pretrained(tmp_path)
    again, reloaded = (
        TempNet.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    )
    assert again.config == net.config
    assert not again.training
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())
    for name, weight in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    ids = torch.tensor([[5, 6, 7]])
    logits = model.eval()(ids).logits
    assert torch.equal(reloaded(ids).logits, logits)
    assert torch.equal(again(logits), net.eval()(logits))
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert {"model.safetensors", "tempnet/model.safetensors", "tempnet_config.json"} <= names
    # vLLM takes every *.safetensors of the folder for the model's own
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]


def test_a_folder_without_a_tempnet_is_refused_by_the_name_of_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tempnet_config\.json"):
        TempNet.from_pretrained(tmp_path)
    net_of().save_pretrained(tmp_path)
    (tmp_path / "tempnet" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tempnet/model\.safetensors"):
        TempNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", [{"vocab_size": 102}, {"text_config": {"vocab_size": 102}}])
def test_a_tempnet_of_another_vocabulary_is_refused(tmp_path, config):
    net_of().save_pretrained(tmp_path)
    assert TempNet.from_pretrained(tmp_path, vocab_size=V).config.vocab_size == V
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"vocabulary of 17, the model has 102"):
        TempNet.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"reads logits \(\.\.\., 17\)"):
        net_of()(torch.zeros(2, 102))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": "l2"}, "input must be 'max_l2', got 'l2'"),
        ({"depth": 3}, "depth"),
        ({"rho": 3.0}, "log V"),
        ({"hidden_size": 9}, r"mix\.bias is \(8,\), not \(9,\)"),
        ({"vocab_size": 18}, r"project\.weight is \(8, 17\), not \(8, 18\)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, change, message):
    net_of().save_pretrained(tmp_path)
    path = tmp_path / "tempnet_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        TempNet.from_pretrained(tmp_path)


def test_a_config_without_its_vocabulary_is_refused(tmp_path):
    (tmp_path / "tempnet_config.json").write_text("{}")
    with pytest.raises(ValueError, match="needs vocab_size"):
        TempNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau_min": 0.0}, "tau_min=0.0"),
        ({"tau_min": 2.0, "tau_max": 1.0}, "tau_max=1.0"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TempNetConfig(V, **{"rho": RHO} | options)


@pytest.mark.parametrize(("value", "cause"), [(math.nan, "the logits"), (math.inf, "infinite")])
def test_nan_logits_are_refused(value, cause):
    net, (logits, targets) = net_of(), batch()
    logits[1, 2, 3] = value
    with pytest.raises(ValueError, match=f"met NaN: {cause}"):
        net(logits)
    with pytest.raises(ValueError, match=f"met NaN: {cause}"):
        net.loss(logits, targets)
    with pytest.raises(ValueError, match="NaN or infinite at a token with a label"):
        tempered_loss(logits, targets, torch.ones(3, 5), rho=RHO)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 50])
def test_a_step_of_generation_predicts_what_forward_does(dtype, rows):
    net = net_of().to(dtype)
    logits = 4 * torch.randn(rows, V)
    logits[0, 3] = -math.inf
    wanted = net(logits).detach()  # with a graph: the modules, one by one
    assert net(logits).requires_grad and not net.predict(logits).requires_grad
    error = {torch.float32: 1e-6, torch.float64: 1e-7, torch.bfloat16: 2e-2}[dtype]
    close(net.predict(logits), wanted, error)
    with torch.no_grad():
        assert torch.equal(net(logits), net.predict(logits))
        assert not torch.equal(net.train()(logits), net.predict(logits))  # dropout


def test_a_step_with_nan_or_infinite_logits_says_so_for_that_row_alone():
    net, logits = net_of().float(), torch.randn(3, V)
    logits[1, 2], logits[2, 2] = math.nan, math.inf
    assert net.predict(logits).isnan().tolist() == [False, True, True]
    with torch.no_grad(), pytest.raises(ValueError, match="TempNet met NaN: the logits"):
        net(logits)


def test_a_step_too_large_to_copy_is_worked_on_in_chunks(monkeypatch):
    net, logits = net_of().float(), torch.randn(40, V)
    wanted = net.predict(logits)
    monkeypatch.setattr("llm_xrisk.models.tempnet._FEW_NUMBERS", 0)
    close(net.predict(logits), wanted, 1e-6)
