"""Settings of the main job, with defaults for the embedded model on two CPU cores."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class QuickstartConfig:
    """The main job: evaluate a base, sample negatives, train by DFT and DisCO, evaluate again.

    Args:
        output_dir: Where stages keep their results; a second run reuses what is finished.
        model_name_or_path: The base; the embedded calculator by default.
        seed: First seed; further ones follow it.
        seeds: Number of seeds.
        controls: Add SFT at DFT's steps, GRPO at DisCO's rollouts and the base sampled colder.
        eval_questions: Held-out questions of every evaluation.
        eval_samples: Sampled answers per question.
        pool_questions: Training questions with negatives.
        dft_steps: Optimizer steps of DFT and SFT.
        dft_batch: Prompts per step.
        dft_learning_rate: Step size of DFT and SFT.
        num_negatives: Negatives per prompt and visit.
        disco_steps: Optimizer steps of DisCO and GRPO.
        disco_questions: Questions per step.
        num_generations: Answers per question.
        updates_per_rollout: Optimizer steps per rollout.
        disco_learning_rate: Step size of DisCO and GRPO.
        score: DisCO's score.
        tau: DisCO's temperature; 0 is L_1.
        delta: Trust region of DisCO, KL per token.
        max_new_tokens: Longest answer.
    """

    output_dir: str = field(default="outputs/quickstart", metadata={"help": "Where results go."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The base; the embedded calculator by default."}
    )
    seed: int = field(default=0, metadata={"help": "First seed."})
    seeds: int = field(default=1, metadata={"help": "Number of seeds."})
    controls: bool = field(default=False, metadata={"help": "Add SFT, GRPO and a colder base."})
    eval_questions: int = field(default=400, metadata={"help": "Held-out questions."})
    eval_samples: int = field(default=16, metadata={"help": "Sampled answers per question."})
    pool_questions: int = field(default=2048, metadata={"help": "Questions with negatives."})
    dft_steps: int = field(default=64, metadata={"help": "Steps of DFT and SFT."})
    dft_batch: int = field(default=64, metadata={"help": "Prompts per step."})
    dft_learning_rate: float = field(default=1e-4, metadata={"help": "Of DFT and SFT."})
    num_negatives: int = field(default=2, metadata={"help": "Negatives per prompt and visit."})
    disco_steps: int = field(default=50, metadata={"help": "Steps of DisCO and GRPO."})
    disco_questions: int = field(default=48, metadata={"help": "Questions per step."})
    num_generations: int = field(default=8, metadata={"help": "Answers per question."})
    updates_per_rollout: int = field(default=2, metadata={"help": "Steps per rollout."})
    disco_learning_rate: float = field(default=1e-4, metadata={"help": "Of DisCO and GRPO."})
    score: str = field(default="log_likelihood", metadata={"help": "DisCO's score."})
    tau: float = field(default=1.0, metadata={"help": "DisCO's tau; 0 is L_1."})
    delta: float = field(default=1e-3, metadata={"help": "DisCO's trust region, KL per token."})
    max_new_tokens: int = field(default=12, metadata={"help": "Longest answer."})
