"""Discriminative fine-tuning as a trainer."""

from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer

from llm_xrisk.data.collators import DFTCollator, pad_rows
from llm_xrisk.data.dft_dataset import prepare_dft_dataset
from llm_xrisk.fcco import cosine, join
from llm_xrisk.objectives import OBJECTIVES
from llm_xrisk.objectives.dft import DFT
from llm_xrisk.rollout.engine import RolloutEngine, SamplingConfig, make_engine
from llm_xrisk.rollout.scoring import evaluation_mode
from llm_xrisk.rollout.weight_sync import unwrap_model
from llm_xrisk.trainers.callbacks import TrainBeginCallback, inert_weights
from llm_xrisk.trainers.checkpoint import save_tensors
from llm_xrisk.trainers.config import DFTConfig
from llm_xrisk.trainers.loading import disable_dropout, is_peft, load_model, load_tokenizer
from llm_xrisk.trainers.mixin import Batch, ScoreWeighBackprop

_REFERENCE_NAME = "ref_log_likelihood.safetensors"


class DFTTrainer(ScoreWeighBackprop, Trainer):
    r"""Fine-tunes a language model by DFT (Algorithm 36): gold answers above sampled ones.

    *Discriminative* fine-tuning (Guo et al., 2025), not TRL's Dynamic Fine-Tuning. The objective
    is :class:`~llm_xrisk.objectives.DFT` or :class:`~llm_xrisk.objectives.DFT2`.

    Likelihoods under the reference policy come from the data set (a pool has them), else from the
    adapter switched off, else from one pass over the data before the first step, cached in
    ``output_dir``. No second model is ever loaded.

    Args:
        model: Name, model or PEFT model.
        args: Settings; a :class:`DFTConfig`.
        train_dataset: Rows with ``index`` and either token ids (``prompt_ids``,
            ``completion_ids``, ``negative_ids``; optional ``ref_log_likelihoods``) as a pool gives
            them, or ``prompt``, ``completion`` and ``negatives`` as text or messages. TRL's
            preference rows (prompt, chosen, rejected) are the case of one negative.
        eval_dataset: The same, for evaluation.
        processing_class: Tokenizer; the model's own by default.
        peft_config: Adapter to put on the model.
        engine: Rollout engine for ``refresh_negatives``; transformers on the live model by
            default.
        sampling: How fresh negatives are drawn.
        **kwargs: For ``transformers.Trainer`` (callbacks, optimizers, ...).

    Raises:
        ValueError: a missing index, gold answer or usable negative, ids out of range, or settings
            of another trainer.

    Example:
        A complete run is ``recipes/dft.py``; in short::

            args = DFTConfig(output_dir="out", num_negatives=2)
            data = load_pool("pool").to_dataset()
            DFTTrainer("Qwen/Qwen2.5-0.5B", args, train_dataset=data).train()

    Metrics: objective (the loss itself), log_u/mean, log_u/max, negatives/weight (W = g/u),
    negatives/effective_fraction, score/gold, score/negative, auc.
    """

    _tag_names = ("llm-xrisk", "discriminative-fine-tuning")
    mean_over_groups = True
    args: DFTConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    objective: DFT
    data_collator: DFTCollator
    train_dataset: Any
    model: Any

    def __init__(
        self,
        model: str | nn.Module,
        args: DFTConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        engine: RolloutEngine | None = None,
        sampling: SamplingConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or DFTConfig(output_dir="dft-output")
        if not isinstance(args, DFTConfig):
            loss_type = getattr(args, "loss_type", None)
            raise ValueError(
                f"args must be a DFTConfig, got {type(args).__name__} (loss_type={loss_type!r}); "
                'TRL\'s loss_type="dft" is Dynamic Fine-Tuning, another method'
            )
        policy = load_model(model, args.model_init_kwargs, peft_config)
        tokenizer = load_tokenizer(processing_class, policy)
        if args.disable_dropout:
            disable_dropout(policy)
        prepare = {"tokenizer": tokenizer, "max_length": args.max_length}
        needs_negatives = args.num_negatives > 0 and not args.refresh_negatives
        if train_dataset is not None:
            train_dataset = prepare_dft_dataset(
                train_dataset, needs_negatives=needs_negatives, **prepare
            )
        if eval_dataset is not None:
            eval_dataset = prepare_dft_dataset(eval_dataset, needs_negatives=False, **prepare)
        super().__init__(
            model=policy,
            args=args,
            data_collator=DFTCollator(
                tokenizer.pad_token_id,
                args.num_negatives,
                seed=args.data_seed or args.seed,
                padding_side=args.padding_side,
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            **kwargs,
        )
        self.setup_objective(self._build_objective(args, len(train_dataset or [0])))
        self._engine = engine
        self.sampling = sampling or SamplingConfig(max_new_tokens=256, temperature=1.0)
        self.add_callback(TrainBeginCallback(self.cache_reference))
        self.add_callback(inert_weights(args.inert_threshold))

    def _build_objective(self, args: DFTConfig, num_samples: int) -> DFT:
        settings: dict[str, Any] = {"u_init": args.u_init}
        if args.tau is not None:
            settings["tau"] = args.tau
        if args.gamma is not None:
            settings["gamma"] = args.gamma
        if args.gamma_decay_epochs:
            floor = args.gamma or (0.85 if args.objective == "DFT" else 0.9)
            settings["gamma"] = cosine(floor, args.gamma_decay_epochs)
        return OBJECTIVES[args.objective](num_samples, **settings)  # pyright: ignore[reportReturnType]

    # -- batches -----------------------------------------------------------------------------

    def mini_batch(self, batches: list[Batch]) -> list[Batch]:
        """Fetch fresh negatives if asked to, and what the reference policy thinks of them."""
        if self.args.refresh_negatives:
            batches = [self._refresh(batch) for batch in batches]
        return [self._with_reference(batch) for batch in batches]

    def prediction_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """The objective of an evaluation batch."""
        return super().prediction_step(model, self._with_reference(inputs), *args, **kwargs)

    def _with_reference(self, batch: Batch) -> Batch:
        if "ref_log_likelihood" in batch or not self.objective.importance_weight:
            return batch
        model: Any = unwrap_model(self.model)
        if not is_peft(model):
            raise ValueError(
                "DFT weighs negatives by 1 / pi_ref and these rows have no ref_log_likelihoods; "
                "build them as a pool (llm-xrisk pool), or use objective=DFT2"
            )
        with model.disable_adapter():
            return batch | {"ref_log_likelihood": self._log_likelihood(self.model_wrapped, batch)}

    @torch.no_grad()
    def _log_likelihood(self, model: nn.Module, batch: Batch) -> Tensor:
        batch = self._prepare_inputs(batch)
        with evaluation_mode(model), self.compute_loss_context_manager():
            return self.token_log_probs(model, batch).log_probs.sum(-1)

    def _refresh(self, batch: Batch) -> Batch:
        """Replace the negatives of a batch by some of the policy of at most k steps ago."""
        from llm_xrisk.rollout.negatives import draw_negatives

        if self._engine is None:
            self._engine = make_engine("transformers", self.model_wrapped, self.processing_class)
        if self.state.global_step % self.args.refresh_negatives == 0:
            self._engine.sync(self.model_wrapped, version=self.state.global_step)
        gold = batch["index"][batch["targets"] > 0.5].tolist()
        rows = [self.train_dataset[int(index)] for index in gold]
        fresh = draw_negatives(
            self._engine,
            rows,
            sampling=self.sampling,
            num_negatives=self.args.num_negatives,
            tokenizer=self.processing_class,
        )
        collated = self.data_collator(
            [dict(row) | new for row, new in zip(rows, fresh, strict=True)]
        )
        return self._prepare_inputs(collated)

    # -- reference likelihoods -----------------------------------------------------------------

    def cache_reference(self) -> None:
        """Give the collator log pi_ref of every negative, where nothing else knows it.

        Computed once by the initial model on all processes and kept in ``output_dir``, where a
        resumed run finds it.

        Raises:
            FileNotFoundError: the run is a resumed one and the file is gone.
        """
        rows = self.train_dataset
        known = rows[0].get("ref_log_likelihoods") is not None
        if known or is_peft(unwrap_model(self.model)) or self.args.refresh_negatives:
            return
        if not self.objective.importance_weight or self.args.num_negatives == 0:
            return
        path = Path(str(self.args.output_dir)) / _REFERENCE_NAME
        if self.state.global_step == 0:
            values = self._reference_pass(rows)
            if self.args.should_save:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_tensors({"ref_log_likelihood": values}, path)
        elif path.is_file():
            values = load_file(path)["ref_log_likelihood"]
        else:
            raise FileNotFoundError(
                f"{path} is missing, and the resumed model is no longer the reference; restore "
                "the file, or train on a pool, whose rows have ref_log_likelihoods"
            )
        sizes = [len(rows[k]["negative_ids"]) for k in range(len(rows))]
        table: list[list[float]] = [[] for _ in sizes]
        for k, part in enumerate(values.split(sizes)):
            table[int(rows[k]["index"])] = part.tolist()
        self.data_collator.reference = table

    def _reference_pass(self, rows: Any) -> Tensor:
        """Log pi_ref of all negatives, in the order of the data set; every process has them."""
        jobs = [(row["prompt_ids"], ids) for row in rows for ids in row["negative_ids"]]
        world, rank = self.args.world_size, self.args.process_index
        size = self.args.per_device_eval_batch_size * (1 + self.args.num_negatives)
        share = -(-len(jobs) // world)
        mine = [jobs[min(rank * share + k, len(jobs) - 1)] for k in range(share)]
        parts: list[Tensor] = []
        starts = range(0, share, size)
        for start in track(starts, "reference likelihoods", disable=not self.args.should_log):
            chunk = mine[start : start + size]
            prompts, negatives = zip(*chunk, strict=True)
            pad = self.data_collator.pad_token_id
            batch = pad_rows(prompts, negatives, pad_token_id=pad)
            parts.append(self._log_likelihood(self.model_wrapped, batch))
        return join(torch.cat(parts))[0][: len(jobs)].cpu()
