"""Score, weigh, backprop: how any objective of rows trains any model under any layout.

An objective needs the scores of whole groups and often of the whole mini-batch; a micro-batch
holds fewer. So the two never meet. For each optimizer step:

1. score: the numbers of every row (a score, or its features), without graph, in micro-batches of
   any layout;
2. weigh: the objective on all of them gives the derivative of the loss in each number;
3. backprop: micro-batch by micro-batch, backward of the sum of derivative times number.

Loss and gradient then depend on nothing but the rows. The first pass costs a forward; it is left
out where the whole mini-batch is one micro-batch, where the scores are known already, and where
an objective is a mean over groups that no micro-batch splits.
"""

import inspect
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from llm_xrisk.data.collators import select_rows
from llm_xrisk.fcco import join
from llm_xrisk.models import TokenLogProbs, token_log_probs
from llm_xrisk.objectives import Objective, ObjectiveOutput
from llm_xrisk.rollout.scoring import evaluation_mode
from llm_xrisk.rollout.weight_sync import unwrap_model
from llm_xrisk.trainers.callbacks import EpochCallback, TrainBeginCallback
from llm_xrisk.trainers.card import described, model_card, own_settings, write_card
from llm_xrisk.trainers.checkpoint import (
    invalidate,
    last_complete_checkpoint,
    load_objective,
    save_objective,
)
from llm_xrisk.trainers.loading import is_peft, keep_outputs_narrow

Batch = dict[str, Any]
_ROW_COLUMNS = ("index", "group", "query", "length", "ref_log_likelihood")


