r"""DRRHO: fine-tuning that weighs rows by their loss above a reference model's (book section 6.9).

    llm-xrisk drrho --config recipes/drrho.yaml --dataset_name DATA --reference_model REFERENCE
    llm-xrisk drrho --config recipes/drrho.yaml --reference_model REFERENCE \
        --objective CVaRDRO --alpha 0.2
    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/drrho.py \
        --config recipes/drrho.yaml --model_name_or_path MODEL --dataset_name DATA

Without --model_name_or_path it trains the embedded calculator on the CPU. Without
--reference_model the reference is the model as training starts. Its losses are computed once and
kept in OUTPUT_DIR/reference_losses.safetensors; runs that share --reference_cache share them.

Compare with --use_reference false (DRO), --objective CVaRDRO --alpha 1 --use_reference false
(plain fine-tuning) and --selection rho_topk (RHO-LOSS). Source: Wei et al., arXiv 2505.06699,
whose experiments are on CLIP; there are no published numbers for language models.
"""

from dataclasses import dataclass, field

from transformers import AutoTokenizer
from trl import ModelConfig, get_peft_config

from llm_xrisk.cli_help import RecipeParser
from llm_xrisk.data.gsm8k_steps import tiny_model_path
from llm_xrisk.data.load import load_rows
from llm_xrisk.fcco import leave
from llm_xrisk.trainers.drrho import DRRHOTrainer
from llm_xrisk.trainers.drrho_config import DRRHOConfig


@dataclass
class ScriptArguments:
    """Data.

    Args:
        dataset_name: A file or a data set with prompt and completion, or messages;
            gsm8k_steps is the embedded one.
        dataset_split: Split for training.
        eval_dataset_name: The same for evaluation, which happens with --eval_strategy steps.
        eval_dataset_split: Split for evaluation.
        limit: Use the first so many rows.
    """

    dataset_name: str = field(
        default="gsm8k_steps", metadata={"help": "A file, or a data set's name."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split for training."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "For evaluation; set --eval_strategy too."}
    )
    eval_dataset_split: str = field(default="test", metadata={"help": "Split for evaluation."})
    limit: int = field(default=0, metadata={"help": "Use the first so many rows; 0 is all."})


def main(script_args: ScriptArguments, args: DRRHOConfig, model_args: ModelConfig) -> None:
    """Train and save."""
    path = model_args.model_name_or_path or tiny_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    train = load_rows(script_args.dataset_name, script_args.dataset_split, limit=script_args.limit)
    evaluation = script_args.eval_dataset_name and load_rows(
        script_args.eval_dataset_name, script_args.eval_dataset_split
    )
    trainer = DRRHOTrainer(
        path,
        args,
        train_dataset=train,
        eval_dataset=evaluation or None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    leave()


if __name__ == "__main__":
    parser = RecipeParser((ScriptArguments, DRRHOConfig, ModelConfig), description=__doc__)
    main(*parser.parse_args_and_config())
