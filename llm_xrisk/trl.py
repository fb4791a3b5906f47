"""DisCO inside TRL: a thin subclass of GRPOTrainer, for those who stay with it.

``llm_xrisk.trainers.DisCOTrainer`` is the trainer to prefer: its loss does not depend on the
micro-batches. This one is for what TRL's has beyond it: tools, environments, images. It wraps the
methods of GRPOTrainer (``super()``, then one more key) and replaces ``_compute_loss`` alone;
``tests/trl/test_contract.py`` pins every private name it leans on.
"""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from llm_xrisk.objectives import OBJECTIVES, SequenceObjective
from llm_xrisk.rollout.vllm_engine import refresh_tied_heads
from llm_xrisk.rollout.vllm_process import share_the_cpu
from llm_xrisk.rollout.weight_sync import iter_named_parameters

logger = logging.getLogger(__name__)

# Settings of GRPO's losses that this one has no place for.
_UNUSED = (
    *("epsilon", "epsilon_high", "importance_sampling_level", "off_policy_mask_threshold"),
    *("entropy_coef", "use_adaptive_entropy", "top_entropy_quantile", "use_liger_kernel"),
)


@dataclass
class DisCOGRPOConfig(GRPOConfig):
    """Settings of :class:`DisCOGRPOTrainer`: GRPOConfig's, with DisCO's in place of GRPO's loss.

    Settings of GRPO's losses (``loss_type``, ``epsilon``, ``importance_sampling_level``, entropy
    terms, ``beta``) are refused rather than ignored. ``delta`` is DisCO's, not TRL's clip bound.

    Args:
        score: "log_likelihood" (log-L) or "likelihood_ratio" (L-ratio).
        tau: Temperature of (6.82); 0 is (6.81). The authors use 10 (log-L) and 1 (L-ratio).
        delta: Radius of the trust region in [0, 1): mean KL(old || new) per token.
        kl_penalty: beta of (6.85) as the book prints it; 500 is the authors' 1e3 with their half.
        kl_estimator: "k3" or "k1".
        normalizer: "valid" averages over questions with right and wrong answers, "all" over all.
        reward_threshold: Rewards at or above it are right; by default they must be 0 or 1.
        loss_type: "disco"; TRL's names are refused.

    Raises:
        ValueError: micro-batches that split a question's answers, or a setting without effect.

    Example:
        ``DisCOGRPOConfig("out", per_device_train_batch_size=16, num_generations=8,
        steps_per_generation=4)``: two questions a micro-batch, four updates a rollout.
    """

    score: str = field(
        default="log_likelihood", metadata={"help": "s: log_likelihood or likelihood_ratio."}
    )
    tau: float = field(default=10.0, metadata={"help": "tau > 0 of (6.82), or 0 for (6.81)."})
    delta: float = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=1e-4, metadata={"help": "delta: KL radius per token, in [0, 1)."}
    )
    kl_penalty: float = field(default=500.0, metadata={"help": "beta of (6.85), as printed."})
    kl_estimator: str = field(default="k3", metadata={"help": "k3 or k1."})
    normalizer: str = field(default="valid", metadata={"help": "valid or all questions."})
    reward_threshold: float | None = field(
        default=None, metadata={"help": "Rewards at or above it count as right."}
    )
    loss_type: str = field(default="disco", metadata={"help": "disco; other losses are refused."})

    def __post_init__(self) -> None:
        self._refuse_losses_of_grpo()
        self._require_whole_groups()
        super().__post_init__()
        updates = self.steps_per_generation * self.num_iterations  # pyright: ignore[reportOptionalOperand]
        if self.kl_penalty and updates <= self.gradient_accumulation_steps:
            logger.warning(
                "steps_per_generation=%s x num_iterations=%s is one optimizer step per generation: "
                "it starts at the policy that generated the answers, KL is 0 and the trust region "
                "never acts; set steps_per_generation above gradient_accumulation_steps=%s",
                self.steps_per_generation,
                self.num_iterations,
                self.gradient_accumulation_steps,
            )

    def _refuse_losses_of_grpo(self) -> None:
        if self.loss_type != "disco":
            raise ValueError(
                f"got loss_type={self.loss_type!r}, but this trainer has one loss, DisCO's; drop "
                "loss_type, or use trl.GRPOTrainer for that one"
            )
        if self.beta != 0:
            raise ValueError(
                f"beta must be 0, got {self.beta}: DisCO has no KL to a reference model; its trust "
                "region around the old policy is set by delta and kl_penalty"
            )
        if self.delta is None or not 0 <= self.delta < 1:
            raise ValueError(
                f"delta must be in [0, 1), got {self.delta}: it is the mean KL per token (1e-4), "
                "not GRPOConfig's clipping bound of that name, for which DisCO has no place"
            )
        if self.mask_truncated_completions:
            raise ValueError(
                "mask_truncated_completions=True leaves completions without tokens, which have no "
                "score; set it to False: an answer that was cut off is graded like any other"
            )
        for name in _UNUSED:
            value, default = getattr(self, name), GRPOConfig.__dataclass_fields__[name].default
            if value != default:
                raise ValueError(
                    f"{name}={value!r} is a setting of GRPO's losses and would do nothing here; "
                    f"leave it at {default!r}"
                )

    def _require_whole_groups(self) -> None:
        count, size = self.num_generations or 0, self.per_device_train_batch_size
        if count < 2:
            raise ValueError(
                f"num_generations must be at least 2, got {self.num_generations}; a question is "
                "learnt from by comparing its right answers with its wrong ones"
            )
        if size % count:
            raise ValueError(
                f"per_device_train_batch_size={size} splits the {count} answers to a question "
                f"over micro-batches; make it a multiple of num_generations={count}, or use "
                "llm_xrisk.trainers.DisCOTrainer, which takes any"
            )


