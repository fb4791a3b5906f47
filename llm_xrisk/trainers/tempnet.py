"""TempNet as a trainer: a temperature network for a language model, frozen or trained with it."""

import logging
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, Trainer, set_seed
from transformers.trainer import TRAINING_ARGS_NAME

from llm_xrisk.data.next_token_dataset import NextTokenCollator, prepare_next_tokens
from llm_xrisk.fcco import join
from llm_xrisk.models.tempnet import TempNet
from llm_xrisk.objectives import Objective
from llm_xrisk.rollout.weight_sync import base_model, iter_named_parameters
from llm_xrisk.trainers.callbacks import WarnOnceCallback
from llm_xrisk.trainers.card import described, model_card, own_settings
from llm_xrisk.trainers.config import require_config
from llm_xrisk.trainers.loading import disable_dropout, is_peft, load_model, load_tokenizer
from llm_xrisk.trainers.mixin import Batch, ScoreWeighBackprop
from llm_xrisk.trainers.tempnet_config import TempNetTrainingConfig, build_tempnet, with_weights
from llm_xrisk.trainers.tempnet_model import FrozenModel, TemperedModel, own_name

_LOADING = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")
_OPTIMIZER_FILE = "optimizer.pt"
_NEAR = 0.01  # of the range of tau: what counts as at a bound
_FLAT = 0.01  # of tau: what counts as one temperature for all
logger = logging.getLogger(__name__)


