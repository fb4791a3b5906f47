"""Discriminative fine-tuning as a trainer."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from llm_xrisk.data.collators import DFTCollator, pad_rows
from llm_xrisk.data.dft_dataset import prepare_dft_dataset
from llm_xrisk.fcco import cosine, join
from llm_xrisk.objectives import OBJECTIVES
from llm_xrisk.objectives.dft import DFT
from llm_xrisk.rollout.engine import RolloutEngine, SamplingConfig, make_engine
from llm_xrisk.rollout.scoring import evaluation_mode
from llm_xrisk.rollout.weight_sync import unwrap_model
from llm_xrisk.trainers.callbacks import inert_weights
from llm_xrisk.trainers.config import DFTConfig, require_config
from llm_xrisk.trainers.loading import disable_dropout, is_peft, load_model, load_tokenizer
from llm_xrisk.trainers.mixin import Batch, ScoreWeighBackprop
from llm_xrisk.trainers.reference import Job, reference_likelihoods, with_reference

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
    _method = "discriminative fine-tuning, objective {objective}"
    _source = "[arXiv 2502.18679](https://arxiv.org/abs/2502.18679)"
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
        require_config(args, DFTConfig)
        policy = load_model(model, args.model_init_kwargs, peft_config)
        tokenizer = load_tokenizer(processing_class, policy)
        if args.disable_dropout:
            disable_dropout(policy)
        prepare = partial(prepare_dft_dataset, tokenizer=tokenizer, max_length=args.max_length)
        self._prepare_eval = partial(prepare, needs_negatives=False)
        if train_dataset is not None:
            needs_negatives = args.num_negatives > 0 and not args.refresh_negatives
            train_dataset = prepare(train_dataset, needs_negatives=needs_negatives)
        if eval_dataset is not None:
            eval_dataset = _each(self._prepare_eval, eval_dataset)
        super().__init__(
            model=policy,
            args=args,
            data_collator=DFTCollator(
                tokenizer.pad_token_id,
                args.num_negatives,
                seed=args.seed if args.data_seed is None else args.data_seed,
                padding_side=args.padding_side,
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            **kwargs,
        )
        self.setup_objective(self._build_objective(args, len(train_dataset or [0])))
        self._engine, self._synced = engine, -1
        self.sampling = sampling or SamplingConfig(max_new_tokens=256, temperature=1.0)
        if args.num_negatives > 1:  # a single negative has all the weight
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
            collective = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
            self._engine = make_engine(
                "transformers", self.model_wrapped, self.processing_class, synced_gpus=collective
            )
        step = self.state.global_step
        due = step - step % self.args.refresh_negatives
        if self._synced != due:  # a resumed run begins between two of them
            self._engine.sync(self.model_wrapped, version=due)
            self._synced = due
        gold = batch["index"][batch["targets"] > 0.5].tolist()
        rows = [self.train_dataset[self._row_numbers[index]] for index in gold]
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

    @cached_property
    def _row_numbers(self) -> dict[int, int]:
        """Where each index stands: data sets are shuffled after they are numbered."""
        rows = self.train_dataset
        return {int(rows[k]["index"]): k for k in range(len(rows))}

    # -- evaluation ------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """A loader of evaluation rows: the negatives of epoch 0, however far training is."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare_eval(eval_dataset)
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, str):
            sets: Any = self.eval_dataset
            rows = sets[eval_dataset]
        if rows is not None and self._lacks_reference(rows):
            if self.state.global_step > 0:
                raise ValueError(
                    "got evaluation rows without ref_log_likelihoods after the model has moved "
                    "away from the reference; pass them as eval_dataset when the trainer is built, "
                    "or use a pool, whose rows have them"
                )
            rows = with_reference(rows, self._reference_values(rows, "eval", write=False))
        training = self.data_collator
        self.data_collator = replace(training, epoch=0, reference=None)
        try:
            return super().get_eval_dataloader(rows)
        finally:
            self.data_collator = training

    # -- reference likelihoods -----------------------------------------------------------------

    def before_first_step(self) -> None:
        """Get the reference likelihoods while the model is still the reference."""
        super().before_first_step()
        self.cache_reference()

    def cache_reference(self) -> None:
        """Get log pi_ref of every negative, where nothing else knows it.

        Computed once by the initial model on all processes and kept in ``output_dir``, where a
        resumed run finds it.

        Raises:
            FileNotFoundError: the run is a resumed one and the file is gone.
            ValueError: the file belongs to another data set.
        """
        rows = self.train_dataset
        if self._lacks_reference(rows) and not self.args.refresh_negatives:
            values = self._reference_values(rows, "")
            table: list[list[float]] = [[] for _ in values]
            for k, value in enumerate(values):
                table[int(rows[k]["index"])] = value
            self.data_collator.reference = table
        if self.eval_dataset is not None:
            several = isinstance(self.eval_dataset, dict)
            sets: dict[str, Any] = self.eval_dataset if several else {"": self.eval_dataset}  # pyright: ignore[reportAssignmentType]
            known = {
                name: with_reference(part, self._reference_values(part, f"eval_{name}"))
                if self._lacks_reference(part)
                else part
                for name, part in sets.items()
            }
            self.eval_dataset = known if several else known[""]

    def _lacks_reference(self, rows: Any) -> bool:
        if not self.objective.importance_weight or self.args.num_negatives == 0:
            return False
        known = rows[0].get("ref_log_likelihoods") is not None
        return not known and not is_peft(unwrap_model(self.model))  # pyright: ignore[reportArgumentType]

    def _reference_values(self, rows: Any, name: str, write: bool = True) -> list[list[float]]:
        stem, _, suffix = _REFERENCE_NAME.partition(".")
        file = f"{stem}-{name}.{suffix}" if name else _REFERENCE_NAME
        return reference_likelihoods(
            rows,
            Path(self.args.output_dir or ".") / file,
            self._reference_pass,
            initial=self.state.global_step == 0,
            write=write and self.args.should_save,
        )

    def _reference_pass(self, jobs: list[Job]) -> Tensor:
        """Log pi_ref of (prompt, negative) pairs; processes share the work and all have it."""
        world, rank = self.args.world_size, self.args.process_index
        size = self.args.per_device_eval_batch_size * (1 + self.args.num_negatives)
        share = -(-len(jobs) // world)
        mine = [jobs[min(rank * share + k, len(jobs) - 1)] for k in range(share)]
        parts = [torch.empty(0, device=self.args.device)]
        starts = range(0, share, size)
        silent = self.args.disable_tqdm or not self.args.should_log
        for start in track(starts, "reference likelihoods", disable=bool(silent)):
            prompts, negatives = zip(*mine[start : start + size], strict=True)
            pad = self.data_collator.pad_token_id
            batch = pad_rows(prompts, negatives, pad_token_id=pad)
            parts.append(self._log_likelihood(self.model_wrapped, batch))
        return join(torch.cat(parts))[0][: len(jobs)].cpu()


def _each(function: Callable[[Any], Any], data: Any) -> Any:
    """The function of a data set, or of each in a dictionary of them."""
    if isinstance(data, dict):
        return {name: function(part) for name, part in data.items()}
    return function(data)
