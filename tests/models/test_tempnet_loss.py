"""The loss at predicted temperatures against its formula, plain autograd and fixed entropy."""

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llm_xrisk.models import logprobs
from llm_xrisk.models.fixed_entropy import fixed_entropy_temperature
from llm_xrisk.models.tempnet import TempNet
from llm_xrisk.models.tempnet_loss import tempered_loss
from tests.models.tempnets import (
    IGNORED,
    RHO,
    V,
    batch,
    close,
    net_of,
    plain_loss,
    plain_temperature,
)


def test_the_loss_is_the_objective():
    logits, targets = batch()
    tau = 0.5 + torch.rand(3, 5, dtype=torch.float64)
    found = tempered_loss(logits, targets, tau, rho=RHO)
    close(found.loss, plain_loss(logits, targets, tau), 1e-12)
    scaled = logits / tau.unsqueeze(-1)
    kept = targets != IGNORED
    close(found.entropy[kept], torch.distributions.Categorical(logits=scaled).entropy()[kept])
    cross_entropy = torch.nn.functional.cross_entropy(scaled[kept], targets[kept], reduction="none")
    second_form = tau[kept] * (cross_entropy - math.log(V)) + RHO * tau[kept]
    close(found.values[kept], second_form, 1e-12)


def test_the_gradient_in_tau_is_rho_less_the_missing_entropy_and_no_label_enters_it():
    logits, targets = batch()
    tau = (0.5 + torch.rand(3, 5, dtype=torch.float64)).requires_grad_()
    kept = targets != IGNORED
    (found,) = torch.autograd.grad(tempered_loss(logits, targets, tau, rho=RHO).loss, tau)
    (wanted,) = torch.autograd.grad(plain_loss(logits, targets, tau), tau)
    close(found, wanted)
    entropy = torch.distributions.Categorical(logits=logits / tau.detach().unsqueeze(-1)).entropy()
    identity = (RHO - (math.log(V) - entropy)) / kept.sum()
    close(found[kept], identity[kept])
    others = torch.where(kept, (targets + 3) % V, targets)
    (relabelled,) = torch.autograd.grad(tempered_loss(logits, others, tau, rho=RHO).loss, tau)
    assert torch.equal(relabelled, found)