class DisCOGRPOTrainer(GRPOTrainer):
    r"""TRL's GRPOTrainer with the objective of DisCO (6.83)-(6.85).

    Everything of GRPOTrainer works as there: rewards, tools, environments, PEFT, DeepSpeed, vLLM.
    A reward of 1 is a right answer, 0 a wrong one; if an answer to a question cannot be graded
    (None), the question leaves the objective but not the KL.

    Old log-probs are the trainer's own, taken when the answers were generated; vLLM's importance
    sampling ratio is logged and has no part in the loss. With gradient accumulation each
    micro-batch (of all processes) has its own objective and its own hinge, and they are averaged.

    On a CPU, ``use_vllm=True`` with ``vllm_mode="colocate"`` works too: vLLM repacks its weights
    there, so they are reloaded, tied output heads included, in place of TRL's plain copy.

    Args:
        model: As for GRPOTrainer.
        reward_funcs: As for GRPOTrainer.
        args: Settings; a :class:`DisCOGRPOConfig`.
        *others: As for GRPOTrainer.
        **options: As for GRPOTrainer.

    Raises:
        TypeError: ``args`` is not a :class:`DisCOGRPOConfig`.
        ValueError: rewards other than 0 and 1 without ``reward_threshold``.

    Example:
        In place of GRPOTrainer::

            args = DisCOGRPOConfig("out", steps_per_generation=4)
            DisCOGRPOTrainer(model, arithmetic_reward, args, train_dataset=questions).train()

    Metrics: GRPOTrainer's rewards, lengths, entropy and sampling/*; of the objective: objective,
    discriminative, kl/k3 with kl/standard_error, kl/multiplier, kl/violated,
    groups/valid_fraction, negatives/effective_fraction, score/right, score/wrong.
    """

    _tag_names = ("trl", "disco", "llm-xrisk")
    _name = "DisCO"
    _paper = {  # noqa: RUF012
        "title": "DisCO: Reinforcing Large Reasoning Models with Discriminative Constrained "
        "Optimization",
        "id": "2505.12366",
    }
    args: DisCOGRPOConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Any = None,
        args: DisCOGRPOConfig | None = None,
        *others: Any,
        **options: Any,
    ) -> None:
        args = args or DisCOGRPOConfig("disco-output")
        if not isinstance(args, DisCOGRPOConfig):
            raise TypeError(
                f"args must be a DisCOGRPOConfig, got {type(args).__name__}; its settings take the "
                "same names, and those of GRPO's loss are refused"
            )
        self.objective: SequenceObjective = OBJECTIVES["DisCO"](  # pyright: ignore
            args.score,
            args.tau or None,
            delta=args.delta,
            kl_penalty=args.kl_penalty,
            kl_estimator=args.kl_estimator,
            normalizer=args.normalizer,
        )
        with _replaced("VLLMGeneration", _ReloadingVLLM):
            super().__init__(model, reward_funcs, args, *others, **options)  # pyright: ignore

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        # GRPOTrainer shuffles the answers of all questions before it cuts them into micro-batches
        with _replaced("shuffle_sequence_dict", lambda rows: rows):
            return super()._prepare_inputs(generation_batch)

    def _calculate_rewards(self, *args: Any, **options: Any) -> Tensor:
        self._rewards = super()._calculate_rewards(*args, **options)
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        training = self.model.training  # pyright: ignore[reportOptionalMemberAccess]
        count: Any = self.num_generations if training else self.num_generations_eval
        rows = len(output["completion_ids"])
        start = self.accelerator.process_index * rows  # rewards are those of all processes
        output["targets"] = self._targets(self._rewards, count)[start : start + rows]
        output["group"] = torch.arange(start, start + rows, device=self._rewards.device) // count
        return output

    def _targets(self, rewards: Tensor, num_generations: int) -> Tensor:
        """(R,) 1 for right and 0 for wrong from (R, functions), NaN where not graded."""
        known = ~rewards.isnan()
        totals = (rewards * self.reward_weights.to(rewards.device)).nansum(-1)
        if self.args.reward_threshold is not None:
            totals = (totals >= self.args.reward_threshold).to(totals.dtype)
        elif bool(((totals != 0) & (totals != 1)).any()):
            values = sorted(set(totals.tolist()) - {0.0, 1.0})
            raise ValueError(
                f"the rewards of a completion sum to {values[0]}; right and wrong need 0 or 1. Set "
                "reward_threshold (for example 0.5), or keep format and length rewards apart"
            )
        graded = known.any(-1).view(-1, num_generations).all(-1)
        return torch.where(graded.repeat_interleave(num_generations), totals, 0.0)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        mode = "train" if self.model.training else "eval"  # pyright: ignore
        log_probs, mask, entropies, aux_loss = self._token_log_probs(model, inputs)
        old = inputs.get("old_per_token_logps")
        old = log_probs.detach() if old is None else old.float()
        rows = self.objective.row_scores(log_probs, mask, old, inputs["targets"])
        length = mask.sum(-1).to(log_probs.dtype)
        output = self.objective(
            targets=inputs["targets"], group=inputs["group"], length=length, **rows
        )
        loss, metrics = output.loss, dict(output.metrics)
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss
            metrics["aux_loss"] = self.accelerator.gather_for_metrics(aux_loss.detach()).mean()  # pyright: ignore
        totals = torch.stack([(entropies * mask).sum(), length.sum()])
        totals = self.accelerator.reduce(totals, reduction="sum")
        metrics["entropy"] = totals[0] / totals[1].clamp(min=1)  # pyright: ignore
        for name, value in metrics.items():
            self._metrics[mode][name].append(value.item())
        # GRPOTrainer's losses are divided where they are computed; evaluation accumulates nothing
        return loss / (self.current_gradient_accumulation_steps if mode == "train" else 1)

    def _token_log_probs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Log-probs, mask, entropies (R, T) of the completions, and the loss of MoE routers."""
        completion, mask = inputs["completion_ids"], inputs["completion_mask"]
        # images and what belongs to them go along by the names under which TRL keeps them
        takes = inspect.signature(self._get_per_token_logps_and_entropies).parameters
        log_probs, entropies, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], completion], dim=1),
            torch.cat([inputs["prompt_mask"], mask], dim=1),
            completion.shape[1],
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: value for name, value in inputs.items() if name in takes},
        )
        mask = (mask * inputs.get("tool_mask", 1)).bool()
        return log_probs.float(), mask, entropies.detach(), aux_loss  # pyright: ignore


class _ReloadingVLLM(grpo_trainer.VLLMGeneration):
    """TRL's vLLM back end, whose weights also arrive on a CPU."""

    def _init_vllm(self) -> None:
        share_the_cpu()
        super()._init_vllm()

    def sync_weights(self) -> None:
        if self.mode != "colocate" or self.accelerator.device.type != "cpu":
            super().sync_weights()
            return
        weights = iter_named_parameters(self.model)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.apply_model(refresh_tied_heads)
        self.llm.reset_prefix_cache()


@contextmanager
def _replaced(name: str, value: Any) -> Iterator[None]:
    """Another value for one of grpo_trainer's globals: the only way in that it leaves."""
    kept = getattr(grpo_trainer, name)
    setattr(grpo_trainer, name, value)
    try:
        yield
    finally:
        setattr(grpo_trainer, name, kept)
