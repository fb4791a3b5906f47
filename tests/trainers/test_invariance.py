"""Layout never matters: the gradient of an optimizer step is that of its rows, however they lie.

Every case trains one step through ``Trainer.train`` and compares gradient and loss with the whole
mini-batch in one micro-batch. Variants that apply an objective micro-batch by micro-batch, as other
toolkits do, must fail the same comparison.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from llm_xrisk.data.collators import pad_rows
from tests.trainers.build import dft_trainer, disco_trainer, tiny_model, tokenizer

COSINE, NORM = 1e-6, 1e-5
GROUP_SIZES = [2, 4, 3, 1, 5, 4, 3, 2]  # unequal; the group of one has no signal
Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """Gradient and loss of one optimizer step."""

    gradient: Tensor
    loss: float


class Gradient(TrainerCallback):
    """Keeps the gradient that the optimizer is about to use."""

    value: Tensor

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = kwargs["model"].parameters()
        self.value = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).clone()


def make_rows(kind: str) -> list[Row]:
    """24 answers of unequal length to 8 questions, with the scores' companions."""
    generator = torch.Generator().manual_seed(1)
    digits = tokenizer()("0123456789+-*/=")["input_ids"]

    def draw(low: int, high: int) -> list[int]:
        count = int(torch.randint(low, high, (1,), generator=generator))
        picks = torch.randint(len(digits), (count,), generator=generator)
        return [digits[int(k)] for k in picks]

    rows: list[Row] = []
    for group, size in enumerate(GROUP_SIZES):
        prompt = draw(2, 8)
        for k in range(size):
            completion = [*draw(1, 6), 1]
            # DFT: one gold answer; DisCO: right answers come and go
            target = float(k == 0) if kind == "dft" else float((group + k) % 3 == 0)
            rows.append({
                "prompt": prompt,
                "completion": completion,
                "index": group,
                "group": group,
                "targets": target,
                "ref_log_likelihood": -float(torch.rand((), generator=generator)) * 9,
            })  # fmt: skip
    return rows


def add_old_policy(rows: list[Row]) -> None:
    """Old log-probs near the model's own, as after a few updates."""
    from llm_xrisk.rollout.scoring import sequence_log_probs

    prompts, completions = [r["prompt"] for r in rows], [r["completion"] for r in rows]
    for row, scores in zip(
        rows, sequence_log_probs(tiny_model(seed=3), prompts, completions), strict=True
    ):
        now = torch.tensor(scores)
        row["old"] = (now + 0.2 * torch.sin(torch.arange(len(scores)) + now)).tolist()


ROWS = {kind: make_rows(kind) for kind in ("dft", "disco")}
add_old_policy(ROWS["disco"])


def collate(rows: list[Row], side: str) -> dict[str, Any]:
    batch = pad_rows(
        [r["prompt"] for r in rows], [r["completion"] for r in rows], pad_token_id=0, side=side
    )
    for name in ("index", "group", "targets", "ref_log_likelihood"):
        batch[name] = torch.tensor([row[name] for row in rows])
    mask = batch["completion_mask"]
    batch["length"] = mask.sum(-1).float()
    if "old" in rows[0]:
        old = torch.zeros(mask.shape)
        old[mask] = torch.tensor([value for row in rows for value in row["old"]])
        batch["old_log_probs"] = old[:, -batch["keep"] :]
    return batch


def micro_batches(
    rows: list[Row], *, size: int | None = None, side: str = "left", seed: int | None = None
) -> list[dict[str, Any]]:
    """Rows in micro-batches of ``size`` (all in one by default), shuffled if there is a seed."""
    if seed is not None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = [rows[k] for k in order]
    size = size or len(rows)
    return [collate(rows[k : k + size], side) for k in range(0, len(rows), size)]


def by_groups(rows: list[Row], groups: int) -> list[dict[str, Any]]:
    """Whole questions, ``groups`` of them in a micro-batch."""
    numbers = sorted({row["group"] for row in rows})
    parts = [numbers[k : k + groups] for k in range(0, len(numbers), groups)]
    return [collate([r for r in rows if r["group"] in part], "left") for part in parts]


