"""ContrastiveTrainer with a reference model's features, and with networks for temperatures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import default_data_collator

from llm_xrisk.objectives import GlobalCLIP, TemperatureNetwork
from llm_xrisk.trainers import ContrastiveConfig, ContrastiveTrainer
from tests.trainers import rows_of
from tests.trainers.build import COMMON

COUNT = 16
KNOWN = torch.randn(2, COUNT, 5, generator=torch.Generator().manual_seed(3))
NAMES = ("ref_scores", "ref_targets")


def referring(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with a reference's features as two columns."""
    return [row | dict(zip(NAMES, KNOWN[:, row["index"]], strict=True)) for row in rows]


def first_loss(folder: Path, rows: Any, micro: int = 8, use: bool = True, **changes: Any) -> Any:
    """The weights after one step of eight rows, and its loss."""
    trainer = rows_of.contrastive_trainer(
        folder,
        rows=rows,
        objective="GlobalCLIP",
        objective_kwargs={"use_reference": use},
        tau=0.05,
        max_steps=1,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=8 // micro,
        **changes,
    )
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return weights, trainer.state.log_history[0]


def test_columns_of_a_reference_reach_the_objective_in_any_layout(tmp_path: Path) -> None:
    rows = rows_of.views(COUNT)
    whole, logged = first_loss(tmp_path / "whole", referring(rows))
    parts, again = first_loss(tmp_path / "parts", referring(rows), micro=2)
    plain, without = first_loss(tmp_path / "plain", rows, use=False)
    assert logged["loss"] == pytest.approx(again["loss"], abs=1e-6)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    assert abs(logged["loss"] - without["loss"]) > 0.01
    assert not torch.allclose(plain, whole, rtol=1e-4, atol=1e-6)
    assert "similarity/reference" in logged and "similarity/reference" not in without


def test_the_loss_is_that_of_the_features_of_the_samples_in_the_batch(tmp_path: Path) -> None:
    rows, model = rows_of.views(8), rows_of.encoder()
    _, logged = first_loss(tmp_path, referring(rows), model=model, learning_rate=0.0)
    trainer = rows_of.contrastive_trainer(tmp_path, model=model, rows=rows)
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    scored = trainer.row_scores(model.eval(), batch)
    objective = GlobalCLIP(8, 1.0, 0.05, use_reference=True)
    known = dict(zip(NAMES, KNOWN[:, :8], strict=True))
    want = objective.exact(**scored, index=torch.arange(8), **known)
    assert logged["loss"] == pytest.approx(float(want.detach()), abs=1e-5)


def test_columns_that_the_objective_does_not_ask_for_are_left_out(tmp_path: Path) -> None:
    rows = rows_of.views(COUNT)
    got, _ = first_loss(tmp_path / "with", referring(rows), use=False)
    want, _ = first_loss(tmp_path / "without", rows, use=False)
    assert torch.equal(got, want)


def test_a_missing_column_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs ref_scores and ref_targets, got neither; compute"):
        first_loss(tmp_path, rows_of.views(COUNT))


@pytest.mark.parametrize("named", [False, True], ids=["rows", "Dataset"])
def test_a_model_of_two_modalities_trains_against_a_reference(tmp_path: Path, named: bool) -> None:
    rows: Any = referring(rows_of.captions(12))
    if named:
        lists = [{k: v.tolist() if hasattr(v, "tolist") else v for k, v in r.items()} for r in rows]
        rows = Dataset.from_list(lists)
    _, logged = first_loss(
        tmp_path,
        rows,
        micro=4,
        model=rows_of.clip(),
        data_collator=default_data_collator,
        eval_dataset=rows_of.captions(12),
        eval_strategy="steps",
        eval_steps=1,
    )
    assert "similarity/reference" in logged


def networks(folder: Path, micro: int = 8, **changes: Any) -> ContrastiveTrainer:
    """CLIP-TempNet with dropout, eight rows a step."""
    sides = [
        TemperatureNetwork(8, rho=0.5, lower=0.05, upper=1.0, num_prototypes=5, seed=k)
        for k in range(2)
    ]
    settings = COMMON | {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": 8 // micro,
        "objective_lr": 0.5,
        "objective": "GlobalCLIP",
    }
    return ContrastiveTrainer(
        rows_of.clip(),
        ContrastiveConfig(output_dir=str(folder), **(settings | changes)),
        objective=GlobalCLIP(12, tau=sides[0], text_tau=sides[1]),
        train_dataset=rows_of.captions(12),
        data_collator=default_data_collator,
    )


def test_networks_and_their_dropout_are_the_same_in_any_layout(tmp_path: Path) -> None:
    states = []
    for micro in (8, 2):
        trainer = networks(tmp_path / str(micro), micro, max_steps=3)
        trainer.train()
        states.append(dict(trainer.objective.state_dict()))
    assert states[0]["image_tau.steps"].item() == 3
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)
    start = networks(tmp_path / "start").objective.state_dict()
    for name in ("weight", "bias", "prototypes", "scaler", "pool", "offset"):
        for side in ("image", "text"):
            assert not torch.equal(states[0][f"{side}_tau.{name}"], start[f"{side}_tau.{name}"])


def test_networks_resume_bit_equal(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    trainer = networks(tmp_path, micro=4, **changes)
    trainer.train()
    other = networks(tmp_path, micro=4, **changes)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in trainer.objective.state_dict().items():
        assert torch.equal(other.objective.state_dict()[name], value), name
    for mine, whole in zip(other.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(mine, whole)
