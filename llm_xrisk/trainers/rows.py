"""What the trainers of plain rows share: an objective by name, sampled batches, any model."""

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from transformers import Trainer

from llm_xrisk.data.sampler_base import PlannedBatchSampler
from llm_xrisk.fcco import cosine
from llm_xrisk.fcco.arguments import shown
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
        TypeError: rows, a sampler or an objective of another kind.
        ValueError: rows without an index that the objective needs, an objective by a name or
            with settings it does not have, a sampler of other rows or processes, or an optimizer
            that lacks what the objective learns.
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
        self._check_data(train_dataset, batch_sampler, args)
        if objective is not None:
            require_objective(objective, args)
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "got a compute_loss_func, which nothing would call: the objective is the loss; "
                "pass it as objective, or name it in the settings"
            )
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
        self._require_trained()

    @staticmethod
    def _check_data(train_dataset: Any, batch_sampler: Any, args: RowConfig) -> None:
        """Refuse data that are no rows, and a sampler that draws no batches of them."""
        if train_dataset is not None:
            require_rows(train_dataset)
        if batch_sampler is not None:
            require_batches(batch_sampler, train_dataset, args.world_size)

    def _require_trained(self) -> None:
        """Refuse an optimizer that leaves out what the objective learns itself."""
        groups = getattr(self.optimizer, "param_groups", None)
        if groups is None:  # the trainer will build one, with them
            return
        known = {id(p) for group in groups for p in group["params"]}
        if any(id(weight) not in known for weight in self._own_parameters()):
            raise ValueError(
                f"{type(self.objective).__name__} has parameters of its own, which the optimizer "
                "lacks; build the objective first, pass objective=..., and give the optimizer "
                '{"params": objective.parameters(), "weight_decay": 0.0} as a further group'
            )

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
    twice = sorted({"gamma", "tau"} & set(json_kwargs(args)) & set(args_given(args)))
    if twice:
        raise ValueError(f"got {twice} as a setting and in objective_kwargs; drop one of them")
    unknown = sorted(set(chosen) - set(taken))
    if unknown:
        raise ValueError(
            f"{args.objective} has no {unknown}; it takes {sorted(taken)} (gamma and tau by their "
            "own settings, the rest as objective_kwargs)"
        )
    given = {"num_samples": num_samples} | chosen | settings
    return kind(**{name: value for name, value in given.items() if name in taken})


def args_given(args: RowConfig) -> list[str]:
    """The settings of an objective that were chosen."""
    chosen = {name: getattr(args, name) for name in ("gamma", "tau", "objective_kwargs")}
    return [name for name, value in chosen.items() if value not in (None, {})]


def require_objective(objective: Any, args: RowConfig) -> None:
    """Refuse what is no objective, and settings that one which is built already would not have.

    Raises:
        TypeError: a name, a class, or anything else that is no objective.
        ValueError: settings of an objective beside an objective.
    """
    if not isinstance(objective, Objective):
        settings = type(args).__name__
        name = objective if isinstance(objective, str) else "AveragePrecision"
        todo = "OPAUCSoft(num_samples=len(train_dataset))"
        if isinstance(objective, type):
            todo = f"{objective.__name__}(...)"
        raise TypeError(
            f"got {shown(objective)} as objective; pass one that is built, {todo}, or its name in "
            f"the settings: {settings}(objective={name!r})"
        )
    given = args_given(args)
    if given:
        raise ValueError(
            f"got an objective and settings for one ({', '.join(given)}), which it would not have; "
            f"build it with them, {type(objective).__name__}(...), or drop objective="
        )


def require_model(model: Any) -> None:
    """Refuse what is neither a model nor a name of one.

    Raises:
        TypeError: with what to pass.
    """
    if not isinstance(model, nn.Module | str):
        raise TypeError(
            f"got {shown(model)} as model; pass a model, or the name or path of one on the hub or "
            "on disk"
        )


def require_rows(rows: Any) -> None:
    """Refuse what is no map-style data set with at least one row.

    Raises:
        TypeError: data without a length or random access, or whose rows have no numbers.
        ValueError: no rows.
    """
    odd = isinstance(rows, str | type | Mapping | Tensor | DataLoader | IterableDataset)
    if odd or not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise TypeError(
            f"got {shown(rows)} as train_dataset; it must be a map-style data set or a list, whose "
            "rows are dictionaries: of several splits pass one, of a loader its .dataset"
        )
    if len(rows) == 0:
        raise ValueError("got a train_dataset without rows; check how it was filtered")


def require_batches(sampler: Any, rows: Any, world_size: int) -> None:
    """Refuse what does not draw batches of row numbers, epoch after epoch, of these rows.

    Raises:
        TypeError: what draws no batches.
        ValueError: a sampler of another data set, or for another number of processes.
    """
    by_row = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)
    first = next(iter(sampler), None) if isinstance(sampler, list | tuple) else None
    if isinstance(sampler, (*by_row, DistributedSampler)) or isinstance(first, int):
        raise TypeError(
            f"got {shown(sampler)} as batch_sampler, which draws one row at a time; put it into "
            "torch.utils.data.BatchSampler(sampler, batch_size, drop_last=False)"
        )
    odd = isinstance(sampler, str | type | Mapping | DataLoader | Iterator)
    if odd or not hasattr(sampler, "__iter__"):
        raise TypeError(
            f"got {shown(sampler)} as batch_sampler; it must give lists of row numbers whenever "
            "it is iterated, as those of llm_xrisk.data do: DualSampler(labels, batch_size=...)"
        )
    if not isinstance(sampler, PlannedBatchSampler):
        return
    kind = type(sampler).__name__
    if rows is not None and sampler.num_samples != len(rows):
        raise ValueError(
            f"got a {kind} for {sampler.num_samples} rows and a train_dataset of {len(rows)}; "
            "build it from the labels of this very data set"
        )
    if sampler.num_replicas != world_size:
        raise ValueError(
            f"got a {kind} for num_replicas={sampler.num_replicas} on {world_size} processes; "
            "build it with num_replicas=args.world_size, rank=args.process_index"
        )


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