OBJECTIVES: dict[str, dict[str, Any]] = {
    "DFT": {"objective": "DFT", "gamma": 0.5},
    "DFT2": {"objective": "DFT2", "gamma": 0.9},
    "L1 log-L": {"tau": 0.0},
    "L1 L-ratio": {"tau": 0.0, "score": "likelihood_ratio"},
    "L2 log-L": {"tau": 0.3},
    "L2 L-ratio": {"tau": 0.3, "score": "likelihood_ratio"},
    "L2, all questions": {"tau": 0.3, "normalizer": "all", "kl_estimator": "k1"},
    "GRPO": {"objective": "GRPO"},
    "DrGRPO": {"objective": "DrGRPO"},
    "DAPO": {"objective": "DAPO"},
}


POOL = [
    {
        "index": k,
        "prompt_ids": [5],
        "completion_ids": [6],
        "negative_ids": [[7]],
        "ref_log_likelihoods": [-1.0],
    }
    for k in range(len(GROUP_SIZES))
]


def kind_of(name: str) -> str:
    return "dft" if name.startswith("DFT") else "disco"


def build(folder: Any, name: str, **changes: Any) -> Any:
    settings = OBJECTIVES[name] | changes
    if kind_of(name) == "dft":
        return dft_trainer(folder, rows=POOL, **settings)
    settings = {"delta": 1e-4, "kl_penalty": 50.0} | settings
    return disco_trainer(folder, per_device_train_batch_size=4, **settings)


def one_step(folder: Any, name: str, batches: list[dict[str, Any]], trainer: Any = None) -> Step:
    """One optimizer step on the given micro-batches, through the whole of ``Trainer.train``.

    They are what the data loader gives, so no data set is read and nothing is rolled out.
    """
    watch = Gradient()
    made = {"gradient_accumulation_steps": len(batches), "max_steps": 1}
    trainer = trainer or build
    run = trainer(folder, name, **made, callbacks=[watch])
    if kind_of(name) == "disco":
        run.mini_batch = lambda given: given
    run.get_train_dataloader = lambda: DataLoader(batches, batch_size=1, collate_fn=lambda b: b[0])
    run.train()
    (loss,) = [line["loss"] for line in run.state.log_history if "loss" in line]
    return Step(watch.value, loss)


def difference(one: Step, other: Step) -> tuple[float, float, float]:
    """1 - cosine, relative difference of norms, relative difference of losses; in float64."""
    a, b = one.gradient.double(), other.gradient.double()
    cosine = float(a @ b / (a.norm() * b.norm()))
    norms = float((a.norm() - b.norm()).abs() / b.norm())
    return 1 - cosine, norms, abs(one.loss - other.loss) / max(1.0, abs(other.loss))


