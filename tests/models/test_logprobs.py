"""Log-probabilities of completion tokens against a plain log_softmax."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_xrisk.data.collators import pad_rows
from llm_xrisk.models import logprobs
from llm_xrisk.models.logprobs import selective_log_softmax, token_log_probs
from tests.trainers.build import tiny_model

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
COMPLETIONS = [[12, 13], [14, 15, 16, 1], [17]]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def plain(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return wide.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def random_logits(dtype: torch.dtype, rows: int = 3, positions: int = 5) -> tuple[Tensor, Tensor]:
    logits = (3 * torch.randn(rows, positions, 11, dtype=torch.float64)).to(dtype)
    return logits, torch.randint(11, (rows, positions))


def row_by_row(model: PreTrainedModel, temperature: float = 1.0) -> list[Tensor]:
    """What a loop over unpadded rows gives."""
    found: list[Tensor] = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        logits = model(input_ids=ids).logits[:, len(prompt) - 1 : -1]
        found.append(plain(logits, ids[:, len(prompt) :], temperature)[0])
    return found


def batched(model: PreTrainedModel, side: str, **options: object) -> logprobs.TokenLogProbs:
    batch = pad_rows(PROMPTS, COMPLETIONS, pad_token_id=0, side=side)
    return token_log_probs(model, **{"keep": None} | batch | options)  # pyright: ignore


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model().eval()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_values_and_gradients_are_those_of_log_softmax(dtype, temperature):
    logits, targets = random_logits(dtype)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weight = torch.randn(targets.shape, dtype=torch.float64)
    values, entropy = selective_log_softmax(ours * 1, targets, temperature=temperature)
    expected = plain(theirs, targets, temperature)
    (values * weight).sum().backward()
    (expected * weight).sum().backward()
    assert entropy is None
    assert values.dtype == torch.promote_types(dtype, torch.float32)
    exact = {"rtol": 0, "atol": 1e-10 if dtype == torch.float64 else 1e-5}
    torch.testing.assert_close(values, expected, **exact)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_finite_differences_agree_in_float64():
    logits, targets = random_logits(torch.float64, rows=2, positions=2)

    def scores(z: Tensor) -> Tensor:
        return selective_log_softmax(z * 1, targets, temperature=0.7)[0]

    # gradcheck evaluates the backward pass several times per graph, which this function refuses
    for k in range(targets.numel()):
        z = logits.clone().requires_grad_()
        scores(z).flatten()[k].backward()
        step = torch.zeros_like(logits)
        step.view(-1)[13] = 1e-6
        slope = (scores(logits + step) - scores(logits - step)).flatten()[k] / 2e-6
        assert z.grad is not None
        assert z.grad.view(-1)[13].item() == pytest.approx(slope.item(), abs=1e-8)


def test_entropy_is_that_of_the_scaled_policy():
    logits, targets = random_logits(torch.float64)
    _, entropy = selective_log_softmax(logits, targets, temperature=0.5, with_entropy=True)
    expected = torch.distributions.Categorical(logits=logits / 0.5).entropy()
    torch.testing.assert_close(entropy, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("numbers", [1, 11, 30, 55, 70])
def test_chunks_change_nothing(monkeypatch, numbers):
    logits, targets = random_logits(torch.float64)
    whole, chunked = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    one, _ = selective_log_softmax(whole * 1, targets, with_entropy=True)
    one.sum().backward()
    monkeypatch.setattr(logprobs, "_CHUNK_NUMBERS", numbers)
    assert len(list(logprobs._chunks(*logits.shape))) > 1
    many, _ = selective_log_softmax(chunked * 1, targets, with_entropy=True)
    many.sum().backward()
    torch.testing.assert_close(many, one, rtol=0, atol=0)
    torch.testing.assert_close(chunked.grad, whole.grad, rtol=0, atol=0)


def test_chunks_cover_every_position_once(monkeypatch):
    for numbers in (1, 5, 12, 100):
        monkeypatch.setattr(logprobs, "_CHUNK_NUMBERS", numbers)
        seen = torch.zeros(4, 3)
        for part in logprobs._chunks(4, 3, 5):
            seen[part] += 1
        assert bool((seen == 1).all())


def test_a_second_backward_pass_is_refused():
    logits, targets = random_logits(torch.float32)
    values, _ = selective_log_softmax(logits.requires_grad_() * 1, targets)
    values.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        values.sum().backward()


def test_a_second_derivative_is_refused():
    logits, targets = random_logits(torch.float32)
    logits.requires_grad_()
    values, _ = selective_log_softmax(logits * 1, targets)
    (first,) = torch.autograd.grad((values**2).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_the_gradient_lives_in_the_memory_of_the_logits(model):
    """The whole way back to the model's head, where a slice would make a second copy."""
    kept: dict[str, int] = {}

    def watch(module: torch.nn.Module, inputs: object, output: Tensor) -> None:
        kept["logits"] = output.data_ptr()
        output.register_hook(lambda grad: kept.update(gradient=grad.data_ptr()))

    handle = model.lm_head.register_forward_hook(watch)
    try:
        batched(model, "left").log_probs.sum().backward()
    finally:
        handle.remove()
        model.zero_grad()
    assert kept["gradient"] == kept["logits"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_padded_rows_score_as_single_rows(model, side, temperature):
    found = batched(model, side, temperature=temperature, with_entropy=True)
    for row, expected in enumerate(row_by_row(model, temperature)):
        torch.testing.assert_close(found.log_probs[row][found.mask[row]], expected)
    assert found.entropy is not None
    assert found.log_probs.shape == found.mask.shape == found.entropy.shape
    assert not found.log_probs[~found.mask].any()
    assert not found.entropy[~found.mask].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_touch_the_gradient(model, side):
    wanted = torch.autograd.grad(torch.cat(row_by_row(model)).sum(), list(model.parameters()))
    found = torch.autograd.grad(batched(model, side).log_probs.sum(), list(model.parameters()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_keep_limits_the_logits_to_the_completions(model):
    seen: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda m, i, output: seen.append(output.shape[1]))
    try:
        batch = pad_rows(PROMPTS, COMPLETIONS, pad_token_id=0)
        found = token_log_probs(model, **batch)
        batched(model, "left", keep=None)
    finally:
        handle.remove()
    assert found.log_probs.shape == (3, 4)  # the longest completion
    assert seen == [5, 8]  # one more to predict its first token; all positions without keep


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_without_a_policy_is_refused(model, temperature):
    with pytest.raises(ValueError, match=f"got {temperature}"):
        batched(model, "left", temperature=temperature)


def test_bfloat16_models_are_scored_in_float32():
    model = tiny_model().to(torch.bfloat16).eval()
    found = batched(model, "left")
    assert found.log_probs.dtype == torch.float32
    for row, expected in enumerate(row_by_row(model)):
        # padding changes the order of bfloat16 sums inside the model, not the reduction here
        torch.testing.assert_close(
            found.log_probs[row][found.mask[row]], expected, rtol=0, atol=0.1
        )
    found.log_probs.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_gradient_checkpointing_changes_nothing():
    gradients: list[list[Tensor]] = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        batched(model, "left").log_probs.sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
