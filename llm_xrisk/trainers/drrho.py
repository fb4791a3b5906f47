"""DRRHO risk minimisation as a trainer: robust fine-tuning against a reference model's losses."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from transformers.integrations.deepspeed import (
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from llm_xrisk.data.collators import pad_rows
from llm_xrisk.data.drrho_dataset import DRRHOCollator, prepare_drrho_dataset
from llm_xrisk.data.fingerprint import model_fingerprint
from llm_xrisk.fcco import join
from llm_xrisk.objectives import ObjectiveOutput
from llm_xrisk.objectives.robust import rho_losses
from llm_xrisk.rollout.scoring import evaluation_mode
from llm_xrisk.rollout.weight_sync import gather_zero3, unwrap_model
from llm_xrisk.trainers.config import require_config
from llm_xrisk.trainers.drrho_config import DRRHOConfig, robust_objective
from llm_xrisk.trainers.loading import disable_dropout, is_peft, load_model, load_tokenizer
from llm_xrisk.trainers.mixin import Batch, ScoreWeighBackprop
from llm_xrisk.trainers.reference_losses import (
    Provenance,
    ReferenceLosses,
    read_losses,
    sizes_of,
    write_losses,
)

_CACHE_NAME = "reference_losses.safetensors"


class DRRHOTrainer(ScoreWeighBackprop, Trainer):
    r"""Fine-tunes a language model by DRRHO: rows it could still learn, by a reference, weigh more.

    .. math:: \min_w \sup_{p \in \Delta,\; D_\phi(p \| 1/n) \le \rho / n} \sum_{i=1}^n
              p_i \big( \ell(w, z_i) - \ell(w_{ref}, z_i) \big) \qquad (6.114)

    The loss of a row is the negative log-likelihood of its response, a mean or sum over tokens, or
    of each token by itself. The reference's losses are constants: computed once before the first
    step, kept in a file by example and tokenisation, where a resumed run finds them. A reference
    model by name is loaded for that pass alone; by default the reference is the model as training
    starts (of an adapter, the model below it), and all weights start at 1. Objectives that select
    (CVaRDRO, "rho_topk") then choose the rows of the first step by rounding: give these a name.

    The objective is one of :data:`~llm_xrisk.trainers.drrho_config.ROBUST`; ``use_reference=False``
    is the same without a reference, ``selection="rho_topk"`` the RHO-LOSS baseline.

    Args:
        model: Name, model or PEFT model.
        args: Settings; a :class:`~llm_xrisk.trainers.drrho_config.DRRHOConfig`.
        train_dataset: Rows with ``index`` and ``prompt`` and ``completion`` as text or messages,
            ``messages`` that end in the assistant's, or ``prompt_ids`` and ``completion_ids``.
        eval_dataset: The same, for evaluation, or several by name.
        processing_class: Tokenizer; the model's own by default.
        peft_config: Adapter to put on the model.
        **kwargs: For ``transformers.Trainer`` (callbacks, optimizers, ...).

    Raises:
        ValueError: a missing index or response, a setting that the objective does not have, or
            settings of another trainer.

    Example:
        A complete run is ``recipes/drrho.py``; in short::

            args = DRRHOConfig(output_dir="out", objective="KLDRO", tau=1.0)
            DRRHOTrainer("Qwen/Qwen2.5-0.5B", args, train_dataset=with_index(rows)).train()

    Metrics: objective (the loss itself), rows/effective_fraction, weight/max, the objective's state
    (log_u, tau, nu, eta), nll (per token), rho_loss (mean of the losses above the reference's).
    ``eval_loss`` is the mean over evaluation batches of the exact objective of each.
    """

    _tag_names = ("llm-xrisk", "drrho")
    _method = "DRRHO risk minimisation, objective {objective}"
    _source = "[arXiv 2505.06699](https://arxiv.org/abs/2505.06699)"
    args: DRRHOConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    data_collator: DRRHOCollator
    train_dataset: Any
    model: Any

    def __init__(
        self,
        model: str | nn.Module,
        args: DRRHOConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        args = args or DRRHOConfig(output_dir="drrho-output")
        require_config(args, DRRHOConfig)
        policy = load_model(model, args.model_init_kwargs, peft_config)
        tokenizer = load_tokenizer(processing_class, policy)
        if args.disable_dropout:
            disable_dropout(policy)
        self._prepare = partial(
            prepare_drrho_dataset, tokenizer=tokenizer, max_length=args.max_length
        )
        if train_dataset is not None:
            train_dataset = self._prepare(train_dataset)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._prepare(part) for name, part in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._prepare(eval_dataset)
        # while its weights are whole, and those that training starts from
        own = args.use_reference and args.reference_model is None
        self._fingerprint = model_fingerprint(policy, gather=gather_zero3) if own else None
        self._eval_reference: dict[str, ReferenceLosses] = {}
        super().__init__(
            model=policy,
            args=args,
            data_collator=DRRHOCollator(tokenizer.pad_token_id, args.padding_side),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            **kwargs,
        )
        self.setup_objective(robust_objective(args, len(train_dataset or [0])))
        self._row_columns = ["length"]

    # -- losses of rows ------------------------------------------------------------------------

    def mini_batch(self, batches: list[Batch]) -> list[Batch]:
        """Make the micro-batches of a step as wide as the longest response in any of them."""
        width = max(batch["width"] for batch in batches)
        return [_widened(batch, width, self.args.level) for batch in batches]

    def row_scores(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Losses (R,) of the responses, or (R, width) of their tokens, the first one first."""
        tokens = self.token_log_probs(model, batch)
        if self.args.level == "sequence":
            return {"scores": self._reduced(-tokens.log_probs.sum(-1), batch["length"])}
        order = torch.argsort(~tokens.mask, dim=1, stable=True)
        losses = -tokens.log_probs.gather(1, order)
        return {"scores": pad(losses, (0, batch["width"] - losses.shape[1]))}

    def _reduced(self, sums: Tensor, length: Tensor) -> Tensor:
        return sums / length if self.args.loss_reduction == "mean" else sums

    def _objective_of(self, rows: dict[str, Tensor], batch: Batch) -> ObjectiveOutput:
        losses, reference = self._flat(rows["scores"], batch)
        given = {} if reference is None else {"targets": reference}
        self._record_losses(losses, reference, batch["length"])
        return super()._objective_of({"scores": losses}, given)

    def _flat(self, losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What the objective weighs, responses or tokens, with the reference's losses."""
        reference, length = batch.get("targets"), batch["length"]
        if self.args.level == "sequence":
            return losses, None if reference is None else self._reduced(reference[:, 0], length)
        inside = torch.arange(losses.shape[1], device=losses.device) < length.unsqueeze(1)
        return losses[inside], None if reference is None else reference[inside]

    @torch.no_grad()
    def _record_losses(
        self, losses: Tensor, reference: Tensor | None, length: Tensor, mode: str = "train"
    ) -> None:
        """Mean loss of all tokens, and mean RHO loss of all rows, over all processes."""
        means = self.args.level == "sequence" and self.args.loss_reduction == "mean"
        nll = (losses * length if means else losses).sum()
        above = rho_losses(losses, reference).sum()
        local = torch.stack([nll, length.sum().to(nll), above, nll.new_tensor(losses.numel())])
        nll, tokens, above, count = join(local.unsqueeze(0))[0].sum(0)
        self.record({"nll": nll / tokens}, mode, tokens)
        if reference is not None:
            self.record({"rho_loss": above / count}, mode, count)

    # -- evaluation ------------------------------------------------------------------------------

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The exact objective of an evaluation batch; the training state is not asked."""
        inputs = self._prepare_inputs(_widened(inputs, inputs["width"], self.args.level))
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = self.row_scores(model, inputs)["scores"]
        losses, reference = self._flat(losses, inputs)
        self._record_losses(losses, reference, inputs["length"], "eval")
        with torch.no_grad(), torch.autocast(self.args.device.type, enabled=False):
            return self.objective.exact(losses, reference), None, None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """A loader of evaluation rows, with the reference's losses of them."""
        sets: Any = self.eval_dataset
        if eval_dataset is None or isinstance(eval_dataset, str):
            name = eval_dataset or ""
            rows = sets[name] if name else sets
            known = self._eval_reference.get(name)
            if rows is not None and known is None and self.args.use_reference:
                known = self._eval_reference[name] = self._losses(rows, _eval_name(name))
        else:
            rows = self._prepare(eval_dataset)
            known = self._losses(rows, None) if self.args.use_reference else None
        training = self.data_collator
        self.data_collator = replace(training, reference=known)
        try:
            return super().get_eval_dataloader(rows)
        finally:
            self.data_collator = training

    # -- the reference's losses ------------------------------------------------------------------

    def before_first_step(self) -> None:
        """Get the reference's losses while the model is still what training starts from."""
        super().before_first_step()
        self.cache_reference()

    def cache_reference(self) -> None:
        """Get the reference's loss of every row, from the file or by one pass over the data.

        Raises:
            FileNotFoundError: the run is a resumed one, the model has moved and the file is gone.
            ValueError: the file is stale, the reference's tokens are others, or a loss is no
                number.
        """
        if not self.args.use_reference:
            return
        self.data_collator.reference = self._losses(self.train_dataset, "")
        sets: Any = self.eval_dataset
        if sets is None:
            return
        for name, rows in (sets if isinstance(sets, dict) else {"": sets}).items():
            if name not in self._eval_reference:
                self._eval_reference[name] = self._losses(rows, _eval_name(name))

    def _losses(self, rows: Any, name: str | None) -> ReferenceLosses:
        """The reference's losses of rows; those without a name are not kept in a file."""
        path = None if name is None else self._cache_path(name)
        if path is not None and self._everywhere(path):
            return read_losses(path, rows, self._provenance())
        own = self.args.reference_model is None
        if own and self.state.global_step > 0 and not is_peft(unwrap_model(self.model)):
            error = ValueError if path is None else FileNotFoundError
            raise error(
                f"the reference's losses of these rows are not in {path or 'a file'}, and the "
                "model has been trained since it was the reference; restore the file, pass "
                "evaluation rows when the trainer is built, or name a reference_model"
            )
        losses = self._reference_pass(rows)
        if path is not None and self.args.should_save:
            about = Provenance(self.args.level, self.args.reference_model or "", self._fingerprint)
            write_losses(path, rows, losses, about)
        index = [int(row["index"]) for row in rows]
        return ReferenceLosses(index, sizes_of(rows, self.args.level), losses)

    def _provenance(self) -> Provenance:
        """Whose losses these are, the weights included where they can be told."""
        name = self.args.reference_model or ""
        # a resumed run may have moved its reference away; other processes may hold no weights yet
        if self.state.global_step > 0 or self.args.process_index > 0:
            return Provenance(self.args.level, name)
        if self._fingerprint is None:
            with self._reference_model():
                pass
        return Provenance(self.args.level, name, self._fingerprint)

    def _cache_path(self, name: str) -> Path:
        given = self.args.reference_cache
        path = Path(given) if given else Path(self.args.output_dir or ".") / _CACHE_NAME
        return path.with_stem(f"{path.stem}-{name}") if name else path

    def _everywhere(self, path: Path) -> bool:
        """Whether all processes see the file: the pass that it saves is collective."""
        seen = torch.tensor([path.is_file()], device=self.args.device)
        return bool(join(seen)[0].all())

    @torch.no_grad()
    def _reference_pass(self, rows: Any) -> Tensor:
        """Losses of rows under the reference; processes share the work and all have it."""
        world, rank = self.args.world_size, self.args.process_index
        share, size = -(-len(rows) // world), self.args.per_device_eval_batch_size
        mine = [rows[min(rank * share + k, len(rows) - 1)] for k in range(share)]
        parts: list[Tensor] = []
        silent = self.args.disable_tqdm or not self.args.should_log
        with self._reference_model() as model, evaluation_mode(model):
            _check_vocabulary(model, rows)
            for start in track(range(0, share, size), "reference losses", disable=bool(silent)):
                parts.append(self._reference_batch(model, mine[start : start + size]))
            del model
        sizes = sizes_of(rows, self.args.level)
        # the last process repeats the last row to have as many as the others
        losses = join(torch.cat(parts))[0][: sum(sizes)].float().cpu()
        if not bool(losses.isfinite().all()):
            index = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(sizes))
            bad = int(index[~losses.isfinite()][0])
            raise ValueError(
                f"the reference gives the example with index {rows[bad]['index']} a loss that is "
                "no finite number; look at its logits, or compute them in float32"
            )
        return losses

    def _reference_batch(self, model: nn.Module, rows: list[Any]) -> Tensor:
        batch = pad_rows(
            [row["prompt_ids"] for row in rows],
            [row["completion_ids"] for row in rows],
            pad_token_id=self.data_collator.pad_token_id,
            side=self.args.padding_side,
        )
        with self.compute_loss_context_manager():
            tokens = self.token_log_probs(model, self._prepare_inputs(batch))
        if self.args.level == "sequence":
            return -tokens.log_probs.sum(-1)
        return -tokens.log_probs[tokens.mask]

    @contextmanager
    def _reference_model(self) -> Iterator[Any]:
        """The reference, ready to score; one by name leaves the memory afterwards."""
        name = self.args.reference_model
        if name is None:
            model: Any = unwrap_model(self.model)
            with model.disable_adapter() if is_peft(model) else nullcontext():
                yield self.model_wrapped
            return
        deepspeed = getattr(self.args, "hf_deepspeed_config", None)
        unset_hf_deepspeed_config()  # it would partition a model that no engine puts together
        try:
            kwargs: Any = self.args.reference_init_kwargs or {}
            model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
        finally:
            if deepspeed is not None:
                set_hf_deepspeed_config(deepspeed)
        _check_tokenizer(name, self.processing_class)
        self._fingerprint = model_fingerprint(model)
        yield model.to(self.args.device).eval()
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _widened(batch: Batch, width: int, level: str) -> Batch:
    """A batch whose token losses have ``width`` columns."""
    if level == "token" and "targets" in batch:
        missing = width - batch["targets"].shape[1]
        batch = batch | {"targets": pad(batch["targets"], (0, missing))}
    return batch | {"width": width}


def _eval_name(name: str) -> str:
    return f"eval-{name}" if name else "eval"


def _check_tokenizer(name: str, tokenizer: Any) -> None:
    """Refuse a reference that reads other tokens; one saved without a tokenizer is trusted."""
    try:
        other = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return
    known, special = other.get_vocab(), {*tokenizer.all_special_tokens, *other.all_special_tokens}
    if not set(known) - special:  # what transformers makes up where there are no files
        return
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    differ = [t for t, number in vocabulary.items() if known.get(t) != number and t not in special]
    if differ:
        raise ValueError(
            f"the reference_model {name} has another vocabulary than the model that is trained "
            f"({len(differ)} of {len(vocabulary)} tokens differ, such as {differ[0]!r}), so their "
            "losses do not compare; choose one of the same family"
        )


def _check_vocabulary(model: Any, rows: Any) -> None:
    """Refuse ids that the reference has no embedding for."""
    vocabulary = getattr(unwrap_model(model).config, "vocab_size", None)
    largest = max(max(*row["prompt_ids"], *row["completion_ids"]) for row in rows)
    if vocabulary is not None and largest >= vocabulary:
        raise ValueError(
            f"got token id {largest} for a reference model of {vocabulary} tokens; choose a "
            "reference_model with the vocabulary of the model that is trained"
        )
