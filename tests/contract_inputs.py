"""What objectives make of rows at the edge: large ones, narrow types, labels, wrong shapes."""

import inspect
import math
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from llm_xrisk.objectives import Objective, SequenceObjective
from tests.batches import Batch, assert_same, evaluate, exact_loss, state


class InputContract:
    """Inherited tests of what is computed and what is refused; see ``tests/contract.py``."""

    objective_class: ClassVar[type[Objective]]
    num_samples: ClassVar[int]

    def build(self, **overrides: Any) -> Objective:
        raise NotImplementedError

    def batches(self, count: int, seed: int = 0) -> list[Batch]:
        raise NotImplementedError

    @pytest.mark.parametrize("size", [1e4, -1e4])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_huge_scores_stay_finite(self, size: float, dtype: torch.dtype) -> None:
        objective = self.build(state_dtype=dtype)
        for batch in self.batches(3):
            result = evaluate(objective, batch.scaled(size).to(dtype))
            assert result.loss.isfinite()
            assert all(gradient.isfinite().all() for gradient in result.gradients.values())
        visited = {name: value for name, value in state(objective).items() if name.endswith("u")}
        assert all(value.isfinite().all() for value in visited.values())

    def at_temperature(self, tau: float) -> dict[str, Any]:
        """The options under which the objective is as sharp as ``tau`` makes it."""
        return {"tau": tau}

    def reach(self, tau: float) -> float:
        """The largest score at which |l| / tau stays below 1e4; here of squared hinges."""
        return (100 * math.sqrt(tau) - 1) / 2

    @property
    def temperatures(self) -> list[float]:
        taken = inspect.signature(self.objective_class).parameters
        names = [name for name in self.at_temperature(1.0) if name in taken]
        return [1.0, 0.1, 0.01, 0.001] if names else [1.0]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_scores_to_a_hundred_are_finite_at_any_temperature(self, dtype: torch.dtype) -> None:
        for tau in self.temperatures:
            objective = self.build(state_dtype=torch.float32, **self.at_temperature(tau))
            for batch in self.batches(3):
                result = evaluate(objective, self.stretched(batch, 100.0).to(dtype))
                assert result.loss.isfinite()
                assert all(gradient.isfinite().all() for gradient in result.gradients.values())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_gradients_are_those_of_float64_on_the_same_rows(self, dtype: torch.dtype) -> None:
        for tau in self.temperatures:
            options = self.at_temperature(tau)
            narrow = self.build(state_dtype=torch.float32, **options)
            wide = self.build(**options)
            for batch in self.batches(3):
                rounded = self.stretched(batch, min(100.0, self.reach(tau))).to(dtype)
                got, want = evaluate(narrow, rounded), evaluate(wide, rounded.to(torch.float64))
                for name, gradient in want.gradients.items():
                    error = (got.gradients[name].to(torch.float64) - gradient).norm()
                    # the last rounding is that of the rows' own type, to which gradients return
                    slack = (1e-3 + torch.finfo(dtype).eps / 2) * gradient.norm()
                    assert error <= slack + torch.finfo(dtype).tiny, (tau, name, error / slack)

    @staticmethod
    def stretched(batch: Batch, size: float) -> Batch:
        """Scores with the largest at ``size``."""
        return replace(batch, scores=batch.scores * (size / batch.scores.abs().max()))

    def test_autocast_changes_nothing(self) -> None:
        batch = self.batches(1)[0]
        want = evaluate(self.build(), batch)
        with torch.autocast("cpu", torch.bfloat16):
            got = evaluate(self.build(), batch)
        assert torch.equal(got.loss, want.loss)
        assert_same(got.gradients, want.gradients)

    @pytest.mark.parametrize("bad", [math.inf, math.nan])
    def test_one_overflow_does_not_stay_in_the_state(self, bad: float) -> None:
        first, spoilt, last = self.batches(3)
        objective = self.build()
        evaluate(objective, first)
        scores = spoilt.scores.clone()
        scores.view(-1)[0] = bad
        evaluate(objective, replace(spoilt, scores=scores))
        assert evaluate(objective, last).loss.isfinite()
        tracked = [v for v in state(objective).values() if v.is_floating_point()]
        assert all(value.isfinite().all() for value in tracked)

    def test_no_rows_at_all_are_harmless(self) -> None:
        nothing = self.batches(1)[0].rows(slice(0, 0))
        result = evaluate(self.build(), nothing)
        assert result.loss == 0
        assert all(gradient.numel() == 0 for gradient in result.gradients.values())

    def test_rows_are_numbered_by_integers_of_any_width(self) -> None:
        batch = self.batches(1)[0]
        if "index" not in batch.groups:
            return
        want = evaluate(self.build(), batch)
        for kind in (torch.int32, torch.int16, torch.uint8):
            groups = batch.groups | {"index": batch.groups["index"].to(kind)}
            got = evaluate(self.build(), replace(batch, groups=groups))
            assert torch.equal(got.loss, want.loss)

    def test_evaluation_needs_no_ids(self) -> None:
        objective, batch = self.build().eval(), self.batches(1)[0]
        if objective.num_samples is None or "index" not in batch.groups:
            return
        far = batch.groups | {"index": batch.groups["index"] + 1000}
        assert evaluate(objective, replace(batch, groups=far)).loss.isfinite()

    def test_labels_of_every_convention_are_the_same(self) -> None:
        batch = self.batches(1)[0]
        if not self.objective_class.binary_targets:
            return
        ones = (batch.targets > 0.5).long()
        want = evaluate(self.build(), batch)
        for targets in (ones, ones.bool(), 2 * ones - 1, ones.to(torch.float32)):
            got = evaluate(self.build(), replace(batch, targets=targets))
            assert torch.equal(got.loss, want.loss)
            assert_same(got.gradients, want.gradients)

    def test_labels_that_are_none_are_refused_by_name(self) -> None:
        batch = self.batches(1)[0]
        if not self.objective_class.binary_targets:
            return
        ones = (batch.targets > 0.5).long()
        mixed = ones.clone()
        mixed.view(-1)[:2] = torch.tensor([-1, 0])
        for targets in (ones + 1, ones * 0.4, mixed, torch.where(ones == 1, math.nan, 0.0)):
            message = rf"{type(self.build()).__name__} needs targets 0"
            with pytest.raises(ValueError, match=message):
                evaluate(self.build(), replace(batch, targets=targets))
            if not isinstance(self.build(), SequenceObjective):
                with pytest.raises(ValueError, match=message):
                    exact_loss(self.build(), replace(batch, targets=targets))

    def test_rows_that_do_not_belong_together_are_refused_by_name(self) -> None:
        batch = self.batches(1)[0]
        name = self.objective_class.__name__
        wrong = [replace(batch, targets=batch.targets[:-1])]
        if batch.scores.dim() == 1:
            wrong.append(replace(batch, scores=torch.stack([batch.scores, batch.scores], -1)))
        if "index" in batch.groups:
            groups = batch.groups | {"index": batch.groups["index"][:-1]}
            wrong.append(replace(batch, groups=groups))
            floats = batch.groups | {"index": batch.groups["index"].to(torch.float32)}
            with pytest.raises(ValueError, match="index must be integers"):
                evaluate(self.build(), replace(batch, groups=floats))
        for bad in wrong:
            with pytest.raises(ValueError, match=rf"{name} got .*scores \(.* needs .*scores \("):
                evaluate(self.build(), bad)

    def test_rows_that_are_no_tensors_are_refused_by_name(self) -> None:
        batch, name = self.batches(1)[0], self.objective_class.__name__
        exact = inspect.signature(self.objective_class.exact).parameters
        for key, rows in batch.tensors().items():
            texts = [f"id {row}" for row in range(len(rows))]
            for other in (rows.tolist(), rows.numpy(), texts, "rows"):
                given, objective = batch.tensors() | {key: other}, self.build()
                message = rf"{name} got {key} as .* and needs a tensor; "
                with pytest.raises(TypeError, match=message):
                    objective(**given)
                with pytest.raises(TypeError, match=message):
                    objective.exact(**{n: t for n, t in given.items() if n in (*exact, key)})

    def test_scores_and_ids_of_another_type_are_refused_by_name(self) -> None:
        batch, name = self.batches(1)[0], self.objective_class.__name__
        for kind in (torch.int64, torch.bool, torch.complex64):
            wrong = batch.tensors() | {"scores": batch.scores.to(kind)}
            with pytest.raises(ValueError, match=rf"{name} got scores of {kind}.*exchanged\?"):
                self.build()(**wrong)
        for key in {"index", "query"} & set(batch.groups):
            for kind in (torch.float32, torch.bool, torch.complex64):
                wrong = batch.tensors() | {key: batch.groups[key].to(kind)}
                with pytest.raises(ValueError, match=rf"{key} must be integers.*got {kind}"):
                    self.build()(**wrong)

    def test_a_state_on_another_device_is_refused_with_the_way_out(self) -> None:
        batch = self.batches(1)[0]
        if not self.build().state_dict():
            return
        with pytest.raises(ValueError, match=r"has its state on meta .*objective\.to\("):
            evaluate(self.build().to("meta"), batch)

    def test_a_call_that_does_not_fit_shows_the_one_that_does(self) -> None:
        batch, name = self.batches(1)[0], self.objective_class.__name__
        given = batch.tensors()
        rows, groups = (given.pop("scores"), given.pop("targets")), given
        takes = rf"it takes {name}\.forward\(scores, targets"
        with pytest.raises(TypeError, match=rf"too many positional arguments; {takes}"):
            self.build()(*rows, rows[1], **groups)
        with pytest.raises(TypeError, match=rf"unexpected keyword argument 'labels'; {takes}"):
            self.build()(*rows, labels=rows[1], **groups)
        with pytest.raises(TypeError, match=rf"missing a required argument: 'scores'; {takes}"):
            self.build()()

    def test_an_output_says_where_its_loss_is(self) -> None:
        output = self.build()(**self.batches(1)[0].tensors())
        with pytest.raises(AttributeError, match=r"no 'backward'; its loss is output\.loss"):
            output.backward()

    def test_a_missing_index_is_refused_with_the_way_out(self) -> None:
        batch = self.batches(1)[0]
        groups = {name: value for name, value in batch.groups.items() if name != "index"}
        if self.build().num_samples is None:
            assert evaluate(self.build(), replace(batch, groups=groups)).loss.isfinite()
            return
        with pytest.raises(ValueError, match=r"got no index.*with_index\(dataset\)"):
            evaluate(self.build(), replace(batch, groups=groups))

    def test_an_index_out_of_range_is_refused_with_the_way_out(self) -> None:
        objective, batch = self.build(), self.batches(1)[0]
        if objective.num_samples is None:
            objective.check(targets=batch.targets, index=torch.tensor([10**9]))
            return
        rows = range(len(batch.targets))
        for wrong, row in [(w, r) for w in (self.num_samples, -1) for r in rows]:
            index = batch.groups["index"].clone()
            index[row] = wrong
            bad = replace(batch, groups=batch.groups | {"index": index})
            with pytest.raises(IndexError, match=rf"{wrong}.*num_samples=12.*len\(train_dataset\)"):
                evaluate(objective, bad)
            with pytest.raises(IndexError, match=rf"{wrong}.*num_samples=12"):
                objective.check(index=index)

    def test_a_checkpoint_of_another_dataset_is_refused(self) -> None:
        saved = self.build().state_dict()
        if not saved:
            self.build().load_state_dict(self.build().state_dict())
            return
        with pytest.raises(ValueError, match=r"num_samples=12.*num_samples=5"):
            self.build(num_samples=5).load_state_dict(saved)
