"""DRRHOTrainer: weights, layouts, resuming, evaluation, adapters."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils.data import DataLoader

from llm_xrisk.rollout.scoring import sequence_log_probs
from llm_xrisk.trainers.checkpoint import OBJECTIVE_NAME
from llm_xrisk.trainers.drrho import DRRHOTrainer
from llm_xrisk.trainers.drrho_config import ROBUST, DRRHOConfig, RHOTopK
from tests.trainers.build import COMMON, LORA, logged, losses, pairs, tiny_model, tokenizer, weights
from tests.trainers.test_invariance import Gradient, Step, difference, same
from tests.trainers.test_resume import assert_equal, tensors_of

SETTINGS: dict[str, dict[str, Any]] = {
    "KLDRO": {"gamma": 0.5, "tau": 0.5},
    "KLConstrainedDRO": {"gamma": 0.5, "rho": 0.3},
    "CVaRDRO": {"alpha": 0.3},
    "Chi2DRO": {"objective_kwargs": {"lam": 0.5}},
    "Chi2ConstrainedDRO": {"gamma": 0.5, "rho": 0.5},
}
LEVELS = ("sequence", "token")


def trainer_of(
    output: Path | str,
    objective: str = "KLDRO",
    *,
    model: Any = None,
    rows: Any = None,
    eval_dataset: Any = None,
    peft_config: Any = None,
    callbacks: Any = None,
    **changes: Any,
) -> DRRHOTrainer:
    """A trainer on gold answers; per step 8 rows in two micro-batches."""
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    settings = COMMON | batches | {"objective": objective} | SETTINGS[objective] | changes
    return DRRHOTrainer(
        tiny_model() if model is None else model,
        DRRHOConfig(output_dir=str(output), **settings),
        train_dataset=pairs() if rows is None else rows,
        eval_dataset=eval_dataset,
        processing_class=tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another model than the one that is trained, so that RHO losses differ from the start."""
    path = tmp_path_factory.mktemp("reference")
    tiny_model(seed=3).save_pretrained(path)
    return str(path)


def rows_of(trainer: DRRHOTrainer) -> list[dict[str, Any]]:
    return [dict(trainer.train_dataset[k]) for k in range(len(trainer.train_dataset))]


def token_losses(model: Any, rows: list[dict[str, Any]]) -> list[Tensor]:
    """Of each row alone, without padding."""
    scores = sequence_log_probs(
        model, [r["prompt_ids"] for r in rows], [r["completion_ids"] for r in rows]
    )
    return [-torch.tensor(values) for values in scores]


