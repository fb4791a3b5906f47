"""Settings of the trainers: what ``TrainingArguments`` lack, each with its symbol and range."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from llm_xrisk.rollout.engine import SamplingConfig

_LOSS_TYPE_ERROR = (
    'got loss_type={!r}; in TRL that chooses a loss of SFTTrainer or GRPOTrainer (there "dft" is '
    "Dynamic Fine-Tuning, another method). Drop loss_type: this trainer's objective is set by "
    "`objective`"
)


@dataclass
class ScoreConfig(TrainingArguments):
    """What all trainers of sequence objectives share.

    Defaults that differ from ``TrainingArguments``: gradient checkpointing on, bf16 where the
    device supports it, unused columns kept, and NaN losses shown instead of filtered.

    Args:
        model_init_kwargs: For ``from_pretrained`` when the model is given by name.
        padding_side: "left" aligns completions, so that fewer positions get logits; "right"
            pads whole rows.
        disable_dropout: Set dropout to 0. Scores are taken without it.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
    ]

    bf16: bool | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, metadata={"help": "bfloat16 autocast; by default where a GPU supports it."}
    )
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Recompute activations in the backward pass."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Keep the columns that collators need."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Replace NaN losses in the log by the last mean."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every so many steps (or that share of all steps)."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "For from_pretrained, as JSON."}
    )
    padding_side: str = field(
        default="left",
        metadata={"help": "left aligns completions (fewer logits), right pads whole rows."},
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Set dropout to 0: scores are taken without it."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint, or true: the last complete one."}
    )
    loss_type: str | None = field(
        default=None, metadata={"help": "Not used; refused, because TRL means something else."}
    )

    def __post_init__(self) -> None:
        if self.loss_type is not None:
            raise ValueError(_LOSS_TYPE_ERROR.format(self.loss_type))
        if self.padding_side not in ("left", "right"):
            raise ValueError(f'padding_side must be "left" or "right", got {self.padding_side!r}')
        if self.bf16 is None:
            gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = bool(gpu and torch.cuda.is_bf16_supported() and not self.fp16)
        words = {"true": True, "false": False}  # as a command line gives them
        self.resume_from_checkpoint = words.get(  # pyright: ignore[reportAttributeAccessIssue]
            str(self.resume_from_checkpoint).lower(), self.resume_from_checkpoint
        )
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # it would only warn
        super().__post_init__()


@dataclass
class DFTConfig(ScoreConfig):
    """Settings of :class:`~llm_xrisk.trainers.DFTTrainer` (*Discriminative* fine-tuning).

    A batch size counts prompts; each brings 1 + ``num_negatives`` rows.

    Args:
        objective: "DFT" (6.69: summed scores, weights 1 / pi_ref) or "DFT2" (6.71: scores
            averaged over tokens, no reference).
        gamma: gamma in (0, 1], weight of the new mini-batch value; by default the objective's.
        gamma_decay_epochs: E > 0 lets gamma fall from 1 to ``gamma`` over E epochs by a cosine.
        tau: Temperature > 0; by default the objective's.
        num_negatives: m, negatives per prompt and visit.
        u_init: "one" (Algorithm 36) or "first_batch".
        max_length: Longest prompt + completion in tokens; longer completions are cut and get no
            end-of-sequence token.
        refresh_negatives: k > 0 draws each mini-batch's negatives anew from the policy of at most
            k steps ago; 0 uses the data set's.
        inert_threshold: Warn once when the effective fraction of negatives exceeds it.
    """

    objective: str = field(default="DFT", metadata={"help": "DFT or DFT2."})
    gamma: float | None = field(
        default=None, metadata={"help": "gamma in (0, 1]: weight of the new value (0.85, 0.9)."}
    )
    gamma_decay_epochs: float = field(
        default=0.0, metadata={"help": "E: cosine from 1 to gamma over E epochs; 0 is constant."}
    )
    tau: float | None = field(
        default=None, metadata={"help": "tau > 0 (1.0 for DFT, 0.3 for DFT2)."}
    )
    num_negatives: int = field(default=2, metadata={"help": "m: negatives per prompt and visit."})
    u_init: str = field(default="one", metadata={"help": "u_0: one, or first_batch."})
    max_length: int = field(default=1024, metadata={"help": "Longest prompt + completion, tokens."})
    refresh_negatives: int = field(
        default=0, metadata={"help": "k: draw negatives from the policy of k steps ago; 0 is off."}
    )
    inert_threshold: float = field(
        default=0.99, metadata={"help": "Warn when negatives weigh this equally (1 is uniform)."}
    )

    def __post_init__(self) -> None:
        if self.objective not in ("DFT", "DFT2"):
            raise ValueError(f'objective must be "DFT" or "DFT2", got {self.objective!r}')
        if self.num_negatives < 0 or self.refresh_negatives < 0:
            raise ValueError(
                "num_negatives and refresh_negatives must not be negative, got "
                f"{self.num_negatives} and {self.refresh_negatives}"
            )
        if self.dataloader_persistent_workers and self.dataloader_num_workers > 0:
            raise ValueError(
                "got dataloader_persistent_workers=True: such workers never learn which epoch it "
                "is, and would draw the same negatives in each; leave it off"
            )
        super().__post_init__()