def test_the_gradient_in_the_logits_is_the_softmax_less_the_label():
    logits, targets = batch()
    tau = 0.5 + torch.rand(3, 5, dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    tempered_loss(ours * 1, targets, tau, rho=RHO).loss.backward()
    plain_loss(theirs, targets, tau).backward()
    close(ours.grad, theirs.grad)
    kept = targets != IGNORED
    onehot = torch.nn.functional.one_hot(targets[kept], V)
    shares = (logits / tau.unsqueeze(-1)).softmax(-1)[kept]
    close(ours.grad[kept] * kept.sum(), shares - onehot)


def test_each_token_is_best_at_the_temperature_of_fixed_entropy():
    """Newton on tau alone ends where bisection of the entropy does, and nowhere is it better."""
    logits, targets = batch(scale=2.0)
    targets = targets.clamp(min=0)
    best = fixed_entropy_temperature(logits, math.log(V) - RHO, tau_min=0.01, tau_max=100.0)
    tau = best.clone().requires_grad_()
    (slope,) = torch.autograd.grad(tempered_loss(logits, targets, tau, rho=RHO).values.sum(), tau)
    assert slope.abs().max() < 1e-12
    least = tempered_loss(logits, targets, best, rho=RHO).values
    for factor in (0.5, 0.99, 1.01, 2.0):
        assert bool((tempered_loss(logits, targets, factor * best, rho=RHO).values > least).all())
    # and clipped to a range it is the best of that range
    clipped = fixed_entropy_temperature(logits, math.log(V) - RHO, tau_min=0.9, tau_max=1.1)
    grid = torch.linspace(0.9, 1.1, 2001, dtype=torch.float64)
    values = torch.stack(
        [tempered_loss(logits, targets, t.expand(3, 5), rho=RHO).values for t in grid]
    )
    close(grid[values.argmin(0)], clipped, 1.1e-4)
    assert {0.9, 1.1} <= set(clipped.flatten().tolist())


def test_training_the_network_finds_the_temperature_of_fixed_entropy():
    net = net_of(hidden_size=16, dropout=0.0, tau_min=0.05, tau_max=4.0).train()
    logits, targets = batch(1, 6)
    targets = targets.clamp(min=0)
    best = fixed_entropy_temperature(logits, math.log(V) - RHO, tau_min=0.05, tau_max=4.0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(800):
        optimizer.zero_grad()
        net.loss(logits, targets).loss.backward()
        optimizer.step()
    close(net(logits), best, 0.02)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_network_and_its_loss_together_are_autograd(frozen):
    net, (logits, targets) = net_of(), batch()
    wanted_logits = logits.clone().requires_grad_()
    plain_loss(wanted_logits, targets, plain_temperature(net, wanted_logits)).backward()
    wanted = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    found_logits = logits.clone().requires_grad_(not frozen)
    passed = found_logits * 1
    net.loss(passed, targets).loss.backward()
    for parameter, other in zip(net.parameters(), wanted, strict=True):
        close(parameter.grad, other)
    if frozen:
        assert torch.equal(passed, logits)  # left as they were
    else:
        close(found_logits.grad, wanted_logits.grad)


def test_a_frozen_network_still_trains_the_model():
    net, (logits, targets) = net_of().requires_grad_(False), batch()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    net.loss(ours * 1, targets).loss.backward()
    plain_loss(theirs, targets, plain_temperature(net, theirs)).backward()
    close(ours.grad, theirs.grad)


@pytest.mark.parametrize("garbage", [7.0, math.nan, math.inf])
def test_tokens_without_a_label_contribute_nothing(garbage):
    net, (logits, targets) = net_of(), batch()
    results = []
    for value in (0.0, garbage):
        changed = logits.masked_fill((targets == IGNORED).unsqueeze(-1), value).requires_grad_()
        net.zero_grad()
        found = net.loss(changed * 1, targets)
        found.loss.backward()
        assert not found.values[targets == IGNORED].any()
        assert not changed.grad[targets == IGNORED].any()
        results.append([found.loss, changed.grad, *(p.grad.clone() for p in net.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_batch_without_labels_is_a_zero_with_zero_gradients():
    net, (logits, targets) = net_of(), batch()
    logits.requires_grad_()
    loss = net.loss(logits * 1, torch.full_like(targets, IGNORED)).loss
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()
    assert not any(parameter.grad.any() for parameter in net.parameters())


def test_micro_batches_that_know_the_number_of_tokens_add_up():
    net, (logits, targets) = net_of(), batch()
    whole = net.loss(logits, targets).loss
    count = (targets != IGNORED).sum()
    parts = [net.loss(logits[r], targets[r], num_tokens=count).loss for r in range(3)]
    close(sum(parts), whole, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_low_precision_logits_keep_the_gradients_of_float64(dtype, scale):
    logits, targets = batch(scale=scale / 3)
    logits = logits.clamp(-100, 100).to(dtype)
    for tau in (0.01, 1.0):
        grads = []
        for precise in (False, True):
            s = (logits.double() if precise else logits.clone()).requires_grad_()
            t = torch.full(
                (3, 5), tau, dtype=s.dtype if precise else torch.float32
            ).requires_grad_()
            found = tempered_loss(s * 1, targets, t, rho=RHO)
            found.loss.backward()
            grads.append((t.grad.double(), s.grad.double()))
        assert (grads[0][0] - grads[1][0]).abs().max() < 1e-3
        eps = torch.finfo(dtype).eps
        assert (grads[0][1] - grads[1][1]).abs().max() < max(1e-5, eps)


def test_chunks_change_nothing(monkeypatch):
    net, (logits, targets) = net_of(), batch()
    results = []
    for numbers in (1 << 24, 1, 3 * V, 7 * V):
        monkeypatch.setattr(logprobs, "_CHUNK_NUMBERS", numbers)
        s = logits.clone().requires_grad_()
        loss = net.loss(s * 1, targets).loss
        loss.backward()
        results.append((loss.detach(), s.grad))
    for loss, grad in results[1:]:
        close(loss, results[0][0], 1e-14)
        close(grad, results[0][1], 1e-14)


def test_the_gradient_lives_in_the_memory_of_the_logits():
    net, (logits, targets) = net_of(), batch()
    passed = logits.requires_grad_() * 1
    seen: list[int] = []
    passed.register_hook(lambda grad: seen.append(grad.data_ptr()))
    net.loss(passed, targets).loss.backward()
    assert seen == [passed.data_ptr()]


def second_pass(net: TempNet, logits: Tensor, targets: Tensor) -> None:
    loss = net.loss(logits, targets).loss
    loss.backward(retain_graph=True)
    loss.backward()


def overwritten_input(net: TempNet, logits: Tensor, targets: Tensor) -> None:
    tempered_loss(logits, targets, net(logits), rho=RHO).loss.backward()


@pytest.mark.parametrize("misuse", [second_pass, overwritten_input])
def test_logits_that_were_overwritten_are_never_read(misuse: Callable[..., None]):
    """Two graphs over the same memory: an error, not a wrong gradient."""
    net, (logits, targets) = net_of(), batch()
    with pytest.raises(RuntimeError, match=r"inplace operation|differentiated twice"):
        misuse(net, logits.requires_grad_() * 1, targets)


def test_a_second_pass_without_a_network_is_refused():
    logits, targets = batch()
    tau = torch.ones(3, 5, dtype=torch.float64)
    loss = tempered_loss(logits.requires_grad_() * 1, targets, tau, rho=RHO).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        loss.backward()


MEMORY = """
import resource, sys, torch
from llm_xrisk.models import logprobs
from llm_xrisk.models.tempnet import TempNet
torch.set_num_threads(1)
logprobs._CHUNK_NUMBERS = 1 << 21  # 8 MB
kind, tokens, vocab = sys.argv[1], 2048, 32000
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
net = TempNet(vocab, hidden_size=16)
def run(tokens):
    hidden = torch.randn(tokens, 32)
    head = torch.nn.Linear(32, vocab, bias=False).requires_grad_(kind == "joint")
    logits = head(hidden)
    before = peak()
    found = net.loss(logits, torch.randint(vocab, (tokens,)))
    found.loss.backward()
    return peak() - before, logits.nbytes
run(64)  # buffers of the libraries, gradients
print(*run(tokens))
"""


@pytest.mark.parametrize("kind", ["frozen", "joint"])
def test_peak_memory_at_a_large_vocabulary_is_a_few_chunks(kind: str):
    """262 MB of logits; a copy of them, or of their softmax, would be 262 more."""
    command = [sys.executable, "-c", MEMORY, kind]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    extra, logits = map(int, output.split())
    assert logits == 2048 * 32000 * 4
    assert extra < 0.3 * logits


def test_from_rho_equal_to_log_v_on_temperatures_would_collapse_and_that_is_refused():
    vocab_size, height = 32000, math.log(32000)
    logits = torch.randn(8, 32) @ torch.randn(32, vocab_size)
    targets = torch.randint(vocab_size, (8,))
    for rho in (height, height + 1, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"log V = 10\.373"):
            TempNet(vocab_size, rho=rho)
        with pytest.raises(ValueError, match=r"log V = 10\.373"):
            tempered_loss(logits, targets, torch.ones(8), rho=rho)
    best = fixed_entropy_temperature(logits, height - 8.5, tau_max=100.0)
    slopes = []
    for rho in (height - 1e-6, 8.5):
        taus = [0.05 * best, 0.5 * best, 2 * best, 20 * best]
        taus = [t.clone().requires_grad_() for t in taus]
        losses = [tempered_loss(logits, targets, t, rho=rho).values.sum() for t in taus]
        slopes.append([torch.autograd.grad(x, t)[0] for x, t in zip(losses, taus, strict=True)])
    # nothing but the lower bound stops the fall; below log V the slope turns at the best tau
    assert all(bool((slope > -1e-5).all()) for slope in slopes[0])
    assert all(bool((slope > 0.01).all()) for slope in slopes[0][1:])
    assert all(bool((slope < 0).all()) for slope in slopes[1][:2])
    assert all(bool((slope > 0).all()) for slope in slopes[1][2:])


@pytest.mark.parametrize("target", [V, -1])
def test_a_target_outside_the_vocabulary_is_refused(target):
    logits, targets = batch()
    targets[1, 1] = target
    with pytest.raises(ValueError, match=f"target {target} is outside the vocabulary of 17"):
        tempered_loss(logits, targets, torch.ones(3, 5), rho=RHO)


def test_temperatures_that_are_none_and_shapes_that_do_not_fit_are_refused():
    logits, targets = batch()
    with pytest.raises(ValueError, match=r"tau must be positive, got 0\.0"):
        tempered_loss(logits, targets, torch.zeros(3, 5), rho=RHO)
    with pytest.raises(ValueError, match=r"\(3, 5, 17\), \(3, 4\)"):
        tempered_loss(logits, targets[:, 1:], torch.ones(3, 4), rho=RHO)
