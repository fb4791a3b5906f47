r"""Discriminative fine-tuning (DFT, Algorithm 36) of a language model on a pool of negatives.

    llm-xrisk pool --output_dir outputs/pool          # once: negatives and their likelihoods
    llm-xrisk dft --config recipes/dft.yaml --dataset_name outputs/pool
    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/dft.py \
        --config recipes/dft.yaml --model_name_or_path MODEL --dataset_name POOL

Without --model_name_or_path it trains the embedded calculator on the CPU. The YAML holds the
authors' settings for a 7B model (2 epochs, lr 2e-6, gamma 0.85, tau 1, 2 negatives).

Expect, on the embedded model: `auc` (gold answers against the base's samples) above the base's;
`make quickstart` prints both. Source: Guo et al., arXiv 2502.18679 (Mistral-7B on UltraFeedback:
average 62.84 against 61.79 by SFT; their numbers, one run).
"""

from dataclasses import dataclass, field

from transformers import AutoTokenizer
from trl import ModelConfig, get_peft_config

from llm_xrisk.cli_help import RecipeParser
from llm_xrisk.data.fingerprint import model_fingerprint
from llm_xrisk.data.gsm8k_steps import tiny_model_path
from llm_xrisk.data.load import load_rows
from llm_xrisk.fcco import leave
from llm_xrisk.rollout.engine import SamplingConfig
from llm_xrisk.rollout.weight_sync import gather_zero3
from llm_xrisk.trainers import DFTConfig, DFTTrainer
from llm_xrisk.trainers.loading import load_model


@dataclass
class ScriptArguments:
    """Data.

    Args:
        dataset_name: A pool (llm-xrisk pool), a file or a data set with prompt, completion and
            negatives, or prompt, chosen and rejected.
        dataset_split: Split for training.
        eval_dataset_name: The same for evaluation, which happens with --eval_strategy steps.
        eval_dataset_split: Split for evaluation.
        limit: Use the first so many rows.
        fresh_max_new_tokens: Longest fresh negative (with --refresh_negatives).
    """

    dataset_name: str = field(metadata={"help": "A pool, a file, or a data set's name."})
    dataset_split: str = field(default="train", metadata={"help": "Split for training."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "For evaluation; set --eval_strategy too."}
    )
    eval_dataset_split: str = field(default="test", metadata={"help": "Split for evaluation."})
    limit: int = field(default=0, metadata={"help": "Use the first so many rows; 0 is all."})
    fresh_max_new_tokens: int = field(default=256, metadata={"help": "Longest fresh negative."})


def main(script_args: ScriptArguments, args: DFTConfig, model_args: ModelConfig) -> None:
    """Train and save."""
    path = model_args.model_name_or_path or tiny_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = load_model(path, args.model_init_kwargs, None)
    args.model_init_kwargs = None
    train = load_rows(
        script_args.dataset_name,
        script_args.dataset_split,
        tokenizer=tokenizer,
        reference_model_fingerprint=model_fingerprint(model, gather=gather_zero3),
        limit=script_args.limit,
    )
    evaluation = script_args.eval_dataset_name and load_rows(
        script_args.eval_dataset_name, script_args.eval_dataset_split, tokenizer=tokenizer
    )
    trainer = DFTTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=evaluation or None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        sampling=SamplingConfig(script_args.fresh_max_new_tokens, temperature=1.0),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    leave()


if __name__ == "__main__":
    parser = RecipeParser((ScriptArguments, DFTConfig, ModelConfig), description=__doc__)
    main(*parser.parse_args_and_config())