class TempNetTrainer(ScoreWeighBackprop, Trainer):
    r"""Trains a network that predicts the temperature of each token from a language model's logits.

    .. math:: \min_\theta \frac1N \sum_t \tau_t \log \frac1V \sum_k
              \exp\Big(\frac{s_{tk} - s_{t y_t}}{\tau_t}\Big) + \rho \, \tau_t,
              \qquad \tau_t = \mathrm{TempNet}_\theta(s_t)

    over the N tokens with a label, in all micro-batches and processes of a step: the KL-constrained
    robust loss (6.50) with the vocabulary as the other items. Its derivative in tau_t is
    rho - (log V - H(softmax(s_t / tau_t))): temperatures aim at the entropy log V - rho.

    The language model is frozen by default. Then labels do not matter, a step needs no backward
    pass through it, and logits exist one chunk of tokens at a time. With ``train_model`` both
    learn, at two learning rates, the model by softmax(s / tau) - onehot.

    Args:
        model: Name, model or PEFT model. A frozen one is put in eval mode, its parameters take no
            gradient from then on.
        args: Settings; a :class:`~llm_xrisk.trainers.tempnet_config.TempNetTrainingConfig`.
        train_dataset: Rows with ``text``, with ``prompt`` and ``completion`` as text or messages,
            with ``messages`` that end in the assistant's, or with ``prompt_ids`` and
            ``completion_ids``.
        eval_dataset: The same, for evaluation, or several by name.
        processing_class: Tokenizer; the model's own by default.
        peft_config: Adapter to put on a model that is trained too.
        **kwargs: For ``transformers.Trainer`` (callbacks, optimizers, ...).

    Raises:
        ValueError: rho outside [0, log V), a TempNet of another vocabulary, rows without a labelled
            token, logits that are NaN, an adapter for a frozen model, FSDP, or settings of another
            trainer.
        FileNotFoundError: no TempNet in the folder that training is to start from.

    Example:
        A complete run is ``recipes/tempnet.py``; in short::

            args = TempNetTrainingConfig(output_dir="out", rho=8.5)
            trainer = TempNetTrainer("meta-llama/Llama-2-7b-hf", args, train_dataset=texts)
            trainer.train()
            trainer.save_model()  # TempNetLogitsProcessor.from_pretrained("out") reads it

    Metrics: tau/mean, tau/min, tau/max, tau/at_lower and tau/at_upper (share of the tokens within
    1 % of the range of a bound), entropy, entropy/target (log V - rho), nll (of the labels at the
    predicted temperatures). ``eval_loss`` is the mean over tokens, with dropout off.
    """

    _tag_names = ("llm-xrisk", "tempnet")
    _method = "TempNet, temperatures predicted token by token"
    _source = "[arXiv 2404.04575](https://arxiv.org/abs/2404.04575)"
    args: TempNetTrainingConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    train_dataset: Any
    model: Any

    def __init__(
        self,
        model: str | nn.Module,
        args: TempNetTrainingConfig,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        require_config(args, TempNetTrainingConfig)
        if peft_config is not None and not args.train_model:
            raise ValueError(
                "got a peft_config and a frozen language model, whose adapter would not learn; set "
                "train_model=True, or pass a PEFT model that is trained already"
            )
        set_seed(args.seed)  # the same TempNet on every process
        net = None if not isinstance(model, str) else _early_tempnet(model, args)
        policy = load_model(model, args.model_init_kwargs, peft_config)
        config: Any = base_model(policy).config
        if net is None:
            name = model if isinstance(model, str) else config._name_or_path
            net = build_tempnet(args, _vocabulary(config), name)
        self._has_name = isinstance(model, str)
        tokenizer = load_tokenizer(processing_class, base_model(policy))
        if args.train_model and args.disable_dropout:
            disable_dropout(policy)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # all of them are used
        prepare = partial(prepare_next_tokens, tokenizer=tokenizer, max_length=args.max_length)
        if isinstance(eval_dataset, dict):
            eval_dataset = {key: prepare(rows) for key, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = prepare(eval_dataset)
        super().__init__(
            model=TemperedModel(policy, net, train_model=args.train_model),  # pyright: ignore
            args=args,
            data_collator=NextTokenCollator(tokenizer.pad_token_id, args.padding_side),
            train_dataset=None if train_dataset is None else prepare(train_dataset),
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            **kwargs,
        )
        if self.is_fsdp_enabled:
            raise ValueError("a TempNet cannot be trained under FSDP; take DDP, ZeRO-2 or ZeRO-3")
        if self.is_deepspeed_enabled:
            self.model.losses.without_scalars()
        self._ends: dict[str, Tensor] = {}  # minus the smallest temperature, and the largest
        self.setup_objective(Objective())  # the loss is the model's own, and has no state
        self.model.replace_frozen(self._placed)
        at_lower = "{:.0%} of the temperatures sit at their lower bound" + _COLLAPSE
        self.add_callback(WarnOnceCallback("tau/at_lower", 0.5, at_lower, patience=3))

    @property
    def net(self) -> TempNet:
        """The TempNet."""
        return self.model.net

    def _placed(self, frozen: FrozenModel) -> Any:
        """The frozen model where it computes: sharded under ZeRO-3, otherwise on the device."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if self.is_deepspeed_enabled and plugin is not None and plugin.zero_stage == 3:
            return _sharded(frozen, plugin.deepspeed_config)
        model = base_model(frozen.model)
        loaded_there = any(hasattr(model, name) for name in ("hf_device_map", "hf_quantizer"))
        return frozen if loaded_there else frozen.to(self.args.device)

    # -- one step --------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step, and the number of labels in those of all processes."""
        batches, _ = super(ScoreWeighBackprop, self).get_batch_samples(*args, **kwargs)
        counts = [batch["completion_mask"].sum() for batch in batches]
        local = torch.stack(counts).sum().to(self.args.device)
        return batches, join(local.unsqueeze(0))[0].sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Sum of the losses of a micro-batch over the number of labels in the whole mini-batch."""
        found = model(**inputs)
        self._record_tokens(found, "train" if model.training else "eval")
        # data-parallel training averages over the processes
        share = found["tau"].numel() if num_items_in_batch is None else num_items_in_batch
        scale = 1 if num_items_in_batch is None else self.args.world_size
        loss = found["total"] * scale / share
        return (loss, found) if return_outputs else loss

    @torch.no_grad()
    def _record_tokens(self, found: dict[str, Tensor], mode: str) -> None:
        """Means over the tokens of all processes."""
        config = self.net.config
        tau, entropy = found["tau"], found["entropy"]
        height, width = math.log(config.vocab_size), config.tau_max - config.tau_min
        nll = found["values"] / tau + height - config.rho
        low = tau < config.tau_min + _NEAR * width
        high = tau > config.tau_max - _NEAR * width
        names = ("loss", "nll", "tau/mean", "tau/at_lower", "tau/at_upper", "entropy")
        sums = torch.stack([x.sum() for x in (found["values"], nll, tau, low, high, entropy)])
        ends = torch.stack(
            [
                -torch.cat([tau, tau.new_tensor([math.inf])]).amin(),
                torch.cat([tau, tau.new_tensor([-math.inf])]).amax(),
            ]
        )
        local = torch.cat([tau.new_tensor([tau.numel()]), sums.to(tau.dtype), ends])
        everywhere = join(local.unsqueeze(0))[0]
        count, *totals = everywhere[:, :-2].sum(0)
        metrics = {name: total / count for name, total in zip(names, totals, strict=True)}
        metrics["entropy/target"] = tau.new_tensor(height - config.rho)
        if mode == "train":
            del metrics["loss"]  # Trainer logs it
        self.record(metrics, mode, count)
        ends = everywhere[:, -2:].amax(0)
        self._ends[mode] = ends.maximum(self._ends.get(mode, ends))

    def _averages(self, mode: str) -> dict[str, float]:
        """Means since the last line, and the smallest and largest temperature."""
        averages, ends = super()._averages(mode), self._ends.pop(mode, None)
        if ends is None:
            return averages
        smallest, largest = -ends[0].item(), ends[1].item()
        if mode == "eval" and largest < (1 + _FLAT) * smallest:  # dropout spreads those of training
            logger.warning(
                "the TempNet gives every token the temperature %.3f, as a constant does; a new one "
                "starts so: train longer or raise tempnet_learning_rate (%g)",
                *(largest, self.args.tempnet_learning_rate),
            )
        return averages | {"tau/min": smallest, "tau/max": largest}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and end a run whose loss is no number.

        Raises:
            ValueError: the loss is NaN, as it becomes with the logits; on a CPU training ends
                before.
        """
        if math.isnan(logs.get("loss", 0.0)):
            raise ValueError(
                f"the loss is NaN at step {self.state.global_step}: the logits are, or they or the "
                "TempNet's weights are infinite; see whether the model's forward pass overflows, "
                "or lower tempnet_learning_rate"
            )
        super().log(logs, start_time)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer`` does, with the TempNet's parameters at their own learning rate.

        Raises:
            ValueError: the language model is trained too by an optimizer of DeepSpeed's, which has
                one learning rate.
        """
        known = self.optimizer is not None  # one that was given, or made by an earlier call
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.args.train_model and type(optimizer).__name__ == "DummyOptim":
            raise ValueError(
                "got an optimizer in DeepSpeed's config, which has one learning rate; drop it "
                "there and choose by `optim`"
            )
        if known or optimizer is None or not self.args.train_model:
            return optimizer
        own = {id(parameter) for parameter in self.model.losses.parameters()}
        for group in list(optimizer.param_groups):
            named = [p for p in group["params"] if id(p) in own]
            group["params"] = [p for p in group["params"] if id(p) not in own]
            options = {key: value for key, value in group.items() if key != "params"}
            rate = {"lr": self.args.tempnet_learning_rate}
            if named:
                optimizer.add_param_group(options | rate | {"params": named})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    # -- files -----------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the TempNet, and the language model where it was trained or is nowhere else."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self._saves_base():
            self._save_frozen(output_dir or self.args.output_dir or ".")

    def _saves_base(self) -> bool:
        wanted = self.args.save_base
        return not self.args.train_model and (not self._has_name if wanted is None else wanted)

    def _save_frozen(self, folder: str) -> None:
        """The frozen language model; under ZeRO-3 every process takes part."""
        model: Any = self.model.language_model
        state: dict[str, Tensor] | None = None
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            named = iter_named_parameters(model)
            state = {name: value.cpu() for name, value in named if self.args.should_save}
            model = base_model(model)  # adapters are merged
        if self.args.should_save:
            model.save_pretrained(folder, state_dict=state)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        names = [name for name, _ in self.net.named_parameters()]
        weights = self.net.state_dict()
        if state_dict is not None:  # put together from the shards of all processes
            weights = {name: state_dict[f"losses.{own_name(name)}"] for name in names}
        with_weights(self.net, weights).save_pretrained(folder)
        if self.args.train_model:
            prefix, whole = "model.", state_dict or {}
            part = {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)}
            self.model.language_model.save_pretrained(folder, state_dict=part or None)
        self.processing_class.save_pretrained(folder)  # pyright: ignore
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = TempNet.from_pretrained(
            resume_from_checkpoint, vocab_size=self.net.config.vocab_size
        )
        wanted = self.net.config
        if replace(saved.config, base_model=wanted.base_model) != wanted:
            raise ValueError(
                f"{resume_from_checkpoint} holds a TempNet of {saved.config}, this run trains "
                f"{wanted}; resume with the settings the run started with"
            )
        self.net.load_state_dict(saved.state_dict())
        if self.args.train_model:
            super()._load_from_checkpoint(resume_from_checkpoint, self.model.language_model)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super(ScoreWeighBackprop, self)._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        missing = checkpoint is not None and not (Path(checkpoint) / _OPTIMIZER_FILE).is_file()
        if missing and not self.is_deepspeed_enabled:
            raise FileNotFoundError(
                f"{checkpoint} has no {_OPTIMIZER_FILE}, so the optimizer would start anew; resume "
                "from a checkpoint saved without save_only_model, or start a new run with it as "
                "`tempnet`"
            )
        super(ScoreWeighBackprop, self)._load_optimizer_and_scheduler(checkpoint)

    def _card(
        self, name: str | None = None, base: str | None = None, tags: Any = (), **head: Any
    ) -> str:
        model = self.model.language_model
        kind = "peft" if is_peft(model) else "transformers"
        whole = self.args.train_model or self._saves_base()
        rows: Any = self.train_dataset or []
        labels = f"{sum(len(row['completion_ids']) for row in rows):,} tokens with a label"
        return model_card(
            name or Path(self.args.output_dir or "model").resolve().name,
            method=self._method,
            source=self._source,
            base=base or self.net.config.base_model or "",
            settings=own_settings(self.args) | {"rho": self.net.config.rho},
            metadata={"library_name": kind if whole else "llm-xrisk"}
            | {"tags": [*self._tag_names, *tags]}
            | head,
            data=f"{described(rows)}; {labels}" if rows else "",
            history=self.state.log_history,
        )


_COLLAPSE = (
    ": rho asks for less entropy than they can give. Raise `entropy` (lower rho), or lower tau_min"
)


def _early_tempnet(name: str, args: TempNetTrainingConfig) -> TempNet | None:
    """The network for a model known by name, so that what does not fit shows before it loads."""
    given: Any = args.model_init_kwargs or {}
    try:
        config = AutoConfig.from_pretrained(name, **{k: given[k] for k in _LOADING if k in given})
    except OSError:  # an adapter, or nothing: loading the model tells
        return None
    return build_tempnet(args, _vocabulary(config), name)


def _vocabulary(config: Any) -> int:
    return config.get_text_config().vocab_size


def _sharded(frozen: FrozenModel, settings: dict[str, Any]) -> Any:
    """A frozen model whose parameters processes share, by ZeRO-3."""
    import deepspeed

    zero: dict[str, Any] = {"stage": 3}
    if "offload_param" in settings.get("zero_optimization", {}):
        zero["offload_param"] = settings["zero_optimization"]["offload_param"]
    dtype = next(frozen.parameters()).dtype
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    return deepspeed.initialize(model=frozen, config=config)[0]
