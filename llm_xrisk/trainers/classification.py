"""Classifiers of transformers trained for AUC, average precision and their like."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from llm_xrisk.data import DualSampler
from llm_xrisk.fcco.arguments import shown
from llm_xrisk.objectives import Objective, SequenceObjective
from llm_xrisk.trainers.config import ClassificationConfig, require_config
from llm_xrisk.trainers.loading import load_model
from llm_xrisk.trainers.mixin import Batch
from llm_xrisk.trainers.rows import RowTrainer, model_inputs, require_model, require_rows

_MOST_PAIRS = 10**8  # of an exact objective: 400 MB a matrix


class ClassificationTrainer(RowTrainer):
    r"""Trains any classifier of transformers for what its ranking is judged by.

    Average precision, AUC, partial AUC, of one label or of several at once
    (:class:`~llm_xrisk.objectives.AveragePrecision` and its neighbours), where cross-entropy is
    blind to imbalance. A row's score is its logit: the only one, the second less the first of
    two, or each of L for L labels.

    Args:
        model: Name of a sequence classifier, or any model whose output has ``logits``.
        args: Settings; a :class:`ClassificationConfig`.
        objective: An objective; by default the one that ``args`` names.
        train_dataset: Rows as the model takes them, with ``label`` or ``labels`` (0 and 1; a
            list for several labels) and ``index`` (:func:`llm_xrisk.data.with_index`).
        eval_dataset: The same; needs no index.
        batch_sampler: Draws the rows of each batch of this process; by default a
            :class:`~llm_xrisk.data.DualSampler` where ``args.sampling_rate`` is set.
        peft_config: Adapter to put on the model.
        **kwargs: For ``transformers.Trainer``: processing_class, data_collator, compute_metrics
            (its predictions are the scores: :func:`llm_xrisk.evaluation.ranking_metrics`), ...

    Raises:
        TypeError: a model, rows, a sampler or an objective of another kind.
        ValueError: rows without an index or a label, targets other than 0 and 1, logits the
            objective cannot rank, or settings of another trainer.

    Example:
        In short::

            args = ClassificationConfig(output_dir="out", objective="AveragePrecision",
                                        sampling_rate=0.25, objective_kwargs={"prior": 0.02})
            trainer = ClassificationTrainer("roberta-base", args, train_dataset=with_index(data))
            trainer.train()

    Metrics: those of the objective. ``eval_loss`` is the objective of the whole evaluation set
    where its pairs fit into memory (1e8 of them), else the mean over its batches.
    """

    _tag_names = ("llm-xrisk", "x-risk-optimization")
    _method = "X-risk optimization of a classifier, objective {objective}"
    _source = "[arXiv 2206.00439](https://arxiv.org/abs/2206.00439)"

    def __init__(
        self,
        model: str | nn.Module,
        args: ClassificationConfig | None = None,
        *,
        objective: Any = None,
        train_dataset: Any = None,
        batch_sampler: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        args = args or ClassificationConfig(output_dir="classification-output")
        require_config(args, ClassificationConfig)
        require_model(model)
        if train_dataset is not None:
            require_rows(train_dataset)
            if kwargs.get("data_collator") is None:
                _require_labels(train_dataset)
        classifier = load_model(
            model, args.model_init_kwargs, peft_config, auto=AutoModelForSequenceClassification
        )
        self._labels = _several_labels(classifier)
        if self._labels is not None and args.sampling_rate is not None:
            raise ValueError(
                "sampling_rate is for one label, and this model has several; pass "
                "batch_sampler=llm_xrisk.data.TriSampler(...)"
            )
        if batch_sampler is not None and args.sampling_rate is not None:
            raise ValueError("got both a batch_sampler and sampling_rate; drop one of them")
        if args.sampling_rate is not None and train_dataset is not None:
            batch_sampler = DualSampler(
                _labels(train_dataset),
                batch_size=args.per_device_train_batch_size * args.world_size,
                sampling_rate=args.sampling_rate,
                num_replicas=args.world_size,
                rank=args.process_index,
                seed=args.seed if args.data_seed is None else args.data_seed,
            )
        super().__init__(
            classifier,
            args,
            objective=objective,
            train_dataset=train_dataset,
            batch_sampler=batch_sampler,
            **kwargs,
        )

    @staticmethod
    def takes(kind: type[Objective]) -> bool:
        """Objectives of labels."""
        return kind.binary_targets and not issubclass(kind, SequenceObjective)

    def own_settings(self) -> dict[str, Any]:
        """Several labels, where the model says that it has them."""
        return {} if self._labels is None else {"num_labels": self._labels}

    def row_columns(self) -> list[str]:
        """Columns that are not the model's and stay in the data; a model need not take labels."""
        return [*super().row_columns(), "label", "labels"]

    def row_scores(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The score of each row, or the scores of its labels."""
        return {"scores": self._ranked(model(**model_inputs(batch)))}

    def _ranked(self, output: Any) -> Tensor:
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"got {shown(output)} from the model, without logits; it must be a classifier, or "
                "return transformers.modeling_outputs.SequenceClassifierOutput(logits=...)"
            )
        labels, columns = self.objective.num_labels, logits.shape[-1]
        if labels is not None and columns == labels:
            return logits
        if labels is None and logits.dim() == 2 and columns <= 2:
            return logits[:, 1] - logits[:, 0] if columns == 2 else logits[:, 0]
        raise ValueError(
            f"got logits {tuple(logits.shape)} and an objective of num_labels={labels}; it ranks "
            "one score a row (a model of one or two logits), or one for each of L labels (a model "
            'with problem_type="multi_label_classification" and num_labels=L)'
        )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, with the objective of all rows together where that fits into memory."""
        kwargs["prediction_loss_only"] = False
        output = super().evaluation_loop(*args, **kwargs)
        scores, targets = output.predictions, output.label_ids
        prefix = kwargs.get("metric_key_prefix", "eval")
        if scores is None or targets is None:
            return output
        if (targets > 0).sum() * len(targets) <= _MOST_PAIRS:
            rows = {"scores": torch.from_numpy(scores), "targets": torch.from_numpy(targets)}
            loss = self.exact(**{name: t.to(self.args.device) for name, t in rows.items()})
            output.metrics[f"{prefix}_loss"] = float(loss)
        return output


def _several_labels(model: Any) -> int | None:
    """How many labels a model says it has for each row; None where there is one."""
    config = getattr(model, "config", None)
    several = getattr(config, "problem_type", None) == "multi_label_classification"
    return config.num_labels if config is not None and several else None


def _require_labels(rows: Any) -> None:
    """Refuse rows that are no dictionaries with a label."""
    row = rows[0]
    names = sorted(row) if isinstance(row, Mapping) else None
    if names is None or not {"label", "labels", "label_ids"} & set(names):
        raise ValueError(
            f"a row is {shown(row) if names is None else names} and has no label; rows must be "
            "dictionaries of the model's inputs and 'label' or 'labels': rename the column, or "
            "pass a data_collator that gives labels"
        )


def _labels(rows: Any) -> Any:
    """What a sampler reads labels from: the data set, or the labels of a list of rows."""
    if not isinstance(rows, list) or "labels" not in rows[0]:
        return rows
    return [row["labels"] for row in rows]
