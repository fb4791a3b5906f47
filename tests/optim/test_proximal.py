"""ProximalPull (PESG's proximal term)."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_xrisk.objectives.auc_margin import AUCMargin
from llm_xrisk.optim import ProximalPull

F64 = torch.float64


def parameter(*values: float, dtype: torch.dtype = F64) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def step(optimizer: torch.optim.Optimizer, *gradients: tuple[Tensor, float]) -> None:
    for w, gradient in gradients:
        w.grad = torch.full_like(w, gradient)
    optimizer.step()


def test_the_pull_is_towards_the_start_and_then_towards_the_mean_of_the_last_epoch() -> None:
    w = parameter(1.0)
    optimizer = torch.optim.SGD([w], lr=0.5)
    pull = ProximalPull(optimizer, lam0=0.2)
    generator = torch.Generator().manual_seed(0)
    value, reference = 1.0, 1.0
    for _ in range(3):
        seen = []
        for _ in range(4):
            gradient = float(torch.randn((), generator=generator))
            step(optimizer, (w, gradient))
            value -= 0.5 * (gradient + 0.2 * (value - reference))
            seen.append(value)
            assert w.item() == pytest.approx(value, rel=1e-12)
        pull.new_epoch()
        reference = sum(seen) / len(seen)


def test_epochs_begin_by_themselves_after_their_steps() -> None:
    w, v = parameter(1.0), parameter(1.0)
    by_itself, by_hand = (torch.optim.SGD([p], lr=0.5) for p in (w, v))
    ProximalPull(by_itself, 0.2, steps_per_epoch=3)
    pull = ProximalPull(by_hand, 0.2)
    for number in range(10):
        step(by_itself, (w, number))
        step(by_hand, (v, number))
        if number % 3 == 2:
            pull.new_epoch()
    assert torch.equal(w, v)


def test_an_epoch_without_a_step_keeps_the_reference() -> None:
    w = parameter(1.0)
    optimizer = torch.optim.SGD([w], lr=1.0)
    pull = ProximalPull(optimizer, lam0=0.5)
    pull.new_epoch()
    step(optimizer, (w, 4.0))
    pull.new_epoch()
    pull.new_epoch()
    step(optimizer, (w, 0.0))
    assert w.item() == -3.0  # it is its own reference


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.Adagrad, {}),
        (torch.optim.RMSprop, {}),
        (torch.optim.NAdam, {}),
        (torch.optim.Rprop, {}),
    ],
)
def test_any_optimizer_takes_the_step_it_takes_on_the_penalised_loss(
    kind: Any, options: dict[str, Any]
) -> None:
    w, v = parameter(1.0, -2.0), parameter(1.0, -2.0)
    pulled, plain = kind([w], lr=0.05, **options), kind([v], lr=0.05, **options)
    ProximalPull(pulled, lam0=0.3)
    for _ in range(5):
        pulled.zero_grad(), plain.zero_grad()
        (w**4).sum().backward()
        ((v**4).sum() + 0.15 * ((v - torch.tensor([1.0, -2.0])) ** 2).sum()).backward()
        pulled.step(), plain.step()
    torch.testing.assert_close(w, v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("kind", ["SGD", "LBFGS"])
def test_a_closure_computes_gradient_and_loss_of_the_penalised_loss(
    kind: str, by_name: bool
) -> None:
    w, v = parameter(1.5, -2.0), parameter(1.5, -2.0)
    options = {"line_search_fn": "strong_wolfe", "max_iter": 5} if kind == "LBFGS" else {}
    pulled, plain = (getattr(torch.optim, kind)([p], lr=0.1, **options) for p in (w, v))
    ProximalPull(pulled, lam0=0.3)
    start = v.detach().clone()

    def loss_of_w() -> Tensor:
        pulled.zero_grad()
        loss = (w**4).sum()
        loss.backward()
        return loss

    def penalised_loss_of_v() -> Tensor:
        plain.zero_grad()
        loss = (v**4).sum() + 0.15 * ((v - start) ** 2).sum()
        loss.backward()
        return loss

    for _ in range(3):
        got = pulled.step(closure=loss_of_w) if by_name else pulled.step(loss_of_w)
        want = plain.step(penalised_loss_of_v)
        assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-10)
    torch.testing.assert_close(w, v, rtol=1e-8, atol=1e-8)


def test_a_group_has_its_own_strength_and_zero_leaves_it_alone() -> None:
    model, objective = nn.Linear(3, 1).to(F64), AUCMargin(initial=(0.0, 0.0, 0.0))
    groups: list[dict[str, Any]] = [
        {"params": [model.weight]},
        {"params": [model.bias], "lam0": 0.5},
        {"params": objective.parameters(), "lam0": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    pull = ProximalPull(optimizer, lam0=0.1)
    weight, bias = model.weight.detach().clone(), model.bias.item()
    every = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(2):
        step(optimizer, *((p, 1.0) for p in every))
    torch.testing.assert_close(model.weight.detach(), weight - 2 + 0.1)
    assert model.bias.item() == pytest.approx(bias - 2 + 0.5)
    assert objective.a.item() == -2
    assert pull.state_dict()["reference"][2:] == [None, None]


def test_frozen_weights_cost_nothing_and_those_without_a_gradient_are_not_pulled() -> None:
    base, adapter, idle = parameter(5.0), parameter(0.0), parameter(3.0)
    base.requires_grad_(False)
    optimizer = torch.optim.SGD([base, adapter, idle], lr=1.0)
    pull = ProximalPull(optimizer, lam0=0.5)
    for _ in range(2):
        step(optimizer, (adapter, 1.0))
    assert (base.item(), adapter.item(), idle.item()) == (5.0, -1.5, 3.0)
    assert idle.grad is None
    assert pull.state_dict()["reference"][0] is None


def test_a_group_added_later_starts_at_its_own_weights() -> None:
    w, late = parameter(0.0), parameter(10.0)
    optimizer = torch.optim.SGD([w], lr=1.0)
    ProximalPull(optimizer, lam0=0.5)
    step(optimizer, (w, 1.0))
    optimizer.add_param_group({"params": [late]})
    for _ in range(2):
        step(optimizer, (w, 0.0), (late, 1.0))
    assert late.item() == 10 - 1 - 0.5


def test_weights_of_bfloat16_are_averaged_in_float32() -> None:
    w = parameter(1.0, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD([w], lr=2**-7)
    pull = ProximalPull(optimizer, lam0=1e-6)
    for _ in range(64):
        step(optimizer, (w, -1.0))
    (mean,) = pull.state_dict()["mean"]
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(1 + 2**-7 * 65 / 2, abs=1e-4)
    assert w.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_scaler_does_not_change_the_pull(fused: bool) -> None:
    w, v = parameter(1.0, dtype=torch.float32), parameter(1.0, dtype=torch.float32)
    scaled, plain = (torch.optim.SGD([p], lr=0.1, fused=fused) for p in (w, v))
    for optimizer in (scaled, plain):
        ProximalPull(optimizer, lam0=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        scaled.zero_grad(), plain.zero_grad()
        scaler.scale((w**2).sum()).backward()
        (v**2).sum().backward()
        scaler.step(scaled), plain.step()
        scaler.update()
    torch.testing.assert_close(w, v)


def run(kind: Any, steps: range, saved: bytes | None) -> tuple[bytes, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    objective = AUCMargin()
    own = {"params": objective.parameters(), "weight_decay": 0.0}
    optimizer = kind([{"params": model.parameters()}, own], lr=0.05)
    pull = ProximalPull(optimizer, lam0=0.1, steps_per_epoch=3)
    parts = {"model": model, "objective": objective, "optimizer": optimizer, "pull": pull}
    if saved is not None:
        loaded = torch.load(io.BytesIO(saved), weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(loaded[name])
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(16, 4, generator=generator)
        y = (x[:, 0] > torch.randn(16, generator=generator)).long()
        optimizer.zero_grad()
        objective(model(x).squeeze(-1), y).loss.backward()
        optimizer.step()
    buffer = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in parts.items()}, buffer)
    kept = pull.state_dict()
    return buffer.getvalue(), [*model.state_dict().values(), *kept["reference"], *kept["mean"]]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_resumed_run_is_the_run_bit_for_bit(kind: Any, cut: int) -> None:
    _, whole = run(kind, range(10), None)
    saved, _ = run(kind, range(cut), None)
    _, resumed = run(kind, range(cut, 10), saved)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_a_checkpoint_is_neither_changed_nor_shared_and_honours_new_arguments() -> None:
    w = parameter(1.0)
    optimizer = torch.optim.SGD([w], lr=1.0)
    pull = ProximalPull(optimizer, lam0=0.25)
    saved = {"steps": 1, "reference": [torch.tensor([3.0])], "mean": [torch.tensor([5.0])]}
    pull.load_state_dict(saved)
    step(optimizer, (w, 0.0))
    assert w.item() == 1 - 0.25 * (1 - 3)
    assert (saved["reference"][0].item(), saved["mean"][0].item()) == (3.0, 5.0)
    assert pull.state_dict()["mean"][0].item() == (5 + 1.5) / 2
    with pytest.raises(ValueError, match=r"reference weights of 0 parameters.* has 1"):
        pull.load_state_dict({"steps": 1, "reference": [], "mean": []})


def test_removed_it_pulls_no_more() -> None:
    w = parameter(1.0)
    optimizer = torch.optim.SGD([w], lr=1.0)
    pull = ProximalPull(optimizer, lam0=0.5)
    step(optimizer, (w, 1.0))
    pull.remove()
    step(optimizer, (w, 0.0))
    assert w.item() == 0.0


def test_a_schedule_of_the_learning_rate_sees_the_optimizer_itself() -> None:
    w = parameter(1.0)
    optimizer = torch.optim.SGD([w], lr=1.0)
    ProximalPull(optimizer, lam0=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    step(optimizer, (w, 1.0))
    schedule.step()
    step(optimizer, (w, 0.0))
    assert w.item() == 0 - 0.5 * 0.5 * (0 - 1)


def test_what_makes_no_sense_is_refused() -> None:
    optimizer = torch.optim.SGD([parameter(1.0)], lr=1.0)
    with pytest.raises(ValueError, match="lam0 must not be negative, got -1"):
        ProximalPull(optimizer, -1)
    with pytest.raises(ValueError, match="steps_per_epoch must be at least 1, got 0"):
        ProximalPull(optimizer, steps_per_epoch=0)


def test_a_wrapper_in_place_of_the_optimizer_is_refused() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    inside = torch.optim.SGD([parameter(1.0)], lr=1.0)
    with pytest.raises(TypeError, match=r"Wrapper takes no hooks; .* its .optimizer"):
        ProximalPull(Wrapper(inside))


@pytest.mark.parametrize("wrong", [None, "sgd", torch.optim.SGD, nn.Linear(1, 1)])
def test_what_is_no_optimizer_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="optimizer of ProximalPull must be a Optimizer, got "):
        ProximalPull(wrong)


def test_a_second_pull_on_one_optimizer_is_refused() -> None:
    optimizer = torch.optim.SGD([parameter(1.0)], lr=1.0)
    first = ProximalPull(optimizer)
    with pytest.raises(ValueError, match=r"has a ProximalPull already, .* call remove\(\)"):
        ProximalPull(optimizer)
    first.remove()
    ProximalPull(optimizer)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "got None; a checkpoint of ProximalPull has"),
        ({"steps": 1}, r"got a state with \['steps'\]; a checkpoint of ProximalPull has"),
        ({"steps": 1, "reference": "x", "mean": []}, "holds no tensors as reference weights"),
    ],
)
def test_what_is_no_checkpoint_is_refused(state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProximalPull(torch.optim.SGD([parameter(1.0)], lr=1.0)).load_state_dict(state)