def shift_reference(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    known = DRRHOTrainer._reference_pass
    monkeypatch.setattr(DRRHOTrainer, "_reference_pass", lambda self, r: change(known(self, r)))


# -- one step --------------------------------------------------------------------------------------


def one_step(folder: Path, objective: str, layout: Any, *, spoil: Any = None, **changes: Any):
    """One optimizer step on all 24 rows, laid out in micro-batches by ``layout(rows)``."""
    watch, kept = Gradient(), list[Any]()
    made = {"max_steps": 1, "callbacks": [watch]} | changes
    run = trainer_of(folder, objective, **made)
    kept += layout(rows_of(run))
    run.args.gradient_accumulation_steps = len(kept)
    run.get_train_dataloader = lambda: DataLoader(
        kept, batch_size=1, collate_fn=lambda part: run.data_collator(part[0])
    )
    if spoil is not None:
        spoil(run, len(kept))
    run.train()
    (loss,) = losses(run)
    return Step(watch.value, loss), run


def parts(rows: list[Any], size: int, seed: int | None = None) -> list[list[Any]]:
    if seed is not None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = [rows[k] for k in order]
    return [rows[k : k + size] for k in range(0, len(rows), size)]


LAYOUTS: dict[str, tuple[Any, str]] = {
    "rows 1": (lambda rows: parts(rows, 1), "left"),
    "rows 5": (lambda rows: parts(rows, 5), "left"),
    "shuffled": (lambda rows: parts(rows, 4, seed=5), "left"),
    "shuffled in one": (lambda rows: parts(rows, 24, seed=6), "left"),
    "padded right": (lambda rows: parts(rows, 8), "right"),
    "padded right in one": (lambda rows: parts(rows, 24), "right"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, reference: str) -> Any:
    """The step of each objective and level with all rows in one micro-batch."""
    known: dict[tuple[str, str], Step] = {}

    def find(objective: str, level: str) -> Step:
        if (objective, level) not in known:
            folder = tmp_path_factory.mktemp("whole")
            settings = {"level": level, "reference_model": reference}
            made = one_step(folder, objective, lambda rows: [rows], **settings)
            known[objective, level] = made[0]
        return known[objective, level]

    return find


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("objective", ROBUST)
def test_layout_never_matters(tmp_path, whole, reference, objective, level, layout):
    lay, side = LAYOUTS[layout]
    settings = {"level": level, "reference_model": reference, "padding_side": side}
    step, _ = one_step(tmp_path, objective, lay, **settings)
    assert whole(objective, level).gradient.norm() > 1e-3
    assert same(step, whole(objective, level)), difference(step, whole(objective, level))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("objective", ROBUST)
def test_one_step_has_the_gradient_of_a_loop_over_rows(
    tmp_path, whole, reference, objective, level
):
    """Unpadded rows, autograd of the objective, no trainer."""
    trainer = trainer_of(tmp_path, objective, level=level)
    model, own, other = tiny_model(), [], []
    rows = rows_of(trainer)
    for row, known in zip(rows, token_losses(tiny_model(seed=3), rows), strict=True):
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        n = len(row["completion_ids"])
        logits = model(input_ids=ids).logits[0, -n - 1 : -1].log_softmax(-1)
        tokens = -logits.gather(-1, ids[0, -n:].unsqueeze(-1)).squeeze(-1)
        own.append(tokens if level == "token" else tokens.mean().unsqueeze(0))
        other.append(known if level == "token" else known.mean().unsqueeze(0))
    output = trainer.objective(torch.cat(own), torch.cat(other))
    output.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert same(Step(gradient, output.loss.item()), whole(objective, level))


@pytest.mark.parametrize("level", LEVELS)
def test_an_objective_applied_to_each_micro_batch_fails_the_comparison(
    tmp_path, whole, reference, level
):
    def spoil(run: Any, count: int) -> None:
        run._weigh = lambda batches: [b | {"share": torch.tensor(1 / count)} for b in batches]

    settings = {"level": level, "reference_model": reference, "spoil": spoil}
    step, _ = one_step(tmp_path, "KLDRO", LAYOUTS["rows 5"][0], **settings)
    assert not same(step, whole("KLDRO", level))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_rows_weigh_one_where_the_reference_is_the_initial_model(tmp_path, reduction):
    """And the gradient is that of supervised fine-tuning."""
    settings = {"loss_reduction": reduction}
    step, run = one_step(tmp_path / "a", "KLDRO", lambda rows: parts(rows, 8), **settings)
    assert logged(run, "weight/max") == pytest.approx([1.0], abs=1e-4)
    assert logged(run, "rho_loss") == pytest.approx([0.0], abs=1e-5)
    plain, erm = one_step(
        tmp_path / "b", "CVaRDRO", lambda rows: [rows], alpha=1.0, use_reference=False, **settings
    )
    assert difference(step, plain)[0] <= 1e-6
    rows = token_losses(tiny_model(), rows_of(erm))
    means = torch.stack([row.mean() if reduction == "mean" else row.sum() for row in rows])
    assert plain.loss == pytest.approx(means.mean().item(), rel=1e-5)
    assert logged(erm, "nll") == pytest.approx([torch.cat(rows).mean().item()], rel=1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("objective", ROBUST)
def test_a_reference_of_zero_is_plain_dro_bit_for_bit(tmp_path, monkeypatch, objective, level):
    plain = trainer_of(tmp_path / "plain", objective, level=level, use_reference=False)
    plain.train()
    shift_reference(monkeypatch, torch.zeros_like)
    zero = trainer_of(tmp_path / "zero", objective, level=level)
    zero.train()
    assert losses(zero) == losses(plain)
    assert len(set(losses(plain))) == 4
    assert torch.equal(weights(zero.model), weights(plain.model))
    assert_equal(dict(zero.objective.state_dict()), dict(plain.objective.state_dict()))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("objective", ROBUST)
def test_a_shift_of_the_reference_changes_no_weight(
    tmp_path, monkeypatch, reference, objective, level
):
    reduction = "sum" if level == "sequence" else "mean"  # the file holds sums, or tokens
    settings = {"level": level, "reference_model": reference, "loss_reduction": reduction}
    one = trainer_of(tmp_path / "one", objective, **settings)
    one.train()
    shift_reference(monkeypatch, lambda values: values + 4.0)
    other = trainer_of(tmp_path / "other", objective, **settings)
    other.train()
    moved = weights(one.model) - weights(tiny_model())
    assert (weights(other.model) - weights(one.model)).norm() <= 1e-4 * moved.norm()
    found, expected = logged(other, "weight/max"), logged(one, "weight/max")
    assert found == pytest.approx(expected, rel=1e-3)
    assert max(expected) > 1.5
    assert losses(other) == pytest.approx([loss - 4.0 for loss in losses(one)], abs=1e-3)


# -- RHO-LOSS, CVaR by number ----------------------------------------------------------------------


def test_rho_topk_trains_on_the_rows_with_the_largest_rho_losses_alone(tmp_path, reference):
    settings = {"selection": "rho_topk", "keep_fraction": 0.25, "reference_model": reference}
    none = {"gamma": None, "tau": None}
    step, run = one_step(tmp_path, "KLDRO", lambda rows: parts(rows, 4), **settings, **none)
    assert isinstance(run.objective, RHOTopK)
    rows = rows_of(run)
    other = token_losses(tiny_model(seed=3), rows)
    own = [loss.mean() for loss in token_losses(tiny_model(), rows)]
    gaps = torch.stack([a - b.mean() for a, b in zip(own, other, strict=True)])
    kept = gaps.topk(6).indices.tolist()
    assert step.loss == pytest.approx(gaps[kept].mean().item(), rel=1e-4)
    erm, _ = one_step(
        tmp_path / "b",
        "CVaRDRO",
        lambda _: [[rows[k] for k in kept]],
        alpha=1.0,
        use_reference=False,
    )
    assert same(Step(step.gradient, 0.0), Step(erm.gradient, 0.0))
    assert logged(run, "rows/effective_fraction") == pytest.approx([0.25])


def test_k_counts_rows_of_the_data_set(tmp_path):
    assert trainer_of(tmp_path, "CVaRDRO", alpha=None, k=6).objective.alpha == 6 / 24
    with pytest.raises(ValueError, match="k=25 and a data set of 24 rows"):
        trainer_of(tmp_path, "CVaRDRO", alpha=None, k=25)


# -- resuming --------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "tau": {"objective": "KLConstrainedDRO"},
    "tokens": {"objective": "CVaRDRO", "level": "token"},
    "schedule": {"objective": "KLDRO", "gamma_decay_epochs": 2.0},
    "adapter": {"objective": "Chi2ConstrainedDRO", "lora": True},
}
ADAM = {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "learning_rate": 3e-3}


def saved_run(folder: Path, *, lora: bool = False, **settings: Any) -> DRRHOTrainer:
    torch.manual_seed(0)  # of the adapter
    peft_config = LoraConfig(**LORA) if lora else None
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    return trainer_of(folder, rows=pairs(40), peft_config=peft_config, **(saving | ADAM | settings))


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch, name):
    first = saved_run(tmp_path / "whole", **RUNS[name])
    first.train()
    folder = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", folder / "checkpoint-3")
    shutil.copy(tmp_path / "whole" / "reference_losses.safetensors", folder)
    monkeypatch.setattr(DRRHOTrainer, "_reference_pass", None)  # the file is found
    resumed = saved_run(folder, **RUNS[name])
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(first)
    assert len(set(losses(first))) == 8
    assert_equal(dict(resumed.model.state_dict()), dict(first.model.state_dict()))
    assert_equal(dict(resumed.objective.state_dict()), dict(first.objective.state_dict()))
    one, other = (tensors_of(t.optimizer.state_dict()) for t in (resumed, first))
    assert_equal(one, other)
    assert (folder / "checkpoint-6" / OBJECTIVE_NAME).is_file()


def test_a_resumed_run_without_the_file_is_refused_where_the_reference_is_gone(tmp_path):
    saved_run(tmp_path).train()
    (tmp_path / "reference_losses.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"reference_losses\.safetensors.* been trained"):
        saved_run(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("kind", ["adapter", "by name"])
def test_a_reference_that_is_still_there_is_asked_again(tmp_path, reference, kind):
    settings = {"lora": True} if kind == "adapter" else {"reference_model": reference}
    first = saved_run(tmp_path, **settings)
    first.train()
    (tmp_path / "reference_losses.safetensors").unlink()
    resumed = saved_run(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(first)


# -- adapters, precision, evaluation ---------------------------------------------------------------


def test_the_reference_of_an_adapter_is_the_model_below_it(tmp_path):
    torch.manual_seed(0)
    run = trainer_of(tmp_path, peft_config=LoraConfig(**LORA))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for name, p in run.model.named_parameters():  # an adapter that does something already
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    run.train()
    for row, known in zip(rows_of(run), token_losses(tiny_model(), rows_of(run)), strict=True):
        found = run.data_collator.reference[row["index"]]
        torch.testing.assert_close(found, known.sum().reshape(1), rtol=1e-4, atol=1e-4)
    assert abs(logged(run, "rho_loss")[0]) > 1e-3
    moved = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("lora_" in name for name in moved)


@pytest.mark.parametrize("level", LEVELS)
def test_gradient_checkpointing_changes_nothing(tmp_path, level):
    runs = [
        trainer_of(tmp_path / str(on), level=level, gradient_checkpointing=on)
        for on in (False, True)
    ]
    for run in runs:
        run.train()
    assert losses(runs[0]) == losses(runs[1])
    assert torch.equal(weights(runs[0].model), weights(runs[1].model))


def test_bfloat16_autocast_trains_and_keeps_losses_in_float32(tmp_path):
    half, full = (trainer_of(tmp_path / str(b), bf16=b, max_steps=2) for b in (True, False))
    half.train()
    full.train()
    assert half.data_collator.reference.losses.dtype == torch.float32
    assert half.objective.inner.u.dtype == torch.float32
    assert logged(half, "nll") == pytest.approx(logged(full, "nll"), rel=0.02)


@pytest.mark.parametrize("level", LEVELS)
def test_evaluation_is_the_exact_objective_and_leaves_the_state_alone(tmp_path, level):
    held_out = [row | {"index": 100 - k} for k, row in enumerate(pairs(40)[24:])]
    run = trainer_of(tmp_path, "CVaRDRO", level=level, eval_dataset={"held": held_out}, alpha=0.25)
    run.args.per_device_eval_batch_size = 16
    run.train()
    state = {name: value.clone() for name, value in run.objective.state_dict().items()}
    found = run.evaluate()
    assert_equal(dict(run.objective.state_dict()), state)
    rows = run._prepare(held_out)
    own, other = token_losses(run.model, rows), token_losses(tiny_model(), rows)
    gaps = [
        a - b if level == "token" else (a - b).mean()[None] for a, b in zip(own, other, strict=True)
    ]
    flat = torch.cat(gaps)
    assert flat.numel() == 16 or level == "token"
    expected = run.objective.exact(flat)
    assert found["eval_held_loss"] == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    assert found["eval_held_nll"] == pytest.approx(torch.cat(own).mean().item(), rel=1e-5)
    assert found["eval_held_rho_loss"] == pytest.approx(flat.mean().item(), rel=1e-4, abs=1e-5)
    assert (tmp_path / "reference_losses-eval-held.safetensors").is_file()
    run.args.per_device_eval_batch_size = 5  # batches of unequal numbers of tokens
    again = run.evaluate()
    for name in ("eval_held_nll", "eval_held_rho_loss"):
        assert again[name] == pytest.approx(found[name], rel=1e-5, abs=1e-6)


def test_new_rows_cannot_be_evaluated_once_the_reference_is_gone(tmp_path, reference):
    run = trainer_of(tmp_path / "own", max_steps=1)
    before = run.evaluate(pairs(4))
    run.train()
    with pytest.raises(ValueError, match=r"not in a file.* pass evaluation rows when the trainer"):
        run.evaluate(pairs(4))
    named = trainer_of(tmp_path / "named", max_steps=1, reference_model=reference)
    named.train()
    assert named.evaluate(pairs(4))["eval_loss"] != before["eval_loss"]
    free = trainer_of(tmp_path / "free", max_steps=1, use_reference=False)
    free.train()
    assert "eval_rho_loss" not in free.evaluate(pairs(4))