@dataclass
class DisCOConfig(ScoreConfig):
    """Settings of :class:`~llm_xrisk.trainers.DisCOTrainer`, DisCO in full.

    *Discriminative Constrained Optimization*, RL with verifiable rewards.

    A batch size counts completions; ``per_device_train_batch_size`` x
    ``gradient_accumulation_steps`` must be a multiple of ``num_generations``.

    Args:
        objective: "DisCO", or "GRPO", "DrGRPO", "DAPO" for comparison.
        score: "log_likelihood" (log-L) or "likelihood_ratio" (L-ratio); DisCO only.
        tau: Temperature of (6.82); 0 is (6.81), without it. The authors use 10 and 1.
        delta: Radius of the trust region: mean KL(old || new) per token.
        kl_penalty: beta of (6.85) as the book prints it; 500 is the authors' 1e3 with their half.
        kl_estimator: "k3" or "k1".
        normalizer: "valid" averages over questions with right and wrong answers, "all" over all.
        reward_threshold: Rewards at or above it are right; by default they must be 0 or 1.
        max_prompt_length: Longer prompts are refused.
    """

    objective: str = field(default="DisCO", metadata={"help": "DisCO, GRPO, DrGRPO or DAPO."})
    score: str = field(
        default="log_likelihood", metadata={"help": "s: log_likelihood or likelihood_ratio."}
    )
    tau: float = field(default=10.0, metadata={"help": "tau > 0 of (6.82), or 0 for (6.81)."})
    delta: float = field(default=1e-4, metadata={"help": "delta: KL radius per token."})
    kl_penalty: float = field(default=500.0, metadata={"help": "beta of (6.85), as printed."})
    kl_estimator: str = field(default="k3", metadata={"help": "k3 or k1."})
    normalizer: str = field(default="valid", metadata={"help": "valid or all questions."})
    reward_threshold: float | None = field(
        default=None, metadata={"help": "Rewards at or above it count as right."}
    )
    max_prompt_length: int = field(default=1024, metadata={"help": "Longest prompt in tokens."})
    learning_rate: float = field(default=1e-6, metadata={"help": "AdamW's step size."})
    lr_scheduler_type: str = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="constant", metadata={"help": "Schedule of the learning rate."}
    )

    def __post_init__(self) -> None:
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "reward"  # evaluation has no loss
        super().__post_init__()


