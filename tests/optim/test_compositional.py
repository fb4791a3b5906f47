"""CompositionalTraining (section 6.4.1, PDSCA)."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from llm_xrisk.objectives import AveragePrecision, ObjectiveOutput
from llm_xrisk.objectives.auc_margin import AUCMargin
from llm_xrisk.optim import CompositionalTraining
from llm_xrisk.optim.compositional import weights_at
from tests.gloo import GlooPool

F64 = torch.float64


def network(dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)


def data(rows: int = 24, seed: int = 0, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=generator, dtype=dtype)
    noise = torch.randn(rows, generator=generator, dtype=dtype)
    return x, (x[:, 0] * x[:, 1] + 0.3 * noise > 0.4).long()


def cross_entropy(h: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(h.squeeze(-1), y.to(h.dtype))


def losses(
    model: nn.Module, objective: Any, x: Tensor, y: Tensor
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    return (
        lambda: cross_entropy(model(x), y),
        lambda: objective(model(x).squeeze(-1), y, index=torch.arange(len(y))).loss,
    )


def through_the_step(
    model: nn.Module, objective: Any, x: Tensor, y: Tensor, tau: float, *, create_graph: bool
) -> list[Tensor]:
    """Gradient of L_AUC(w - tau grad L_CE(w)) by autograd, or of L_AUC at that point."""
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    inner = cross_entropy(functional_call(model, w, (x,)), y)
    slopes = torch.autograd.grad(inner, list(w.values()), create_graph=create_graph)
    u = {name: w[name] - tau * slope for name, slope in zip(w, slopes, strict=True)}
    h = functional_call(model, u, (x,)).squeeze(-1)
    outer = objective(h, y, index=torch.arange(len(y))).loss
    return list(torch.autograd.grad(outer, list(w.values())))


@pytest.mark.parametrize("name", ["AUCMargin", "AveragePrecision"])
@pytest.mark.parametrize("second_order", [True, False])
def test_the_gradient_is_that_of_autograd_through_the_inner_step(
    name: str, second_order: bool
) -> None:
    def build() -> Any:
        return (
            AUCMargin(initial=(0.5, -0.5, 1.0), state_dtype=F64)
            if name == "AUCMargin"
            else AveragePrecision(24, state_dtype=F64)
        )

    model, (x, y), objective = network(), data(), build()
    optimizer = torch.optim.SGD([*model.parameters(), *objective.parameters()], lr=0.1)
    training = CompositionalTraining(optimizer, tau=0.7, beta=1.0, second_order=second_order)
    training.backward(*losses(model, objective, x, y))
    got = [p.grad for p in model.parameters()]
    exact = through_the_step(model, build(), x, y, 0.7, create_graph=True)
    first = through_the_step(model, build(), x, y, 0.7, create_graph=False)
    want, other = (exact, first) if second_order else (first, exact)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    # the two forms are different gradients
    gap = sum((mine - theirs).norm() for mine, theirs in zip(got, other, strict=True))
    assert gap > 0.01 * sum(theirs.norm() for theirs in want)


def test_worked_example() -> None:
    w = nn.Parameter(torch.tensor([2.0, -1.0], dtype=F64))
    curvature, target = torch.tensor([1.0, 3.0], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    tau, beta, u = 0.1, 0.25, None
    optimizer = torch.optim.SGD([w], lr=0.3)
    training = CompositionalTraining(optimizer, tau, beta, second_order=True)

    def inner() -> Tensor:
        return (curvature * w * w).sum() / 2

    def outer() -> Tensor:
        return ((w - target) ** 2).sum()

    for _ in range(3):
        here = w.detach().clone()
        new = here - tau * curvature * here
        u = new if u is None else (1 - beta) * u + beta * new
        optimizer.zero_grad()
        values = training.backward(inner, outer)
        want = [(curvature * here * here).sum() / 2, ((u - target) ** 2).sum()]
        assert torch.stack(values).tolist() == pytest.approx(torch.stack(want).tolist())
        gradient = (1 - tau * curvature) * 2 * (u - target)
        torch.testing.assert_close(w.grad, gradient, rtol=1e-12, atol=1e-12)
        assert torch.equal(w.detach(), here)
        optimizer.step()


def test_without_an_inner_step_it_is_training_on_the_outer_loss() -> None:
    model, (x, y), objective = network(), data(), AUCMargin(state_dtype=F64)
    optimizer = torch.optim.SGD([*model.parameters(), *objective.parameters()], lr=0.1)
    inner, outer = losses(model, objective, x, y)
    CompositionalTraining(optimizer, tau=0.0, beta=1.0, second_order=True).backward(inner, outer)
    got = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    AUCMargin(state_dtype=F64)(model(x).squeeze(-1), y).loss.backward()
    for mine, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-12, atol=1e-12)


def test_parameters_of_the_objective_are_used_as_they_are_and_learn() -> None:
    model, (x, y), objective = network(), data(), AUCMargin(state_dtype=F64)
    optimizer = torch.optim.SGD([*model.parameters(), *objective.parameters()], lr=0.1)
    training = CompositionalTraining(optimizer)
    training.backward(*losses(model, objective, x, y))
    assert objective.started.all()  # what forward wrote at u is kept
    with weights_at(
        list(model.parameters()), [u for u in training.state_dict()["u"] if u is not None]
    ):
        positives = model(x).squeeze(-1)[y == 1].mean()
    assert objective.a.item() == pytest.approx(positives.item(), rel=1e-12)
    assert training.state_dict()["u"][-2:] == [None, None]
    with torch.no_grad():
        objective.a += 1.0
    optimizer.zero_grad()
    training.backward(*losses(model, objective, x, y))
    assert objective.a.grad.item() > 1.0


def test_gradients_are_added_to_those_that_are_there() -> None:
    w = nn.Parameter(torch.tensor([4.0]))
    training = CompositionalTraining(torch.optim.SGD([w], lr=0.1), tau=0.25)
    w.grad = torch.tensor([100.0])
    training.backward(lambda: (w**2).sum() / 2, lambda: (w**2).sum())
    assert w.grad.item() == 106.0


def test_a_group_has_its_own_tau() -> None:
    v, w = (nn.Parameter(torch.tensor([4.0])) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [v], "tau": 0.5}, {"params": [w]}], lr=0.1)
    training = CompositionalTraining(optimizer, tau=0.25, second_order=True)
    training.backward(lambda: (v * v + w * w).sum() / 2, lambda: (v * v + w * w).sum())
    # (1 - tau) 2 u with u = (1 - tau) 4
    assert (v.grad.item(), w.grad.item()) == (0.5 * 2 * 2.0, 0.75 * 2 * 3.0)


def test_frozen_weights_are_left_alone_and_those_reached_by_no_loss_get_no_gradient() -> None:
    model = network()
    model[0].requires_grad_(False)
    spare = nn.Parameter(torch.ones(3, dtype=F64))
    before = model[0].weight.clone()
    optimizer = torch.optim.SGD([*model.parameters(), spare], lr=0.1)
    objective, (x, y) = AUCMargin(state_dtype=F64), data()
    training = CompositionalTraining(optimizer, second_order=True)
    training.backward(*losses(model, objective, x, y))
    assert model[0].weight.grad is None
    assert spare.grad is None
    assert torch.equal(model[0].weight, before)
    assert [u is None for u in training.state_dict()["u"]] == [True, True, False, False, True]


@pytest.mark.parametrize("where", ["inner", "outer", "second derivative"])
def test_an_error_puts_everything_back(where: str) -> None:
    model, (x, y), objective = network(), data(), AUCMargin(state_dtype=F64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = CompositionalTraining(optimizer, beta=0.5, second_order=True)
    inner, outer = losses(model, objective, x, y)
    training.backward(inner, outer)
    weights = [p.detach().clone() for p in model.parameters()]
    gradients = [p.grad.clone() for p in model.parameters()]
    u = [t.clone() for t in training.state_dict()["u"]]

    def broken() -> Tensor:
        raise KeyboardInterrupt

    pairs = AveragePrecision(len(y), state_dtype=F64)  # differentiable once
    functions = {
        "inner": (broken, outer),
        "outer": (inner, broken),
        "second derivative": (losses(model, pairs, x, y)[1], outer),
    }
    with pytest.raises((KeyboardInterrupt, ValueError)) as raised:
        training.backward(*functions[where])
    assert where != "second derivative" or "second_order=False" in str(raised.value)
    for before, after in (
        (weights, [p.detach() for p in model.parameters()]),
        (gradients, [p.grad for p in model.parameters()]),
        (u, training.state_dict()["u"]),
    ):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def run(
    kind: Any, steps: range, saved: bytes | None, *, second_order: bool = True
) -> tuple[bytes, list[Tensor]]:
    """Compositional training; what a checkpoint holds, and every number of the run."""
    model, objective = network(torch.float32), AUCMargin(gamma=0.3)
    own = {"params": objective.parameters(), "weight_decay": 0.0}
    optimizer = kind([{"params": model.parameters()}, own], lr=0.05)
    training = CompositionalTraining(optimizer, tau=0.2, beta=0.4, second_order=second_order)
    parts = {"model": model, "objective": objective, "optimizer": optimizer, "training": training}
    if saved is not None:
        loaded = torch.load(io.BytesIO(saved), weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(loaded[name])
    for step in steps:
        x, y = data(16, seed=step, dtype=torch.float32)
        optimizer.zero_grad()
        training.backward(*losses(model, objective, x, y))
        optimizer.step()
    buffer = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in parts.items()}, buffer)
    numbers = [*model.state_dict().values(), *objective.state_dict().values()]
    return buffer.getvalue(), numbers + [u for u in training.state_dict()["u"] if u is not None]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("second_order", [True, False])
def test_a_resumed_run_is_the_run_bit_for_bit(kind: Any, second_order: bool) -> None:
    _, whole = run(kind, range(8), None, second_order=second_order)
    saved, half = run(kind, range(4), None, second_order=second_order)
    _, resumed = run(kind, range(4, 8), saved, second_order=second_order)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(whole[:4], half[:4], strict=True))


def test_a_checkpoint_is_neither_changed_nor_shared() -> None:
    w = nn.Parameter(torch.tensor([4.0]))
    training = CompositionalTraining(torch.optim.SGD([w], lr=0.1), beta=0.5)
    saved = {"u": [torch.tensor([7.0])]}
    training.load_state_dict(saved)
    training.backward(lambda: (w**2).sum(), lambda: (w**2).sum())
    assert saved["u"][0].item() == 7.0
    with pytest.raises(ValueError, match=r"averages of 2 parameters and the optimizer has 1"):
        training.load_state_dict({"u": [torch.ones(1), torch.ones(1)]})
    with pytest.raises(ValueError, match="from parameter 0 on; give the optimizer"):
        training.load_state_dict({"u": [torch.ones(3)]})


def test_u_is_kept_in_float32_beside_bfloat16_weights() -> None:
    w = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    training = CompositionalTraining(torch.optim.SGD([w], lr=0.1), tau=0.0, beta=1e-3)
    training.backward(lambda: (w**2).sum(), lambda: (w**2).sum())
    with torch.no_grad():
        w += 1
    for _ in range(100):
        training.backward(lambda: (w**2).sum(), lambda: (w**2).sum())
    (u,) = training.state_dict()["u"]
    assert u.dtype == torch.float32
    assert u.item() == pytest.approx(2 - 0.999**100, rel=1e-4)
    assert w.dtype == torch.bfloat16


@pytest.mark.parametrize("second_order", [True, False])
def test_training_raises_the_auc_of_a_toy(second_order: bool) -> None:
    model, objective = network(torch.float32), AUCMargin()
    optimizer = torch.optim.AdamW([*model.parameters(), *objective.parameters()], lr=0.02)
    training = CompositionalTraining(optimizer, second_order=second_order)
    x, y = data(400, dtype=torch.float32)

    def auc() -> float:
        with torch.no_grad():
            h = model(x).squeeze(-1)
        return float((h[y == 1][:, None] > h[y == 0]).float().mean())

    before = auc()
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        rows = torch.randperm(400, generator=generator)[:64]
        optimizer.zero_grad()
        training.backward(*losses(model, objective, x[rows], y[rows]))
        optimizer.step()
    assert before < 0.7
    assert auc() > 0.9


def distributed_run(rank: int, bounds: list[int]) -> list[Any]:
    model, objective = network(), AUCMargin(gamma=0.3, state_dtype=F64)
    optimizer = torch.optim.SGD([*model.parameters(), *objective.parameters()], lr=0.1)
    training = CompositionalTraining(optimizer, beta=0.5, second_order=True)
    for step in range(3):
        x, y = (t[bounds[rank] : bounds[rank + 1]] for t in data(16, seed=step))
        optimizer.zero_grad()
        training.backward(
            lambda x=x, y=y: cross_entropy(model(x), y),
            lambda x=x, y=y: objective(model(x).squeeze(-1), y).loss,
        )
        optimizer.step()
    return [p.detach().numpy() for p in [*model.parameters(), *objective.parameters()]]


@pytest.fixture(scope="module")
def gloo_pool() -> Iterator[GlooPool]:
    pool = GlooPool(2)
    yield pool
    pool.close()


@pytest.mark.dist
def test_two_processes_are_one(gloo_pool: GlooPool) -> None:
    want = distributed_run(0, [0, 16])
    for got in gloo_pool.run(2, distributed_run, [0, 8, 16]):
        for mine, whole in zip(got, want, strict=True):
            assert mine == pytest.approx(whole, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": -1.0}, "need tau >= 0 and beta in"),
        ({"beta": 0.0}, r"got tau=0.1 and beta=0.0"),
        ({"beta": 1.5}, r"got tau=0.1 and beta=1.5"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, float], message: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match=message):
        CompositionalTraining(optimizer, **options)


def test_an_inner_loss_of_another_model_is_refused() -> None:
    w, other = (nn.Parameter(torch.ones(1)) for _ in range(2))
    training = CompositionalTraining(torch.optim.SGD([w], lr=0.1))
    with pytest.raises(ValueError, match="the inner loss reaches no parameter of the optimizer"):
        training.backward(lambda: other.sum(), lambda: w.sum())


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (torch.ones(()), TypeError, r"must be a function that runs the model .* pass lambda: loss"),
        (lambda w: None, ValueError, "must return a tensor, got None; return the loss itself"),
        (lambda w: ObjectiveOutput(w.sum()), ValueError, "got a ObjectiveOutput; return output.lo"),
        (lambda w: w * w, ValueError, r"return one loss with its graph, got .* \(2,\)"),
        (
            lambda w: w.sum().detach(),
            ValueError,
            "requires_grad=False; reduce it to a mean",
        ),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_no_loss_is_refused_by_its_place(
    place: int, wrong: Any, error: type[Exception], message: str
) -> None:
    w = nn.Parameter(torch.ones(2))
    functions: list[Any] = [lambda: w.sum(), lambda: w.sum()]
    functions[place] = wrong if isinstance(wrong, Tensor) else lambda: wrong(w)
    name = ("inner", "outer")[place]
    with pytest.raises(error, match=rf"{name} .*{message}"):
        CompositionalTraining(torch.optim.SGD([w], lr=0.1)).backward(*functions)
    assert torch.equal(w, torch.ones(2))


def test_an_outer_loss_of_another_model_is_refused() -> None:
    w, other = (nn.Parameter(torch.ones(1)) for _ in range(2))
    training = CompositionalTraining(torch.optim.SGD([w], lr=0.1))
    with pytest.raises(ValueError, match="the outer loss reaches no parameter of the optimizer"):
        training.backward(lambda: w.sum(), lambda: other.sum())


def test_outputs_that_both_losses_share_are_refused() -> None:
    w = nn.Parameter(torch.ones(1))
    output = (w * w).exp()
    with pytest.raises(ValueError, match="run the model inside each of the two functions"):
        CompositionalTraining(torch.optim.SGD([w], lr=0.1)).backward(
            lambda: output.sum(), lambda: (output * 2).sum()
        )


@pytest.mark.parametrize("wrong", [None, "sgd", torch.optim.SGD, [nn.Parameter(torch.ones(1))]])
def test_what_is_no_optimizer_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="optimizer of CompositionalTraining must be a Optimizer"):
        CompositionalTraining(wrong)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, r"got None; a checkpoint of CompositionalTraining has \['u'\]"),
        ({"v": []}, r"got a state with \['v'\]; a checkpoint of CompositionalTraining has"),
        ({"u": ["a"]}, "the checkpoint holds no tensors as moving averages"),
    ],
)
def test_what_is_no_checkpoint_is_refused(state: Any, message: str) -> None:
    training = CompositionalTraining(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    with pytest.raises(ValueError, match=message):
        training.load_state_dict(state)