def same(one: Step, other: Step) -> bool:
    angle, norms, losses = difference(one, other)
    return angle <= COSINE and norms <= NORM and losses <= NORM


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The step of each objective with all rows in one micro-batch."""
    known: dict[str, Step] = {}

    def find(name: str) -> Step:
        if name not in known:
            rows = ROWS[kind_of(name)]
            known[name] = one_step(tmp_path_factory.mktemp("whole"), name, micro_batches(rows))
        return known[name]

    yield find


LAYOUTS: dict[str, Any] = {
    **{f"rows {n}": lambda rows, n=n: micro_batches(rows, size=n) for n in (1, 2, 4, 8)},
    "shuffled": lambda rows: micro_batches(rows, size=4, seed=5),
    "shuffled in one": lambda rows: micro_batches(rows, seed=6),
    "padded right": lambda rows: micro_batches(rows, size=8, side="right"),
    "padded right in one": lambda rows: micro_batches(rows, side="right"),
    "questions 1": lambda rows: by_groups(rows, 1),
    "questions 3": lambda rows: by_groups(rows, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_layout_never_matters(tmp_path, whole, name, layout):
    step = one_step(tmp_path, name, LAYOUTS[layout](ROWS[kind_of(name)]))
    reference = whole(name)
    assert reference.gradient.norm() > 1e-3
    angle, norms, losses = difference(step, reference)
    assert angle <= COSINE
    assert norms <= NORM
    assert losses <= NORM


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_step_has_the_gradient_of_a_loop_over_rows(tmp_path, whole, name):
    """The one micro-batch itself: unpadded rows, autograd of the objective, no trainer."""
    rows = ROWS[kind_of(name)]
    trainer = build(tmp_path, name)
    model, objective = tiny_model(), trainer.objective
    scalars: dict[str, list[Tensor]] = {}
    for row in rows:
        ids = torch.tensor([[*row["prompt"], *row["completion"]]])
        n = len(row["completion"])
        logits = model(input_ids=ids).logits[:, -n - 1 : -1].log_softmax(-1)
        tokens = logits.gather(-1, ids[:, -n:].unsqueeze(-1)).squeeze(-1)
        old = torch.tensor([row["old"]]) if "old" in row else None
        mask, target = torch.ones_like(tokens, dtype=torch.bool), torch.tensor([row["targets"]])
        for key, value in objective.row_scores(tokens, mask, old, target).items():
            scalars.setdefault(key, []).append(value)
    batch = collate(rows, "left")
    columns = {key: batch[key] for key in trainer._row_columns if key in batch}
    joined = {key: torch.cat(values) for key, values in scalars.items()}
    output = objective(targets=batch["targets"], **joined, **columns)
    output.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert same(Step(gradient, output.loss.item()), whole(name))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_applied_to_each_micro_batch_fails_the_comparison(tmp_path, whole, name):
    """What the contract is there to catch: means of means over groups that were torn apart."""

    def broken(folder: Any, name: str, **changes: Any) -> Any:
        trainer = build(folder, name, **changes)
        n = changes["gradient_accumulation_steps"]
        trainer._weigh = lambda batches: [b | {"share": torch.tensor(1 / n)} for b in batches]
        trainer._group_shares = lambda batches: None
        return trainer

    batches = micro_batches(ROWS[kind_of(name)], size=4)
    assert not same(one_step(tmp_path, name, batches, broken), whole(name))


@pytest.mark.parametrize("name", ["DFT", "DFT2"])
def test_unequal_shares_are_needed_where_groups_are_kept_together(tmp_path, whole, name):
    """Three micro-batches of 3, 3 and 2 questions: an even mean would be wrong."""

    def even(folder: Any, name: str, **changes: Any) -> Any:
        trainer = build(folder, name, **changes)
        trainer._group_shares = lambda batches: [torch.tensor(1 / len(batches)) for _ in batches]
        return trainer

    batches = by_groups(ROWS["dft"], 3)
    assert [len(set(b["group"].tolist())) for b in batches] == [3, 3, 2]
    assert not same(one_step(tmp_path, name, batches, even), whole(name))


@pytest.mark.parametrize("name", ["DFT", "DFT2"])
def test_the_tracked_values_do_not_depend_on_the_layout_either(tmp_path, name):
    states: list[Tensor] = []
    for layout in (
        micro_batches(ROWS["dft"]),
        micro_batches(ROWS["dft"], size=2, seed=3),
        by_groups(ROWS["dft"], 2),
    ):
        trainers: list[Any] = []

        def keep(folder: Any, name: str, *, kept: list[Any] = trainers, **changes: Any) -> Any:
            kept.append(build(folder, name, **changes))
            return kept[0]

        one_step(tmp_path, name, layout, keep)
        states.append(trainers[0].objective.inner.u.clone())
    assert states[0].abs().max() > 0.1
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=1e-5, atol=1e-5)


def test_the_comparison_notices_an_angle_and_a_length():
    gradient = torch.randn(1000)
    step = Step(gradient, 1.0)
    assert same(step, Step(gradient.clone(), 1.0))
    assert not same(step, Step(gradient * (1 + 1e-4), 1.0))
    assert not same(step, Step(gradient + 0.01 * torch.randn(1000), 1.0))
    assert not same(step, Step(gradient, 1.001))
    assert difference(step, Step(-gradient, 1.0))[0] == pytest.approx(2.0)
    assert math.isclose(COSINE, 1e-6)
