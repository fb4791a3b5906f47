"""What every objective promises; a test file subclasses it and adds a worked example."""

import copy
import inspect
import io
import math
import pickle
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from llm_xrisk.objectives import Objective
from tests.batches import Batch, Result, assert_same, evaluate, exact_loss, state
from tests.contract_inputs import InputContract
from tests.gloo import GlooPool

__all__ = ["Batch", "ObjectiveContract", "Result", "assert_same", "evaluate", "exact_loss", "state"]


def distributed_steps(
    rank: int, contract: "type[ObjectiveContract]", bounds: list[int]
) -> dict[str, Any]:
    """Three steps of one rank, which holds the rows bounds[rank] to bounds[rank + 1]."""
    return ObjectiveContract.summary(contract(), slice(bounds[rank], bounds[rank + 1]))


class ObjectiveContract(InputContract):
    """Inherited tests; ``reference`` is one step of the loops in ``tests/reference``."""

    objective_class: ClassVar[type[Objective]]
    options: ClassVar[dict[str, Any]] = {}
    num_samples: ClassVar[int] = 12
    # duals and parameters move by steps of their own: gamma = 1 does not make them the batch's
    has_duals: ClassVar[bool] = False

    def build(self, **overrides: Any) -> Objective:
        """An objective in float64 with gamma = 0.3 where it has a state, both to be overridden."""
        taken = inspect.signature(self.objective_class).parameters
        defaults = {"num_samples": self.num_samples, "gamma": 0.3, "state_dtype": torch.float64}
        options = {name: value for name, value in defaults.items() if name in taken}
        options |= self.options
        return self.objective_class(
            **options | {name: value for name, value in overrides.items() if name in taken}
        )

    def make_batch(self, generator: torch.Generator) -> Batch:
        """A float64 batch with repeated samples, its rows in no particular order."""
        raise NotImplementedError

    def reference(
        self, batch: Batch, u: dict[int, Any], gamma: float
    ) -> tuple[float, dict[str, Any]]:
        """Loss and gradients of one step of the loops; ``u`` is updated in place."""
        raise NotImplementedError

    def tracked(self, objective: Objective) -> dict[int, Any]:
        """The state of the visited samples, as the loops keep it."""
        return {}

    def degenerate(self, batch: Batch) -> list[Batch]:
        """Batches without a pair."""
        zero, one = torch.zeros_like(batch.targets), torch.ones_like(batch.targets)
        return [replace(batch, targets=zero), replace(batch, targets=one)]

    def batches(self, count: int, seed: int = 0) -> list[Batch]:
        generator = torch.Generator().manual_seed(seed)
        return [self.make_batch(generator) for _ in range(count)]

    def summary(self, selection: slice) -> dict[str, Any]:
        """Losses, gradients and final state of three steps, as arrays."""
        objective = self.build()
        results = [evaluate(objective, batch.rows(selection)) for batch in self.batches(3)]
        return {
            "loss": [float(result.loss) for result in results],
            "gradients": [{k: v.numpy() for k, v in r.gradients.items()} for r in results],
            "parameters": [{k: v.numpy() for k, v in r.parameters.items()} for r in results],
            "state": {name: value.numpy() for name, value in objective.state_dict().items()},
        }

    def test_worked_example(self) -> None:
        """Values written as arithmetic that a reader can redo."""
        raise NotImplementedError

    def test_value_gradient_and_state_equal_the_loops(self) -> None:
        objective, u = self.build(), dict[int, Any]()
        for batch in self.batches(4):
            result = evaluate(objective, batch)
            loss, gradients = self.reference(batch, u, 0.3)
            assert float(result.loss) == pytest.approx(loss, rel=1e-10, abs=1e-12)
            for name, got in result.gradients.items():
                want = torch.tensor(gradients[name], dtype=torch.float64)
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        got = self.tracked(objective)
        assert got.keys() == u.keys()
        for sample, value in u.items():
            assert got[sample] == pytest.approx(value, rel=1e-10)

    def test_gamma_one_is_the_minibatch_loss(self) -> None:
        objective = self.build(gamma=1.0, u_init="first_batch")
        for batch in self.batches(2):  # the second finds a state and must ignore it
            batch = replace(batch, groups={k: v for k, v in batch.groups.items() if k != "kl"})
            leaves = tuple(name for name in batch.leaves if name != "kl")
            batch = replace(batch, leaves=leaves)
            result = evaluate(objective, batch)
            copies = batch.copy()
            loss = exact_loss(objective, copies)
            gradients = torch.autograd.grad(loss, [copies.tensors()[name] for name in leaves])
            torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=1e-12)
            for name, want in zip(leaves, gradients, strict=True):
                torch.testing.assert_close(result.gradients[name], want, rtol=1e-10, atol=1e-12)

    def test_eval_leaves_the_state_alone(self) -> None:
        first, second = self.batches(2)
        objective = self.build()
        evaluate(objective, first)
        before = state(objective)
        value = evaluate(objective.eval(), second).loss
        assert_same(state(objective), before)
        if not self.has_duals:
            fresh = evaluate(self.build(gamma=1.0), second).loss
            torch.testing.assert_close(value, fresh, rtol=1e-12, atol=1e-12)

    def test_unvisited_samples_keep_their_state(self) -> None:
        objective = self.build()
        before = state(objective)
        batch = self.batches(1)[0]
        evaluate(objective, batch)
        after = state(objective)
        moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
        assert bool(moved) == bool(before.keys() - dict(objective.named_parameters()).keys())
        if objective.num_samples is None:
            return
        unseen = sorted(set(range(self.num_samples)) - set(batch.groups["index"].tolist()))
        assert unseen, "the batch should leave some sample unvisited"
        for name, value in after.items():
            if len(value) % self.num_samples == 0:  # by sample, or by sample and label
                by_sample = (self.num_samples, -1)
                rows, old = value.reshape(by_sample), before[name].reshape(by_sample)
                assert torch.equal(rows[unseen], old[unseen])

    @pytest.mark.parametrize("gamma", [0.9, 0.1, 0.01])
    def test_the_first_visit_has_the_gradient_of_the_minibatch_for_every_gamma(
        self, gamma: float
    ) -> None:
        batch = self.batches(1)[0]
        want = evaluate(self.build(gamma=1.0, u_init="first_batch"), batch)
        got = evaluate(self.build(gamma=gamma, u_init="first_batch"), batch)
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=1e-12)
        assert_same(got.gradients, want.gradients, 1e-12)

    def test_state_survives_every_way_of_copying(self) -> None:
        objective = self.build()
        first, second = self.batches(2)
        evaluate(objective, first)
        buffer = io.BytesIO()
        torch.save(objective.state_dict(), buffer)
        buffer.seek(0)
        loaded = self.build()
        loaded.load_state_dict(torch.load(buffer, weights_only=True))
        copies = [loaded, copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))]
        want = evaluate(objective, second)
        for other in copies:
            got = evaluate(other, second)
            assert torch.equal(got.loss, want.loss)
            assert_same(state(other), state(objective))

    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
    def test_five_steps_and_five_more_are_ten(self, optimizer: type[torch.optim.Optimizer]) -> None:
        batches = self.batches(10)
        whole = self.train(batches, optimizer)
        half = self.train(batches[:5], optimizer)
        kept = copy.deepcopy(half["objective"])
        resumed = self.train(batches[5:], optimizer, half)
        assert_same(resumed["weights"], whole["weights"])
        assert_same(resumed["objective"], whole["objective"])
        assert_same(half["objective"], kept)  # loading leaves a checkpoint as it is

    def train(
        self,
        batches: list[Batch],
        optimizer: type[torch.optim.Optimizer],
        checkpoint: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Train a factor of every leaf, and the objective's parameters; return a checkpoint."""
        objective = self.build()
        weights = {name: torch.zeros((), requires_grad=True) for name in batches[0].leaves}
        options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {"weight_decay": 0.1}
        opt = optimizer([*weights.values(), *objective.parameters()], lr=0.1, **options)
        if checkpoint is not None:
            objective.load_state_dict(checkpoint["objective"])
            opt.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))  # torch shares tensors
            for name, weight in weights.items():
                weight.data = checkpoint["weights"][name].clone()
        for batch in batches:
            moved = batch.map(lambda name, t: t + weights[name] * t if name in weights else t)
            opt.zero_grad()
            objective(**moved.tensors()).loss.backward()
            opt.step()
        return {
            "objective": state(objective),
            "optimizer": copy.deepcopy(opt.state_dict()),
            "weights": {name: weight.detach().clone() for name, weight in weights.items()},
        }

    def test_row_order_does_not_matter(self) -> None:
        one, other = self.build(), self.build()
        for batch in self.batches(3):
            order = torch.randperm(len(batch.targets))
            want, got = evaluate(one, batch), evaluate(other, batch.rows(order))
            torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=1e-12)
            permuted = {name: value[order] for name, value in want.gradients.items()}
            assert_same(got.gradients, permuted, 1e-12)
            assert_same(got.parameters, want.parameters, 1e-12)
        assert_same(state(other), state(one), 1e-12)

    def test_a_batch_given_twice_is_the_same_batch(self) -> None:
        one, other = self.build(), self.build()
        for batch in self.batches(2):
            count = len(batch.targets)
            twice = batch.rows(torch.arange(count).repeat(2))
            want, got = evaluate(one, batch), evaluate(other, twice)
            torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=1e-12)
            summed = {name: g[:count] + g[count:] for name, g in got.gradients.items()}
            assert_same(summed, want.gradients, 1e-12)
            assert_same(got.parameters, want.parameters, 1e-12)
        assert_same(state(other), state(one), 1e-12)

    def test_stats_tell_how_much_of_the_data_was_visited(self) -> None:
        objective = self.build()
        before = objective.stats()
        assert all(share == 0.0 for name, share in before.items() if name.endswith("visited"))
        evaluate(objective, self.batches(1)[0])
        after = objective.stats()
        assert after.keys() == before.keys()
        output = objective(**self.batches(1)[0].tensors())
        told = objective.stats(output.metrics)
        assert told["objective"] == pytest.approx(float(output.loss.detach()))
        assert told.keys() == after.keys() | set(output.metrics)
        assert all(0 < share <= 1 for name, share in after.items() if name.endswith("visited"))
        assert all(math.isfinite(value) for value in after.values())

    def test_a_batch_without_pairs_is_harmless(self) -> None:
        objective = self.build()
        evaluate(objective, self.batches(1)[0])
        before = state(objective)
        for batch in self.degenerate(self.batches(1)[0]):
            result = evaluate(objective, batch)
            assert result.loss.isfinite()
            assert all(gradient.isfinite().all() for gradient in result.gradients.values())
            # what could not be observed is NaN, which logs leave out
            assert not any(value.isinf().any() for value in result.metrics.values())
            assert result.metrics["objective"].isfinite()
            assert_same(state(objective), before)

    def test_bfloat16_rows_are_computed_and_tracked_in_float32(self) -> None:
        rounded = self.build(state_dtype=torch.float32).to(torch.bfloat16)
        precise = self.build(state_dtype=torch.float32)
        for batch in self.batches(3):
            short = batch.to(torch.bfloat16)
            got, want = evaluate(rounded, short), evaluate(precise, short.to(torch.float32))
            assert got.loss.dtype == torch.float32
            torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
            for name, gradient in got.gradients.items():
                expected = want.gradients[name].to(torch.bfloat16)
                torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-5)
        floats = [v for v in rounded.buffers() if v.is_floating_point()]
        assert all(value.dtype == torch.float32 for value in floats)
        assert_same(state(rounded), state(precise), 1e-5)

    @pytest.mark.dist
    @pytest.mark.parametrize("shares", [(0.5, 0.5), (1.0, 0.0), (0.3, 0.2, 0.0, 0.5)])
    def test_several_processes_are_one(
        self, gloo_pool: GlooPool, shares: tuple[float, ...]
    ) -> None:
        self.assert_ranks_equal_one_process(gloo_pool, shares)

    def assert_ranks_equal_one_process(self, pool: GlooPool, shares: tuple[float, ...]) -> None:
        rows, world = len(self.batches(1)[0].targets), len(shares)
        bounds = [round(rows * sum(shares[:rank])) for rank in range(world + 1)]
        want = self.summary(slice(None))
        ranks = pool.run(world, distributed_steps, type(self), bounds)
        for rank, got in enumerate(ranks):
            local = slice(bounds[rank], bounds[rank + 1])
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-12)
            for name, value in want["state"].items():
                assert got["state"][name] == pytest.approx(value, rel=1e-12), name
            for mine, whole in zip(got["gradients"], want["gradients"], strict=True):
                for name, gradient in whole.items():
                    expected = world * gradient[local]  # data parallelism averages over ranks
                    assert mine[name] == pytest.approx(expected, rel=1e-10, abs=1e-14)
            # objectives stand outside the data-parallel wrapper: nothing averages these
            for mine, whole in zip(got["parameters"], want["parameters"], strict=True):
                for name, gradient in whole.items():
                    assert mine[name] == pytest.approx(gradient, rel=1e-10, abs=1e-14)

    compile_backend: ClassVar[str] = "aot_eager"

    # dynamo makes an instance of autograd.Function while it traces one, and torch warns of itself:
    # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/autograd/function.py
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_compiles_to_one_graph_with_equal_results(self) -> None:
        torch._dynamo.reset()
        eager = self.build(state_dtype=torch.float32)
        compiled = self.build(state_dtype=torch.float32)
        graph = torch.compile(compiled, fullgraph=True, backend=self.compile_backend)
        for batch in self.batches(2):
            batch = batch.to(torch.float32)
            want, got = evaluate(eager, batch), evaluate(graph, batch)
            torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
            assert_same(got.gradients, want.gradients, 1e-5)
        assert_same(state(compiled), state(eager), 1e-5)

    def test_forward_never_waits_for_the_device(self) -> None:
        """On the meta device, reading a value or a data-dependent shape raises."""
        objective = self.build(state_dtype=torch.float32).to("meta")
        result = evaluate(objective, self.batches(1)[0].to(torch.float32).to("meta"))
        assert result.loss.shape == ()
        assert all(value.device.type == "meta" for value in result.metrics.values())

    def test_metrics_are_detached_scalars(self) -> None:
        metrics = evaluate(self.build(), self.batches(1)[0]).metrics
        assert metrics
        assert all(value.shape == () and not value.requires_grad for value in metrics.values())

    def test_with_frozen_scores_the_state_approaches_the_inner_values(self) -> None:
        start, frozen = self.batches(2)
        exact = self.build(gamma=1.0)
        want = evaluate(exact, frozen)
        objective = self.build()
        evaluate(objective, replace(frozen, scores=start.scores))
        first = evaluate(objective, frozen)
        assert torch.equal(first.loss, want.loss) == (not state(objective))
        if self.has_duals:
            return
        for _ in range(80):
            evaluate(objective, frozen)
        assert_same(state(objective), state(exact), 1e-10)
