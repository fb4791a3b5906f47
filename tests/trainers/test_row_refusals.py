"""Trainers of rows: a model, data, a sampler or an objective that is none is refused by name."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler
from transformers.modeling_outputs import SequenceClassifierOutput

from llm_xrisk.data import DualSampler
from llm_xrisk.objectives import AUCMargin, OPAUCSoft
from llm_xrisk.trainers import (
    ClassificationConfig,
    ClassificationTrainer,
    ContrastiveConfig,
    ContrastiveTrainer,
)
from tests.trainers import rows_of
from tests.trainers.build import COMMON

BATCHES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}


def trainer_of(folder: Path, *, contrastive: bool = False, **changes: Any) -> Any:
    """A trainer of tiny rows; ``settings`` are those of its arguments."""
    settings = COMMON | BATCHES | changes.pop("settings", {})
    if contrastive:
        given = {"model": rows_of.encoder(), "train_dataset": rows_of.views()} | changes
        return ContrastiveTrainer(args=ContrastiveConfig(str(folder), **settings), **given)
    given = {"model": rows_of.classifier(), "train_dataset": rows_of.sentences()} | changes
    return ClassificationTrainer(args=ClassificationConfig(str(folder), **settings), **given)


ROWS = rows_of.sentences()
LABELS = [row["labels"] for row in ROWS]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"objective": "OPAUCSoft"},
            TypeError,
            r"got 'OPAUCSoft' as objective; .* ClassificationConfig\(objective='OPAUCSoft'\)",
        ),
        ({"objective": OPAUCSoft}, TypeError, r"got the class OPAUCSoft .* is built, OPAUCSoft\("),
        (
            {"objective": torch.nn.BCEWithLogitsLoss()},
            TypeError,
            "got a BCEWithLogitsLoss as object",
        ),
        (
            {"objective": OPAUCSoft(24), "settings": {"tau": 0.5}},
            ValueError,
            r"settings for one \(tau\)",
        ),
        (
            {"settings": {"gamma": 0.5, "objective_kwargs": {"gamma": 0.3}}},
            ValueError,
            r"got \['gamma'\] as a setting and in objective_kwargs",
        ),
        ({"train_dataset": []}, ValueError, "got a train_dataset without rows"),
        (
            {"train_dataset": DataLoader(ROWS)},
            TypeError,
            "got a DataLoader as train_dataset; .*its .dataset",
        ),
        ({"train_dataset": iter(ROWS)}, TypeError, "must be a map-style data set or a list"),
        (
            {"train_dataset": {"train": ROWS}},
            TypeError,
            "got a dict of 1 as train_dataset; .* pass one",
        ),
        ({"train_dataset": torch.zeros(4, 8)}, TypeError, "got a float32 tensor"),
        (
            {"train_dataset": [{k: v for k, v in row.items() if k != "labels"} for row in ROWS]},
            ValueError,
            "'index', 'input_ids'] and has no label",
        ),
        (
            {"train_dataset": [tuple(row.values()) for row in ROWS]},
            ValueError,
            "a row is a tuple of 4 and",
        ),
        ({"batch_sampler": RandomSampler(ROWS)}, TypeError, r"BatchSampler\(sampler, batch_size"),
        ({"batch_sampler": list(range(24))}, TypeError, "draws one row at a time"),
        ({"batch_sampler": iter([[0, 1]])}, TypeError, "lists of row numbers whenever it is iter"),
        ({"batch_sampler": DualSampler}, TypeError, "got the class DualSampler as batch_sampler"),
        ({"batch_sampler": 4}, TypeError, "got 4 as batch_sampler"),
        (
            {"batch_sampler": DualSampler(LABELS[:12], batch_size=4)},
            ValueError,
            "a DualSampler for 12 rows and a train_dataset of 24",
        ),
        (
            {"batch_sampler": DualSampler(LABELS, batch_size=4, num_replicas=2)},
            ValueError,
            "num_replicas=2 on 1 processes; build it with num_replicas=args.world_size",
        ),
        ({"model": 5}, TypeError, "got 5 as model; pass a model, or the name"),
        ({"model": torch.nn.Linear}, TypeError, "got the class Linear as model"),
    ],
)
def test_what_is_no_model_data_sampler_or_objective_is_refused_by_name(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        trainer_of(tmp_path, **changes)


class Plain(torch.nn.Module):
    """A model without a config, which takes no labels, and whatever it makes of its scores."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.embedding, self.output = torch.nn.Embedding(40, 1), output

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.output(self.embedding(input_ids).mean(1))


def test_any_model_whose_output_has_logits_is_trained(tmp_path: Path) -> None:
    model = Plain(lambda scores: SequenceClassifierOutput(logits=scores))
    trainer = trainer_of(tmp_path, model=model)
    trainer.train()
    assert trainer.objective.stats()["inner/visited"] > 0


@pytest.mark.parametrize("output", [lambda s: s, lambda s: {"logits": s}, lambda s: (s,)])
def test_a_model_without_logits_is_refused_with_what_to_return(tmp_path: Path, output: Any) -> None:
    trainer = trainer_of(tmp_path, model=Plain(output))
    with pytest.raises(ValueError, match=r"from the model, without logits; .*ClassifierOutput\("):
        trainer.train()


def test_an_optimizer_without_what_the_objective_learns_is_refused(tmp_path: Path) -> None:
    model, objective = rows_of.classifier(), AUCMargin()
    without = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r'AUCMargin has .* lacks; .*"params": objective.param'):
        trainer_of(tmp_path, model=model, objective=objective, optimizers=(without, None))
    both = torch.optim.SGD([*model.parameters(), *objective.parameters()], lr=0.1)
    trainer = trainer_of(tmp_path, model=model, objective=objective, optimizers=(both, None))
    trainer.train()
    assert trainer.objective.stats()["started"] == 1.0


def test_a_loss_function_beside_the_objective_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got a compute_loss_func, which nothing would call"):
        trainer_of(tmp_path, compute_loss_func=lambda *given: 0.0)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (lambda output, inputs: None, "NoneType"),
        (lambda output, inputs: output[0][:, 0, 0], "(4,)"),
    ],
)
def test_what_is_no_matrix_of_features_is_refused(
    tmp_path: Path, features: Any, message: str
) -> None:
    trainer = trainer_of(tmp_path, contrastive=True, features=features)
    with pytest.raises(ValueError, match=re.escape(f"got features {message} of a side and needs")):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": "pooled"}, TypeError, "features must be a function, .* got 'pooled'"),
        (
            {"objective": "GlobalContrastive"},
            TypeError,
            r"ContrastiveConfig\(objective='GlobalContra",
        ),
        ({"train_dataset": []}, ValueError, "got a train_dataset without rows"),
        ({"batch_sampler": RandomSampler(ROWS)}, TypeError, "draws one row at a time"),
    ],
)
def test_what_is_no_part_of_contrastive_training_is_refused_by_name(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        trainer_of(tmp_path, contrastive=True, **changes)
