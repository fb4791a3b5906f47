"""ClassificationTrainer and ContrastiveTrainer: layout, resume, evaluation, refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback, default_data_collator

from llm_xrisk.data import DualSampler
from llm_xrisk.evaluation import ranking_metrics
from llm_xrisk.objectives import AveragePrecision, GlobalContrastive
from tests.trainers import rows_of

Build = Callable[..., Any]
DROPOUT = 0.2


class Gradient(TrainerCallback):
    """Keeps the gradient that the optimizer is about to use."""

    value: Tensor

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = kwargs["model"].parameters()
        self.value = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).clone()


def step(build: Build, folder: Path, micro: int, **changes: Any) -> tuple[Tensor, float]:
    """Gradient and loss of one step of eight rows in micro-batches of ``micro``."""
    gradient = Gradient()
    batches = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 8 // micro}
    trainer = build(folder, callbacks=[gradient], max_steps=1, **batches, **changes)
    trainer.train()
    return gradient.value, trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize(
    ("build", "changes"),
    [
        (rows_of.classification_trainer, {"objective": "AveragePrecision"}),
        (rows_of.classification_trainer, {"objective": "OPAUCSoft", "tau": 0.3}),
        (rows_of.contrastive_trainer, {"objective": "GlobalContrastive"}),
    ],
)
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_do_not_matter(
    build: Build, changes: dict[str, Any], micro: int, tmp_path: Path
) -> None:
    whole, loss = step(build, tmp_path / "whole", 8, **changes)
    parts, value = step(build, tmp_path / "parts", micro, **changes)
    assert torch.cosine_similarity(parts, whole, dim=0) > 1 - 1e-6
    assert parts.norm() == pytest.approx(float(whole.norm()), rel=1e-4)
    assert value == pytest.approx(loss, abs=1e-6)


def test_the_objective_applied_to_each_micro_batch_would_have_another_gradient(
    tmp_path: Path,
) -> None:
    whole, _ = step(rows_of.contrastive_trainer, tmp_path, 8)
    model, rows = rows_of.encoder(), rows_of.views()[:8]
    trainer = rows_of.contrastive_trainer(tmp_path, model=model)
    loader = trainer.get_train_dataloader()
    batches = [trainer._prepare_inputs(b) for b, _ in zip(loader, range(2), strict=False)]
    objective = GlobalContrastive(len(rows_of.views()))
    for batch in batches:
        scored = trainer.row_scores(model, batch)
        (objective(**scored, index=batch["index"]).loss / 2).backward()
    apart = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert len(rows) == 8
    assert torch.cosine_similarity(apart, whole, dim=0) < 0.999


@pytest.mark.parametrize(
    ("build", "model"),
    [
        (rows_of.classification_trainer, rows_of.classifier),
        (rows_of.contrastive_trainer, rows_of.encoder),
    ],
)
def test_dropout_is_the_same_in_both_passes(build: Build, model: Any, tmp_path: Path) -> None:
    """The gradient sent back equals that of the loss of all rows under the masks drawn."""
    gradient = Gradient()
    net = model(dropout=DROPOUT)
    trainer = build(tmp_path, model=net, callbacks=[gradient], max_steps=1)
    seen: list[Any] = []
    original = trainer.get_batch_samples

    def spy(*args: Any) -> Any:
        batches, count = original(*args)
        seen.extend(batches)
        return batches, count

    trainer.get_batch_samples = spy
    trainer.train()
    again = model(dropout=DROPOUT).train()
    rows: dict[str, list[Tensor]] = {}
    for batch in seen:
        with trainer._randomness(batch):
            for name, value in trainer.row_scores(again, batch).items():
                rows.setdefault(name, []).append(value)
    given = {name: torch.cat(parts) for name, parts in rows.items()}
    if "targets" not in given:
        given["targets"] = torch.cat([batch["targets"] for batch in seen])
    kind = type(trainer.objective)
    loss = kind(24)(**given, index=torch.cat([batch["index"] for batch in seen])).loss
    loss.backward()
    want = torch.cat([p.grad.flatten() for p in again.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient.value, want, rtol=1e-4, atol=1e-7)


def test_what_the_objective_learns_resumes_bit_equal_and_forgets_old_gradients(
    tmp_path: Path,
) -> None:
    seen: list[Any] = []

    class Old(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(trainer.objective.a.grad)

    changes = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "objective": "AUCMargin"}
    trainer = rows_of.classification_trainer(tmp_path, **changes)
    trainer.train()
    other = rows_of.classification_trainer(tmp_path, **changes)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for name, value in trainer.objective.state_dict().items():
        assert torch.equal(other.objective.state_dict()[name], value), name
    watched = trainer.objective.a.detach().clone()
    trainer = rows_of.classification_trainer(tmp_path / "new", callbacks=[Old()], **changes)
    gradients: list[float] = []
    original = trainer.get_batch_samples

    def spy(*args: Any) -> Any:
        found = original(*args)
        gradients.append(0.0 if trainer.objective.a.grad is None else 1.0)
        return found

    trainer.get_batch_samples = spy
    trainer.train()
    assert not any(gradients)  # Trainer zeroes those of the model alone
    assert torch.equal(trainer.objective.a.detach(), watched)


def test_rows_are_scored_in_train_mode_also_after_an_evaluation(tmp_path: Path) -> None:
    modes: list[bool] = []
    trainer = rows_of.classification_trainer(
        tmp_path,
        model=rows_of.classifier(DROPOUT),
        eval_dataset=rows_of.sentences(seed=5),
        eval_strategy="steps",
        eval_steps=1,
    )
    original = trainer.row_scores

    def spy(model: Any, batch: Any) -> Any:
        if "seed" in batch:
            modes.append(model.training)
        return original(model, batch)

    trainer.row_scores = spy
    trainer.train()
    assert len(modes) == 16
    assert all(modes)


@pytest.mark.parametrize("build", [rows_of.classification_trainer, rows_of.contrastive_trainer])
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_resume_is_bit_equal(build: Build, optim: str, tmp_path: Path) -> None:
    changes = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "optim": optim}
    make = {rows_of.classification_trainer: rows_of.classifier}.get(build, rows_of.encoder)
    whole = build(tmp_path, model=make(DROPOUT), learning_rate=0.01, **changes)
    whole.train()
    resumed = build(tmp_path, model=make(DROPOUT), learning_rate=0.01, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    for name, value in whole.objective.state_dict().items():
        assert torch.equal(resumed.objective.state_dict()[name], value), name


def test_an_adapter_trains_and_resumes_bit_equal(tmp_path: Path) -> None:
    lora = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "peft_config": lora}
    whole = rows_of.classification_trainer(tmp_path, **changes)
    frozen = {n: v.clone() for n, v in whole.model.named_parameters() if not v.requires_grad}
    whole.train()
    resumed = rows_of.classification_trainer(tmp_path, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    moved = dict(resumed.model.named_parameters())
    assert all(torch.equal(moved[name], value) for name, value in frozen.items())
    for name, value in whole.model.named_parameters():
        assert torch.equal(moved[name], value), name
    assert any("lora_B" in name and value.any() for name, value in moved.items())


def test_a_resumed_run_honours_a_new_length_and_step_size(tmp_path: Path) -> None:
    first = rows_of.classification_trainer(
        tmp_path, max_steps=3, save_strategy="steps", save_steps=3
    )
    first.train()
    longer = rows_of.classification_trainer(tmp_path, max_steps=5)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert longer.state.global_step == 5
    assert longer.objective.stats()["inner/visited"] >= first.objective.stats()["inner/visited"]


def test_a_sampler_resumes_where_it_was(tmp_path: Path) -> None:
    changes = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5, "sampling_rate": 0.5}
    whole = rows_of.classification_trainer(tmp_path, **changes)
    whole.train()
    resumed = rows_of.classification_trainer(tmp_path, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_every_batch_of_a_sampling_rate_has_its_positives(tmp_path: Path) -> None:
    trainer = rows_of.classification_trainer(tmp_path, sampling_rate=0.5)
    batches = list(trainer.get_train_dataloader())
    assert len(batches) > 2
    assert all(batch["labels"].sum() == 2 and len(batch["labels"]) == 4 for batch in batches)
    own = DualSampler([row["labels"] for row in rows_of.sentences()], batch_size=4, num_pos=1)
    given = rows_of.classification_trainer(tmp_path, batch_sampler=own)
    assert all(batch["labels"].sum() == 1 for batch in given.get_train_dataloader())


def test_training_ranks_positives_first(tmp_path: Path) -> None:
    trainer = rows_of.classification_trainer(
        tmp_path,
        eval_dataset=rows_of.sentences(seed=5),
        compute_metrics=ranking_metrics,
        optim="adamw_torch",
        learning_rate=3e-3,
        max_steps=40,
        sampling_rate=0.5,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_auroc"] > max(0.95, before["eval_auroc"])
    assert after["eval_loss"] < before["eval_loss"]
    rows = trainer.predict(rows_of.sentences(seed=5))
    objective = AveragePrecision(24)
    want = objective.exact(torch.tensor(rows.predictions), torch.tensor(rows.label_ids))
    assert after["eval_loss"] == pytest.approx(float(want), abs=1e-6)


def test_several_labels_are_trained_together(tmp_path: Path) -> None:
    model = rows_of.classifier(labels=3, problem_type="multi_label_classification")
    rows = rows_of.sentences(labels=3)
    trainer = rows_of.classification_trainer(
        tmp_path, model=model, rows=rows, objective="OPAUCSoft", compute_metrics=ranking_metrics
    )
    assert trainer.objective.num_labels == 3
    trainer.train()
    assert trainer.objective.stats()["inner/visited"] > 0
    assert 0 <= trainer.evaluate(rows)["eval_tpauc"] <= 1


def test_clip_trains_both_modalities_and_its_temperatures(tmp_path: Path) -> None:
    for temperature in ("constant", "global", "individual"):
        trainer = rows_of.contrastive_trainer(
            tmp_path / temperature,
            model=rows_of.clip(),
            rows=rows_of.captions(),
            data_collator=default_data_collator,
            objective="GlobalCLIP",
            temperature=temperature,
            rho=None if temperature == "constant" else 0.1,
            tau=0.1,
        )
        before = {k: v.clone() for k, v in trainer.objective.state_dict().items()}
        trainer.train()
        after = trainer.objective.state_dict()
        moved = {k for k, v in after.items() if not torch.equal(v, before[k])}
        assert any(k.startswith("inner") for k in moved)
        assert any("tau" in k for k in moved) == (temperature != "constant")


def test_what_the_objective_learns_has_the_same_gradient_in_any_layout(tmp_path: Path) -> None:
    values = []
    for micro in (8, 2):
        trainer = rows_of.contrastive_trainer(
            tmp_path / str(micro),
            model=rows_of.clip(),
            rows=rows_of.captions(),
            data_collator=default_data_collator,
            objective="GlobalCLIP",
            temperature="global",
            max_steps=2,
            objective_lr=0.5,
            tau=0.07,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=8 // micro,
        )
        trainer.train()
        values.append(float(trainer.objective.image_tau.logit_scale.detach()))
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert values[0] != pytest.approx(-float(torch.tensor(0.07).log()), rel=1e-3)


def test_the_card_names_the_objective_and_its_settings(tmp_path: Path) -> None:
    trainer = rows_of.classification_trainer(tmp_path, objective="OPAUCSoft", tau=0.3)
    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "OPAUCSoft" in card
    assert "0.3" in card
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bert"


def bare(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in names} for row in rows]


@pytest.mark.parametrize(
    ("build", "changes", "message"),
    [
        ("classification", {"rows": bare(rows_of.sentences(), "index")}, r"with_index\(dataset\)"),
        ("classification", {"objective": "AUC"}, "objective must be one of .*got 'AUC'"),
        (
            "classification",
            {"objective_kwargs": {"taus": 1}},
            r"AveragePrecision has no \['taus'\]",
        ),
        ("classification", {"objective": "KLDRO"}, "must be one of .*'PairwiseAUC'.*got 'KLDRO'"),
        ("classification", {"objective_kwargs": "[1]"}, r"must be a JSON object, got '\[1\]'"),
        ("contrastive", {"objective": "OPAUC"}, "must be one of .*'GlobalCLIP'.*got 'OPAUC'"),
        ("contrastive", {"rho": 0.3}, "got rho=0.3 and a constant temperature"),
        ("contrastive", {"temperature": "warm"}, "constant, global or individual, got 'warm'"),
        ("contrastive", {"temperature": "global"}, "with GlobalContrastive; learned temperatures"),
        ("contrastive", {"rows": bare(rows_of.views(), "index")}, r"with_index\(dataset\)"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(
    build: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make = {"classification": rows_of.classification_trainer}.get(
        build, rows_of.contrastive_trainer
    )
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **changes)


def test_logits_of_several_classes_are_refused(tmp_path: Path) -> None:
    trainer = rows_of.classification_trainer(tmp_path, model=rows_of.classifier(labels=3))
    with pytest.raises(ValueError, match=r"got logits \(4, 3\).*one or two logits"):
        trainer.train()
