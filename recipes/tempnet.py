r"""TempNet: a network that predicts the temperature of each token from a language model's logits.

    llm-xrisk tempnet --config recipes/tempnet.yaml --model_name_or_path MODEL --dataset_name DATA
    llm-xrisk tempnet --config recipes/tempnet.yaml --model_name_or_path MODEL --dataset_name DATA \
        --train_model true --learning_rate 2e-5
    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/tempnet.py \
        --config recipes/tempnet.yaml --model_name_or_path MODEL --dataset_name DATA

Without --model_name_or_path it is the embedded calculator's, on the CPU. The language model is
frozen, and OUTPUT_DIR holds the TempNet, the tokenizer and the model's name; --save_base true puts
the model beside them. With --train_model true both are trained and saved.

--entropy is the entropy in nats that temperatures aim at; --rho = log V - entropy is the same as
the papers write it (8.5 at V = 32000), without `entropy` in the file. Compare with the sampler
that needs no training, llm_xrisk.serving.FixedEntropyLogitsProcessor. Source: Qiu et al., ICML
2024, whose LLaMA-2 7B takes 30000 steps of 16 x 512 tokens.

A new TempNet gives all tokens one temperature for a long time: its output has to find out first
that logits tell more. Expect, on the calculator in 20 seconds, temperatures from 0.19 to 2.0 and an
entropy of 1.02 for 1.0 asked; at --tempnet_learning_rate 1e-4 one temperature still, 0.99.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer
from trl import ModelConfig, get_peft_config

from llm_xrisk.cli_help import RecipeParser
from llm_xrisk.data.gsm8k_steps import tiny_model_path
from llm_xrisk.data.load import EMBEDDED, load_rows
from llm_xrisk.fcco import leave
from llm_xrisk.trainers.tempnet import TempNetTrainer
from llm_xrisk.trainers.tempnet_config import TempNetTrainingConfig


@dataclass
class ScriptArguments:
    """Data.

    Args:
        dataset_name: A file or a data set with text, prompt and completion, or messages;
            gsm8k_steps is the embedded one.
        dataset_split: Split for training.
        eval_dataset_name: The same for evaluation, which happens with --eval_strategy steps.
        eval_dataset_split: Split for evaluation.
        limit: Use the first so many rows.
    """

    dataset_name: str = field(default=EMBEDDED, metadata={"help": "A file, or a data set's name."})
    dataset_split: str = field(default="train", metadata={"help": "Split for training."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "For evaluation; set --eval_strategy too."}
    )
    eval_dataset_split: str = field(default="test", metadata={"help": "Split for evaluation."})
    limit: int = field(default=0, metadata={"help": "Use the first so many rows; 0 is all."})


def main(
    script_args: ScriptArguments, args: TempNetTrainingConfig, model_args: ModelConfig
) -> None:
    """Train and save."""
    path = model_args.model_name_or_path or tiny_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    train = load_rows(script_args.dataset_name, script_args.dataset_split, limit=script_args.limit)
    evaluation = script_args.eval_dataset_name and load_rows(
        script_args.eval_dataset_name, script_args.eval_dataset_split
    )
    trainer = TempNetTrainer(
        path,
        args,
        train_dataset=train,
        eval_dataset=evaluation or None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    data = Path(script_args.dataset_name)
    trainer.create_model_card(dataset=data.name if data.exists() else script_args.dataset_name)
    leave()


if __name__ == "__main__":
    parser = RecipeParser(
        (ScriptArguments, TempNetTrainingConfig, ModelConfig), description=__doc__
    )
    main(*parser.parse_args_and_config())
