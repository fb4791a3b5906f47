"""Encoders of transformers trained by global contrastive losses."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AutoModel

from llm_xrisk.data.views import ViewsCollator
from llm_xrisk.objectives import Objective
from llm_xrisk.objectives.similarities import ContrastiveObjective
from llm_xrisk.objectives.temperatures import GlobalTemperature, IndividualTemperature
from llm_xrisk.trainers.config import ContrastiveConfig, require_config
from llm_xrisk.trainers.loading import load_model
from llm_xrisk.trainers.mixin import Batch
from llm_xrisk.trainers.rows import RowTrainer, model_inputs, require_model, require_rows

Features = Callable[[Any, Batch], Tensor]
_REFERENCE = ("ref_scores", "ref_targets")


class ContrastiveTrainer(RowTrainer):
    r"""Trains encoders of transformers so that the two sides of a pair meet and others part.

    The losses are global (:class:`~llm_xrisk.objectives.GlobalContrastive` for two views of one
    modality, :class:`~llm_xrisk.objectives.GlobalCLIP` for two): every sample is contrasted with
    all data through its own tracked u, at any batch size. The features of a mini-batch are
    computed first and their gradient sent back micro-batch by micro-batch, so that the contrasted
    batch may be larger than memory would hold activations for.

    Args:
        model: Name or model. One whose output has ``image_embeds`` and ``text_embeds`` (CLIP)
            takes both sides in one call; any other encodes each side by itself.
        args: Settings; a :class:`ContrastiveConfig`.
        features: ``features(output, inputs) -> (B, d)`` of a side; by default the pooled output,
            or the mean of the last hidden states over the tokens that are attended to.
        objective: An objective; by default the one that ``args`` names.
        train_dataset: Rows ``first``, ``second`` (texts, arrays, or mappings of model inputs) for
            the default collator, or the inputs of a model of two modalities; and ``index``.
        eval_dataset: The same; needs no index, and no features of a reference.
        processing_class: Tokenizer, for texts.
        data_collator: Instead of :class:`~llm_xrisk.data.views.ViewsCollator`.
        peft_config: Adapter to put on the model.
        **kwargs: For ``transformers.Trainer``.

    Raises:
        ValueError: rows without an index, an output without features, or settings of another
            trainer.

    Example:
        In short::

            args = ContrastiveConfig(output_dir="out", objective="GlobalContrastive", tau=0.1)
            data = with_index([{"first": "two views", "second": "of a sentence"}, ...])
            ContrastiveTrainer("bert-base-uncased", args, train_dataset=data,
                               processing_class=tokenizer).train()

        DRRho-CLIP (6.121) takes a reference model's features as two columns, computed once::

            with torch.no_grad():
                known = reference(pixel_values=..., input_ids=...)
            data = data.add_column("ref_scores", known.image_embeds.tolist())
            data = data.add_column("ref_targets", known.text_embeds.tolist())
            args = ContrastiveConfig(output_dir="out", objective="GlobalCLIP", tau=0.01,
                                     objective_kwargs={"use_reference": True})

    Metrics: those of the objective. ``eval_loss`` is the mean over evaluation batches of the
    objective within the batch, without a reference.
    """

    _tag_names = ("llm-xrisk", "contrastive-learning")
    _method = "contrastive learning, objective {objective}"
    _source = "[arXiv 2202.12387](https://arxiv.org/abs/2202.12387)"
    args: ContrastiveConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        model: str | nn.Module,
        args: ContrastiveConfig | None = None,
        *,
        features: Features | None = None,
        objective: Any = None,
        train_dataset: Any = None,
        processing_class: Any = None,
        data_collator: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        args = args or ContrastiveConfig(output_dir="contrastive-output")
        require_config(args, ContrastiveConfig)
        require_model(model)
        if train_dataset is not None:
            require_rows(train_dataset)
        if features is not None and not callable(features):
            raise TypeError(
                f"features must be a function, features(output, inputs) -> (B, d), got {features!r}"
            )
        encoder = load_model(model, args.model_init_kwargs, peft_config, auto=AutoModel)
        name = getattr(encoder, "main_input_name", "input_ids")
        self._features = features or pooled
        self._num_samples = len(train_dataset or [0])
        super().__init__(
            encoder,
            args,
            objective=objective,
            train_dataset=train_dataset,
            processing_class=processing_class,
            data_collator=data_collator or ViewsCollator(processing_class, name),
            **kwargs,
        )
        if getattr(self.objective, "use_reference", False):
            self._row_columns += _REFERENCE

    @staticmethod
    def takes(kind: type[Objective]) -> bool:
        """Objectives of two matrices of features."""
        return issubclass(kind, ContrastiveObjective)

    def own_settings(self) -> dict[str, Any]:
        """The temperature modules that the settings name."""
        args, tau = self.args, 0.03 if self.args.tau is None else self.args.tau
        rho = 6.5 if args.rho is None else args.rho
        if args.temperature == "global":
            return {"tau": GlobalTemperature(tau, rho)}
        if args.temperature == "individual":
            sides = [
                IndividualTemperature(self._num_samples, tau, rho, lower=0.01, upper=1.0)
                for _ in range(2)
            ]
            return {"tau": sides[0], "text_tau": sides[1]}
        return {} if args.rho is None else {"rho": args.rho}

    def row_columns(self) -> list[str]:
        """Columns that are not the model's and stay in the data."""
        return [*super().row_columns(), "first", "second", *_REFERENCE]

    def row_scores(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The features of both sides."""
        if "first" in batch:
            first, second = (
                self._features(model(**batch[side]), batch[side]) for side in ("first", "second")
            )
            for side in (first, second):
                _require_features(side)
            return {"scores": first, "targets": second}
        inputs = {k: v for k, v in model_inputs(batch).items() if k not in _REFERENCE}
        output = model(**inputs)
        first, second = (getattr(output, f"{side}_embeds", None) for side in ("image", "text"))
        if first is None or second is None:
            raise ValueError(
                f"got a batch of {sorted(inputs)} and an output of {sorted(output)}; give rows "
                "the columns first and second, or a model of two modalities (image_embeds, "
                "text_embeds)"
            )
        return {"scores": first, "targets": second}


def _require_features(rows: Any) -> None:
    """Refuse features that are no (B, d)."""
    if not isinstance(rows, Tensor) or rows.dim() < 2:
        got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(
            f"got features {got} of a side and needs a tensor (B, d); let the model return more "
            "than one number a row, or pass features=lambda output, inputs: ..."
        )


def pooled(output: Any, inputs: Batch) -> Tensor:
    """The features (B, d) of a side: pooled, or the mean over the tokens that are attended to.

    Raises:
        ValueError: an output without either.
    """
    if isinstance(output, Tensor):
        _require_features(output)
        return output.flatten(1)
    known = getattr(output, "pooler_output", None)
    if known is not None:
        return known.flatten(1)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise ValueError(
            f"got an output of {sorted(output)}, which has neither pooler_output nor "
            "last_hidden_state; pass features=lambda output, inputs: ..."
        )
    mask = inputs.get("attention_mask")
    if mask is None:
        return hidden.flatten(2).mean(2) if hidden.dim() == 4 else hidden.mean(1)
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