class ScoreWeighBackprop(Trainer if TYPE_CHECKING else object):
    """Mixin for ``transformers.Trainer``; a trainer names the objective and feeds it rows.

    Batches are dictionaries of rows: input_ids, attention_mask, completion_mask (R, T), keep,
    targets (R,), and where they apply index, group, ref_log_likelihood (R,) and old_log_probs
    (R, keep). The objective lives outside the model's wrapper, on the device of the scores; its
    state is saved as ``objective.safetensors`` beside the optimizer's.

    Attributes:
        objective: The objective, on the trainer's device.
        temperature: Of the policy that is scored.
        mean_over_groups: Whether the loss is a mean over groups that micro-batches keep whole.
        replays_randomness: Whether rows are scored in train mode, and the backward pass draws the
            same random numbers again (dropout as augmentation); by default in eval mode.
    """

    objective: Any
    model_wrapped: Any  # transformers types it as optional
    temperature: float = 1.0
    mean_over_groups: bool = False
    replays_randomness: bool = False
    _method: str  # for the model card
    _source: str
    _tag_names: tuple[str, ...] = ()

    # losses are those of the whole mini-batch: nothing divides them by the accumulation steps
    loss_is_scaled_for_ga = True

    def setup_objective(self, objective: Objective) -> None:
        """Take the objective; call after ``Trainer.__init__``.

        Raises:
            ValueError: the process would train on several GPUs by itself, or was launched as one
                of several and trains alone.
        """
        if self.args.n_gpu > 1:
            raise ValueError(
                f"got {self.args.n_gpu} GPUs in one process (nn.DataParallel), which splits a "
                "mini-batch behind the objective's back; start one process for each, with "
                "accelerate launch, or show one by CUDA_VISIBLE_DEVICES"
            )
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched > 1 and self.args.world_size == 1:
            raise ValueError(
                f"this process is one of WORLD_SIZE={launched} and would train a copy of its own; "
                "on a CPU pass --use_cpu true (or --ddp_backend gloo with DeepSpeed)"
            )
        self.objective = objective.to(self.args.device)
        parameters = inspect.signature(type(objective).forward).parameters
        self._row_columns = [name for name in _ROW_COLUMNS if name in parameters]
        self._recorded: dict[str, dict[str, list[tuple[Tensor, Tensor]]]]
        self._recorded = {"train": {}, "eval": {}}
        # transformers < 5.19 asks these two instead of loss_is_scaled_for_ga
        self.model_accepts_loss_kwargs = False
        self.compute_loss_func = _unused_loss
        self.add_callback(EpochCallback(self))
        self.add_callback(TrainBeginCallback(self.before_first_step))

    def before_first_step(self) -> None:
        """Runs once the model is wrapped."""
        keep_outputs_narrow(self.model)

    # -- the three steps ---------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], None]:
        """Fetch the micro-batches of one optimizer step and weigh their rows."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._prepare_inputs(b) for b in self.mini_batch(batches)]
        if len(batches) > 1 or any("row_scores" in b for b in batches):
            shares = self._group_shares(batches) if self.mean_over_groups else None
            if shares is None:
                batches = self._weigh(batches)
            else:
                batches = [b | {"share": share} for b, share in zip(batches, shares, strict=True)]
        return batches, None

    def mini_batch(self, batches: list[Any]) -> list[Batch]:
        """Turn what the data loader gave for one optimizer step into batches of rows."""
        return batches

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The objective itself where a batch is whole, else the weighted sum of its scores."""
        self.objective.train(model.training)
        with self._randomness(inputs):
            rows = self.row_scores(model, inputs)
        if "coefficients" not in inputs:
            output = self._objective_of(rows, inputs)
            share = inputs.get("share")
            self.record(dict(output.metrics), "train" if model.training else "eval", share)
            loss = output.loss if share is None else output.loss * share
        else:
            weighted = [(inputs["coefficients"][name] * rows[name]).sum() for name in rows]
            own = zip(inputs.get("own_coefficients", ()), self._own_parameters(), strict=False)
            surrogate = torch.stack(weighted + [(c * weight).sum() for c, weight in own]).sum()
            # the value of the objective, the gradient of the weighted scores
            loss = inputs["loss_value"] + (surrogate - surrogate.detach())
        return (loss, rows) if return_outputs else loss

    def row_scores(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The differentiable scalars of each row, by the names the objective takes them."""
        tokens = self.token_log_probs(model, batch)
        return self.objective.row_scores(
            tokens.log_probs, tokens.mask, batch.get("old_log_probs"), batch["targets"]
        )

    def token_log_probs(self, model: nn.Module, batch: Batch, **options: Any) -> TokenLogProbs:
        """Log-probabilities of the batch's completion tokens under ``model``."""
        return token_log_probs(
            model,
            batch["input_ids"],
            batch["attention_mask"],
            batch["completion_mask"],
            keep=batch["keep"],
            temperature=self.temperature,
            **options,
        )

    @torch.no_grad()
    def _weigh(self, batches: list[Batch]) -> list[Batch]:
        self.objective.train()
        if self.replays_randomness:
            batches = [b | {"seed": self._seed(k)} for k, b in enumerate(batches)]
        scored = [b.get("row_scores") or self._scored(b) for b in batches]
        names = list(scored[0])
        rows = {n: torch.cat([s[n] for s in scored]).detach().requires_grad_() for n in names}
        columns = [n for n in ("targets", *self._row_columns) if n in batches[0]]
        merged = {n: torch.cat([b[n] for b in batches]) for n in columns}
        with torch.enable_grad():
            output = self._objective_of(rows, merged)
            leaves = [*rows.values(), *self._own_parameters()]
            grads = torch.autograd.grad(output.loss, leaves, allow_unused=True)
            grads = [
                torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)
            ]
        self.record(dict(output.metrics), "train")
        sizes = [next(iter(s.values())).shape[0] for s in scored]
        split = {n: g.split(sizes) for n, g in zip(names, grads, strict=False)}
        batches[0]["own_coefficients"] = grads[len(names) :]
        value = output.loss.detach() / len(batches)
        return [
            _without_inert_rows(b | {"coefficients": {n: split[n][k] for n in names}})
            | {"loss_value": value}
            for k, b in enumerate(batches)
        ]

    def _own_parameters(self) -> list[nn.Parameter]:
        """What the objective learns besides the model: AUC's a and b, a temperature."""
        return [weight for weight in self.objective.parameters() if weight.requires_grad]

    def _scored(self, batch: Batch) -> dict[str, Tensor]:
        """The numbers of a micro-batch's rows, without graph."""
        model = self.model_wrapped
        if self.replays_randomness:
            model.train()  # an evaluation just before leaves it in eval mode
        mode = nullcontext() if self.replays_randomness else evaluation_mode(model)
        with mode, self.compute_loss_context_manager(), self._randomness(batch):
            return self.row_scores(model, batch)

    def _seed(self, number: int) -> int:
        """Of the random numbers of a micro-batch: the same in a run that is resumed."""
        place = (self.args.seed, self.state.global_step, number, self.args.process_index)
        return Random("/".join(map(str, place))).getrandbits(62)

    @contextmanager
    def _randomness(self, batch: Batch) -> Iterator[None]:
        """Draw the numbers that belong to a micro-batch, and leave the generators as found."""
        if "seed" not in batch:
            yield
            return
        device = self.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(batch["seed"])  # pyright: ignore[reportUnknownMemberType]
            yield

    def _objective_of(self, rows: dict[str, Tensor], batch: Batch) -> ObjectiveOutput:
        names = ("targets", *self._row_columns)
        given = {name: batch[name] for name in names if name in batch} | rows
        # sums over rows stay in the scores' precision, whatever the model computes in
        with torch.autocast(self.args.device.type, enabled=False):
            return self.objective(**given)

    def _group_shares(self, batches: list[Batch]) -> list[Tensor] | None:
        """Each batch's share of the groups, or None where a sample stands in two batches."""
        counts = [(b["targets"] > 0.5).sum() for b in batches]
        numbered = [torch.full_like(b["index"], k) for k, b in enumerate(batches)]
        index, number = join(torch.cat([b["index"] for b in batches]), torch.cat(numbered))
        order = torch.argsort(index, stable=True)
        split = (index[order][1:] == index[order][:-1]) & (number[order][1:] != number[order][:-1])
        total = torch.stack(counts).unsqueeze(0)
        total = join(total)[0].sum(0).to(torch.float32)
        if bool(split.any()):
            return None
        return list(total / total.sum().clamp(min=1))

    def _prepare_input(self, data: Any) -> Any:
        """Move to the device and keep the dtype: DeepSpeed would make log-probs bfloat16."""
        if isinstance(data, Tensor):
            return data.to(self.args.device)
        return super()._prepare_input(data)

    # -- evaluation, metrics -----------------------------------------------------------------

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The objective of an evaluation batch; the training state is left alone."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as ``Trainer`` does and add the objective's metrics."""
        output: Any = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        averages = self._averages("eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in averages.items()})
        return output

    def record(
        self, metrics: dict[str, Tensor], mode: str = "train", weight: Tensor | None = None
    ) -> None:
        """Keep metrics of this step, or of the share ``weight`` of it.

        The next log line shows their mean; NaN is no measurement and left out.
        """
        for name, value in metrics.items():
            share = torch.ones_like(value) if weight is None else weight.to(value)
            self._recorded[mode].setdefault(name, []).append((value.detach(), share))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means of the metrics recorded since the last training line."""
        if "loss" in logs:
            logs = logs | self._averages("train")
        super().log(logs, start_time)

    def _averages(self, mode: str) -> dict[str, float]:
        recorded, self._recorded[mode] = self._recorded[mode], {}
        means = {name: _weighted_mean(measured) for name, measured in recorded.items()}
        return {name: mean for name, mean in means.items() if not math.isnan(mean)}

    # -- checkpoints -------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train; ``resume_from_checkpoint=True`` takes the last checkpoint written in full."""
        if self.train_dataset is None:
            raise ValueError("got no train_dataset; pass one when the trainer is built")
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and, where it is the run's result, its card."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.args.should_save:
            write_card(output_dir or self.args.output_dir or ".", self._card())

    def create_model_card(
        self,
        language: Any = None,
        license: Any = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: Any = None,
        dataset_tags: Any = None,
        dataset: str | list[str] | None = None,
        dataset_args: Any = None,
    ) -> None:
        """Write ``README.md``: method, settings, versions; one written by hand is left alone.

        Args:
            language: For the card's head.
            license: For the card's head.
            tags: Beside those of the trainer.
            model_name: By default the name of ``output_dir``.
            finetuned_from: By default the model the trainer was given.
            tasks: Not shown.
            dataset_tags: Not shown.
            dataset: Names of data sets on the hub.
            dataset_args: Not shown.
        """
        if not self.is_world_process_zero():
            return
        more = [tags] if isinstance(tags, str) else list(tags or [])
        head = {"language": language, "license": license, "datasets": dataset}
        write_card(
            self.args.output_dir or ".", self._card(model_name, finetuned_from, more, **head)
        )

    def _card(
        self, name: str | None = None, base: str | None = None, tags: Any = (), **head: Any
    ) -> str:
        model: Any = unwrap_model(self.model)  # pyright: ignore[reportArgumentType]
        configs = [c for c in (self.args, getattr(self, "rollout", None)) if c is not None]
        library = {"library_name": "peft" if is_peft(model) else "transformers"}
        functions = getattr(getattr(self, "grade", None), "functions", [])
        names = ", ".join(getattr(f, "__name__", type(f).__name__) for f in functions)
        rewards = {"reward_funcs": names} if names else {}
        return model_card(
            name or Path(self.args.output_dir or "model").resolve().name,
            method=self._method.format(objective=type(self.objective).__name__),
            source=self._source,
            base=base or getattr(getattr(model, "config", None), "_name_or_path", ""),
            settings=own_settings(*configs) | rewards,
            metadata=library | {"tags": [*self._tag_names, *tags]} | head,
            data=described(self.train_dataset),
            history=self.state.log_history,
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint, which is none before its last file, the trainer's state, is there."""
        if self.args.should_save:
            invalidate(f"{self._get_output_dir(trial)}/checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the first process declares all files written

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:  # replicas hold equal state
            save_objective(self.objective, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_objective(self.objective, checkpoint)


def _without_inert_rows(batch: Batch) -> Batch:
    """Drop rows whose derivatives are all zero: they cost a backward pass and change nothing."""
    coefficients = batch["coefficients"].values()
    active = torch.stack([(c != 0).reshape(len(c), -1).any(-1) for c in coefficients]).any(0)
    rows = active.nonzero().squeeze(-1)
    if len(rows) == len(active):
        return batch
    if len(rows) == 0:  # every process runs the same number of backward passes
        rows = torch.zeros(1, dtype=torch.long, device=active.device)
    return select_rows(batch, rows)


def _weighted_mean(measured: list[tuple[Tensor, Tensor]]) -> float:
    """Mean of (value, weight) pairs, NaN where no value is a number."""
    values = torch.stack([value for value, _ in measured]).float()
    weights = torch.stack([weight for _, weight in measured]).float() * ~values.isnan()
    return float(
        (values.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf) * weights).sum()
        / weights.sum()
    )


def _unused_loss(*args: Any, **kwargs: Any) -> Tensor:
    raise TypeError("the objective computes the loss; see ScoreWeighBackprop.compute_loss")