@dataclass
class RowConfig(ScoreConfig):
    """What the trainers of plain rows share.

    Defaults that differ from :class:`ScoreConfig`: unused columns are dropped, dropout stays,
    activations are kept.

    Args:
        objective: A name in :data:`~llm_xrisk.objectives.OBJECTIVES`.
        objective_kwargs: Further settings of the objective, as JSON.
        gamma: gamma in (0, 1], weight of the new mini-batch value; by default the objective's.
        gamma_decay_epochs: E > 0 lets gamma fall from 1 to ``gamma`` over E epochs by a cosine.
        tau: Temperature > 0; by default the objective's.
        objective_lr: Step size of what the objective learns itself, if anything: the a and b of
            ``AUCMargin``, a global temperature.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *ScoreConfig._VALID_DICT_FIELDS,
        "objective_kwargs",
    ]

    objective: str = field(default="", metadata={"help": "A name in llm_xrisk.objectives."})
    objective_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further settings of the objective, as JSON."}
    )
    gamma: float | None = field(
        default=None, metadata={"help": "gamma in (0, 1]: weight of the new value."}
    )
    gamma_decay_epochs: float = field(
        default=0.0, metadata={"help": "E: cosine from 1 to gamma over E epochs; 0 is constant."}
    )
    tau: float | None = field(default=None, metadata={"help": "tau > 0."})
    objective_lr: float = field(
        default=1e-2, metadata={"help": "Step size of the objective's own parameters, if any."}
    )
    remove_unused_columns: bool | None = field(
        default=True, metadata={"help": "Drop columns that neither model nor objective takes."}
    )
    disable_dropout: bool = field(
        default=False, metadata={"help": "Set dropout to 0; else both passes draw the same."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass."}
    )


@dataclass
class ClassificationConfig(RowConfig):
    """Settings of :class:`~llm_xrisk.trainers.ClassificationTrainer`.

    Args:
        objective: "AveragePrecision", "PairwiseAUC", "AUCMargin", "OPAUCSoft", "TPAUCSoft", ...
        sampling_rate: Share of positives in each batch, in (0, 1), by a ``DualSampler``; by
            default rows come shuffled. Tell ``AveragePrecision`` the data's share by
            ``objective_kwargs={"prior": ...}``.
    """

    objective: str = field(
        default="AveragePrecision", metadata={"help": "A name in llm_xrisk.objectives."}
    )
    sampling_rate: float | None = field(
        default=None, metadata={"help": "Share of positives in each batch; default: shuffled."}
    )


@dataclass
class ContrastiveConfig(RowConfig):
    """Settings of :class:`~llm_xrisk.trainers.ContrastiveTrainer`.

    Args:
        objective: "GlobalContrastive" (two views), "RobustGlobalContrastive", "GlobalCLIP" (two
            modalities), or the mini-batch losses "InfoNCE" and "CLIPLoss".
        temperature: "constant"; for GlobalCLIP also "global" (one learned tau, FastCLIP-v3) and
            "individual" (one for each sample and side, v2), which begin at ``tau``.
        rho: Radius of the divergence that learned temperatures trade against; 6 to 16 in the
            authors' recipes; by default 6.5, and RobustGlobalContrastive's own.
    """

    objective: str = field(
        default="GlobalContrastive", metadata={"help": "A name in llm_xrisk.objectives."}
    )
    temperature: str = field(
        default="constant", metadata={"help": "constant; GlobalCLIP: also global, individual."}
    )
    rho: float | None = field(
        default=None, metadata={"help": "rho of learned temperatures, >= 0 (6.5; the objective's)."}
    )

    def __post_init__(self) -> None:
        if self.temperature not in ("constant", "global", "individual"):
            raise ValueError(
                "temperature must be constant, global or individual, got "
                f"{self.temperature!r}; a number is set by tau"
            )
        learns = self.temperature != "constant" or self.objective == "RobustGlobalContrastive"
        if self.rho is not None and not learns:
            raise ValueError(
                f"got rho={self.rho} and a constant temperature, which has none; drop it"
            )
        if self.temperature != "constant" and self.objective != "GlobalCLIP":
            raise ValueError(
                f"got temperature={self.temperature!r} with {self.objective}; learned temperatures "
                "are GlobalCLIP's here (RobustGlobalContrastive has its own), or pass an objective"
            )
        super().__post_init__()


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are generated for training.

    Keep top_p = 1 and top_k = 0: the scores are those of the untruncated policy.

    Args:
        max_new_tokens: Longest completion.
        temperature: Of sampling and of scoring, > 0.
        top_p: Nucleus, in (0, 1].
        top_k: Likeliest tokens only; 0 is off.
        num_generations: Completions per question, at least 2.
        updates_per_rollout: Optimizer steps on the completions of one rollout. The first sees the
            policy that generated them, so the trust region acts from the second on.
        rollout: Engine, "transformers" or "vllm".
        generation_batch_size: Rows generated at once by the transformers engine.
        refill_tokens: Tokens each process may spend, per rollout, on further questions in place of
            those whose answers are all right or all wrong; 0 keeps them.
        vllm_kwargs: For ``vllm.LLM``, as JSON.

    Raises:
        ValueError: a setting out of range.
    """

    max_new_tokens: int = field(default=256, metadata={"help": "Longest completion in tokens."})
    temperature: float = field(default=0.6, metadata={"help": "Of sampling and scoring, > 0."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus in (0, 1]; 1 is unbiased."})
    top_k: int = field(default=0, metadata={"help": "Likeliest tokens only; 0 is off, unbiased."})
    num_generations: int = field(default=8, metadata={"help": "Completions per question."})
    updates_per_rollout: int = field(default=4, metadata={"help": "Optimizer steps per rollout."})
    rollout: str = field(default="transformers", metadata={"help": "transformers or vllm."})
    generation_batch_size: int = field(default=64, metadata={"help": "Rows generated at once."})
    refill_tokens: int = field(
        default=0, metadata={"help": "Token budget for replacing questions without a signal."}
    )
    vllm_kwargs: str | None = field(
        default=None, metadata={"help": "Further arguments of vllm.LLM, as JSON."}
    )

    def __post_init__(self) -> None:
        self.sampling(0)  # checks the part that says how tokens are drawn
        if self.temperature == 0:
            raise ValueError("temperature must be positive to train with, got 0 (greedy)")
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations must be at least 2, got {self.num_generations}; a question is "
                "learnt from by comparing its right answers with its wrong ones"
            )
        if self.updates_per_rollout < 1 or self.refill_tokens < 0:
            raise ValueError(
                "need updates_per_rollout >= 1 and refill_tokens >= 0, got "
                f"{self.updates_per_rollout} and {self.refill_tokens}"
            )

    def sampling(self, seed: int) -> SamplingConfig:
        """How tokens are drawn, for an engine."""
        return SamplingConfig(self.max_new_tokens, self.temperature, self.top_p, self.top_k, seed)


def require_config(args: Any, kind: type[ScoreConfig]) -> None:
    """Refuse settings of another trainer.

    Raises:
        ValueError: ``args`` are not of the kind this trainer takes.
    """
    if not isinstance(args, kind):
        loss_type = getattr(args, "loss_type", None)
        raise ValueError(
            f"got args of type {type(args).__name__} (loss_type={loss_type!r}), needs a "
            f'{kind.__name__}; TRL\'s loss_type="dft" is Dynamic Fine-Tuning, another method: '
            f"build a {kind.__name__} and choose by its `objective`"
        )
