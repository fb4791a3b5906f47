r"""Hand a trained model over: an adapter or a checkpoint becomes a plain folder.

    llm-xrisk merge outputs/dft outputs/dft-merged             # an adapter into its base
    llm-xrisk merge outputs/disco/checkpoint-60 served --dtype bfloat16
    llm-xrisk merge ADAPTER OUTPUT --base_model MODEL          # where the base has moved
    vllm serve outputs/dft-merged                              # no PEFT, and not this package

It takes the folder of a LoRA adapter, of a model, a checkpoint-N (with DeepSpeed ZeRO-2 or ZeRO-3
shards alone too, if DeepSpeed is installed), or of a TempNet, which then stands beside its base
model. OUTPUT gets the weights, tokenizer, chat template, generation config, model card, and the
TempNet where there is one. It appears when it is complete and checked; one that is not empty is
refused, or replaced with --overwrite true if it holds a model.

Merging is done in float32 (4 bytes a parameter of memory) and the weights rounded once. Expect:
logits of the merged model within 1e-4 of the largest one of the source's, about 1e-6 as a rule, and
what is read back equal to what was merged, bit for bit. Both are checked and printed.
"""

import sys
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from transformers.utils import logging

from llm_xrisk.cli_help import RecipeParser
from llm_xrisk.trainers.merge import Merged, merge


@dataclass
class ScriptArguments:
    """What is handed over, and where to.

    Args:
        source: Adapter, model, checkpoint or TempNet; `llm-xrisk merge SOURCE OUTPUT` is short
            for both.
        output: Folder to write.
        base_model: In place of the base that the adapter or the TempNet names.
        dtype: Of the weights; by default the base model's.
        overwrite: Replace the model in the output folder.
    """

    source: str = field(metadata={"help": "Folder of an adapter, a model or a checkpoint."})
    output: str = field(metadata={"help": "Folder to write; new or empty."})
    base_model: str | None = field(
        default=None, metadata={"help": "In place of the base that the adapter names."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Of the weights; auto is the base model's."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the model in OUTPUT."})


def main(script_args: ScriptArguments) -> Merged:
    """Merge, check, and say how exact it is."""
    logging.disable_progress_bar()
    console = Console(soft_wrap=True, highlight=False)
    found = merge(
        script_args.source,
        script_args.output,
        base_model=script_args.base_model,
        dtype=None if script_args.dtype == "auto" else script_args.dtype,
        overwrite=script_args.overwrite,
        report=console.print,
    )
    if found.source.kind == "adapter":
        console.print(
            f"logits of the merged model against the adapter's, float32: largest difference "
            f"{found.merging:.1e}, tolerance {found.tolerance:.1e}"
        )
    tempnet = ", with its TempNet" if found.source.tempnet else ""
    console.print(
        f"{script_args.output}: {found.parameters:,} parameters in {found.dtype}{tempnet}; read "
        f"back bit for bit, logits within {found.difference:.1e} of the source's"
    )
    return found


def with_folders(arguments: list[str]) -> list[str]:
    """Take the two folders that stand first, without their options."""
    names = ("--source", "--output")
    for place, name in enumerate(names):
        if len(arguments) <= 2 * place or arguments[2 * place].startswith("-"):
            break
        arguments = [*arguments[: 2 * place], name, *arguments[2 * place :]]
    return arguments


if __name__ == "__main__":
    parser = RecipeParser(ScriptArguments, description=__doc__)
    parsed = parser.parse_args_and_config(with_folders(sys.argv[1:]))
    try:
        main(*parsed)
    except (OSError, ValueError, RuntimeError) as error:
        parser.error(str(error))
