"""What the trainers of plain rows share: an objective by name, sampled batches, any model."""

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from llm_xrisk.fcco import cosine
from llm_xrisk.objectives import OBJECTIVES, Objective
from llm_xrisk.trainers.config import RowConfig
from llm_xrisk.trainers.loading import disable_dropout
from llm_xrisk.trainers.mixin import Batch, ScoreWeighBackprop

_NOT_FOR_THE_MODEL = frozenset(
    (
        *("targets", "index", "query", "row_scores"),
        *("coefficients", "own_coefficients", "loss_value", "share", "seed"),
    )
)


class RowTrainer(ScoreWeighBackprop, Trainer):
    """Trains a model of rows (a text, an image, a pair of views) by an objective of the registry.

    Where a mini-batch is more than one micro-batch its rows are scored first, in train mode, and
    the backward pass draws the same random numbers again: dropout stays what it is, and the
    gradient is that of the whole mini-batch. Batch normalisation sees micro-batches, as ever.

    Args:
        model: A loaded model.
        args: Settings.
        objective: An objective; by default the one that ``args`` names.
        train_dataset: Rows, numbered by :func:`llm_xrisk.data.with_index` where the objective
            keeps a state for each.
        batch_sampler: Draws the row numbers of each batch of this process (see
            :mod:`llm_xrisk.data.samplers`); by default rows come shuffled.
        **kwargs: For ``transformers.Trainer``.

    Raises:
        ValueError: rows without an index that the objective needs, or an objective by a name or
            with settings it does not have.
    """

    replays_randomness = True
    args: RowConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    train_dataset: Any

    def __init__(
        self,
        model: nn.Module,
        args: RowConfig,
        *,
        objective: Objective | None = None,
        train_dataset: Any = None,
        batch_sampler: Any = None,
        **kwargs: Any,
    ) -> None:
        if args.disable_dropout:
            disable_dropout(model)
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        self._batch_sampler = batch_sampler
        if objective is None:
            self._require(OBJECTIVES.get(args.objective), args.objective)
            objective = named_objective(args, len(train_dataset or [0]), **self.own_settings())
        self._require(type(objective), type(objective).__name__)
        if train_dataset is not None and objective.num_samples is not None:
            require_index_column(train_dataset, type(objective).__name__)
        self.setup_objective(objective)

    @staticmethod
    def takes(kind: type[Objective]) -> bool:
        """Whether this trainer has the rows that objectives of this kind need."""
        return True

    def _require(self, kind: type[Objective] | None, name: str) -> None:
        if kind is None or not self.takes(kind):
            known = sorted(n for n, k in OBJECTIVES.items() if self.takes(k))
            raise ValueError(
                f"objective must be one of {known} in {type(self).__name__}, got {name!r}; use "
                "others in a loop of your own"
            )

    def own_settings(self) -> dict[str, Any]:
        """Settings of the objective that follow from the model or the data."""
        return {}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer`` does, with a group of what the objective learns itself.

        Raises:
            ValueError: the objective learns and the optimizer belongs to DeepSpeed or FSDP.
        """
        given = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        own = self._own_parameters()
        if not own or given or optimizer is None:
            return optimizer
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                f"{type(self.objective).__name__} has parameters of its own, outside the model "
                "that DeepSpeed or FSDP shards; train with data parallelism, or with an objective "
                "whose state is in buffers"
            )
        optimizer.add_param_group(
            {"params": own, "lr": self.args.objective_lr, "weight_decay": 0.0}
        )
        return optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step; ``Trainer`` zeroes the gradients of the model alone."""
        for weight in self._own_parameters():
            weight.grad = None
        return super().get_batch_samples(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """A loader of sampled batches, if there is a sampler."""
        if self._batch_sampler is None:
            return super().get_train_dataloader()
        rows: Any = self.train_dataset
        collator = self.data_collator
        if hasattr(rows, "column_names"):
            rows = self._remove_unused_columns(rows, description="training")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="training")
        return DataLoader(
            rows,
            batch_sampler=self._batch_sampler,  # ranks share its batches: accelerate must not
            collate_fn=collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The exact objective of an evaluation batch, without state, and its scores and targets."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            rows = self.row_scores(model, inputs)
        given = {name: inputs[name] for name in ("targets", "query") if name in inputs} | rows
        known = "targets" in given
        loss = self.exact(**given) if known else None
        if prediction_loss_only:
            return loss, None, None
        return loss, rows["scores"].float(), given["targets"] if known else None

    @torch.no_grad()
    def exact(self, **rows: Tensor) -> Tensor:
        """The objective of all given rows, each its own sample."""
        self.objective.eval()  # ids are those of another data set
        taken = inspect.signature(self.objective.exact).parameters
        count = len(rows["scores"])
        rows = {"index": torch.arange(count, device=rows["scores"].device)} | rows
        with torch.autocast(self.args.device.type, enabled=False):
            return self.objective.exact(**{k: v for k, v in rows.items() if k in taken})

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known: Any = self._signature_columns
        known += [name for name in self.row_columns() if name not in known]

    def row_columns(self) -> list[str]:
        """Columns that are not the model's and stay in the data."""
        return ["index", "query"]

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Move to the device; what transformers calls labels are the objective's targets."""
        inputs = dict(super()._prepare_inputs(inputs))
        if "labels" in inputs:
            inputs["targets"] = inputs.pop("labels")
        return inputs


def model_inputs(batch: Batch) -> Batch:
    """What of a batch is the model's."""
    return {name: value for name, value in batch.items() if name not in _NOT_FOR_THE_MODEL}


def named_objective(args: RowConfig, num_samples: int, **settings: Any) -> Objective:
    """Build the objective that the settings name.

    Raises:
        ValueError: a setting the objective does not have, or one given twice.
    """
    kind = OBJECTIVES[args.objective]
    taken = inspect.signature(kind).parameters
    chosen = json_kwargs(args)
    chosen |= {k: v for k, v in (("gamma", args.gamma), ("tau", args.tau)) if v is not None}
    if args.gamma_decay_epochs:
        floor = chosen.get("gamma", taken["gamma"].default if "gamma" in taken else 1.0)
        chosen["gamma"] = cosine(floor, args.gamma_decay_epochs)
    clash = sorted(set(settings) & set(json_kwargs(args)))
    if clash:
        raise ValueError(
            f"got objective_kwargs with {clash}, which other settings choose; drop one"
        )
    unknown = sorted(set(chosen) - set(taken))
    if unknown:
        raise ValueError(
            f"{args.objective} has no {unknown}; it takes {sorted(taken)} (gamma and tau by their "
            "own settings, the rest as objective_kwargs)"
        )
    given = {"num_samples": num_samples} | chosen | settings
    return kind(**{name: value for name, value in given.items() if name in taken})


def json_kwargs(args: RowConfig) -> dict[str, Any]:
    """The further settings of the objective.

    Raises:
        ValueError: what is no JSON object.
    """
    given: Any = args.objective_kwargs or {}
    try:
        return dict(json.loads(given) if isinstance(given, str) else given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"objective_kwargs must be a JSON object, got {given!r}") from error


def require_index_column(rows: Any, objective: str) -> None:
    """Refuse rows that nobody numbered.

    Raises:
        ValueError: with the way to number them.
    """
    row = rows[0]
    if not (isinstance(row, Mapping) and "index" in row):
        raise ValueError(
            f"{objective} keeps a value for each row, and the data set has no column 'index'; "
            "number the rows with llm_xrisk.data.with_index(dataset)"
        )
