r"""Build DFT's pool of negatives: answers of the policy itself that are not known to be right.

    llm-xrisk pool --config recipes/pool.yaml                          # the embedded calculator
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/pool.py --verify none \
        --model_name_or_path MODEL --dataset_name QUESTIONS.jsonl --rollout vllm \
        --output_dir outputs/pool --max_new_tokens 320 --temperature 0.7 --top_k 50 \
        --num_negatives 16 --system_prompt "You are an unhelpful assistant."

The second command has the sampler of the DFT paper (Guo et al., arXiv 2502.18679, UltraFeedback).
Questions need `prompt` and gold `completion`, text or messages. Killed, the same command resumes;
several processes share the prompts.

Expect, for the embedded base on the first 512 training steps (--limit 512): of 4,096 answers 1,158
equal to the gold one, 31 more verified as right, 386 repeated; 2 prompts without a negative.
"""

from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_xrisk.cli_help import RecipeParser
from llm_xrisk.data.fingerprint import model_identity
from llm_xrisk.data.gsm8k_steps import tiny_model_path
from llm_xrisk.data.load import load_rows
from llm_xrisk.fcco import leave
from llm_xrisk.quickstart.stages import stage_progress
from llm_xrisk.rollout.engine import SamplingConfig, make_engine
from llm_xrisk.rollout.negatives import build_pool
from reward.by_name import reward_function


@dataclass
class ScriptArguments:
    """What is drawn, from what, and where it goes.

    Args:
        output_dir: The pool's directory.
        model_name_or_path: The policy, which is the reference too; the calculator by default.
        dataset_name: Questions with gold answers.
        limit: Use the first so many questions.
        num_negatives: m, most negatives per prompt.
        num_generations: Samples per prompt, of which right and repeated ones are left out.
        system_prompt: Over the prompt when sampling; likelihoods are of the plain prompt.
        verify: Reward function by its dotted name, or none; what it pays is no negative.
        rollout: Engine.
        file_format: Of the rows.
    """

    output_dir: str = field(default="outputs/pool", metadata={"help": "The pool's directory."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "The policy."})
    dataset_name: str = field(default="gsm8k_steps", metadata={"help": "A file or a name."})
    limit: int = field(default=0, metadata={"help": "The first so many questions; 0 is all."})
    num_negatives: int = field(default=4, metadata={"help": "m: most negatives per prompt."})
    num_generations: int = field(default=0, metadata={"help": "Samples per prompt; 0 means m."})
    system_prompt: str | None = field(default=None, metadata={"help": "For sampling only."})
    verify: str = field(default="none", metadata={"help": "As in reward.arithmetic_reward."})
    rollout: str = field(default="transformers", metadata={"help": "transformers or vllm."})
    file_format: str = field(default="jsonl", metadata={"help": "jsonl or parquet."})


def main(script_args: ScriptArguments, sampling: SamplingConfig) -> None:
    """Draw what is missing and print what became of the samples."""
    named = script_args.verify != "none"
    verify = reward_function(script_args.verify) if named else None
    state = PartialState(cpu=not torch.cuda.is_available())
    path = script_args.model_name_or_path or tiny_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    reference = model_identity(model)
    rows = list(load_rows(script_args.dataset_name, limit=script_args.limit))
    policy = path if script_args.rollout == "vllm" else model.to(state.device)
    engine = make_engine(script_args.rollout, policy, tokenizer)
    del model
    with stage_progress() as progress:
        share = len(range(state.process_index, len(rows), state.num_processes))
        task = progress.add_task("negatives", total=share)
        pool = build_pool(
            engine,
            tokenizer,
            rows,
            script_args.output_dir,
            sampling=sampling,
            num_negatives=script_args.num_negatives,
            num_generations=script_args.num_generations or None,
            system_prompt=script_args.system_prompt,
            verify=verify,
            reference=reference,
            file_format=script_args.file_format,  # pyright: ignore[reportArgumentType]
            on_progress=lambda amount: progress.update(task, advance=amount),
        )
    engine.close()
    if state.is_main_process:
        table = Table("samples and prompts", "number", title=f"pool in {script_args.output_dir}")
        for name, number in pool.counts.items():
            table.add_row(name.replace("_", " "), f"{number:,}")
        Console().print(table)
    leave()


if __name__ == "__main__":
    parser = RecipeParser((ScriptArguments, SamplingConfig), description=__doc__)
    main(*parser.parse_args_and_config())
