r"""TRL's trainers and ours in one pipeline: SFT, DFT, DPO, DisCO, GRPO, TempNet, and a table.

    llm-xrisk pipeline --config pipeline                        # the embedded calculator
    llm-xrisk pipeline --config pipeline --stages sft,dft,disco
    llm-xrisk pipeline --config pipeline --lora "--use_peft true --lora_target_modules all-linear"
    llm-xrisk pipeline --config mine.yaml --model_name_or_path MODEL --dataset_name QUESTIONS.jsonl

A stage starts from the folder of the one before and is a command of its own, `llm-xrisk NAME` or
`trl NAME`, with the arguments that the YAML gives it. Each is shown before it runs; what it prints
is in OUTPUT_DIR/STAGE/log.txt. All read the same rows: prompt, completion, answer.

- For dft and dpo `llm-xrisk pool` samples wrong answers of the policy they start from.
- With --lora a stage trains an adapter of its own, and `llm-xrisk merge` puts it into its base
  before the next one, whose reference is thus the policy it starts from.
- `llm-xrisk evaluate` follows each stage and fills in its model's card.
- tempnet leaves the model as it is and puts a TempNet beside it; its row is of temperature 1.

Finished stages are reused and interrupted ones resume. Expect three and a half minutes of one CPU
core's time, and folders that fit together rather than better answers: the YAML gives few steps.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from llm_xrisk.cli_help import RecipeParser
from llm_xrisk.data.gsm8k_steps import tiny_model_path
from llm_xrisk.evaluation.results import results_table, tabulate
from llm_xrisk.quickstart.pipeline import STAGES, Pipeline, check_stages
from llm_xrisk.quickstart.stages import Stages, stage_progress


@dataclass
class ScriptArguments:
    """What the pipeline starts from, which stages it has, where they go."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The first model."})
    dataset_name: str = field(default="gsm8k_steps", metadata={"help": "A file or a name."})
    limit: int = field(default=0, metadata={"help": "Use the first so many rows; 0 is all."})
    output_dir: str = field(default="outputs/pipeline", metadata={"help": "Where it all goes."})
    stages: str = field(default=",".join(STAGES), metadata={"help": "Which, in which order."})


@dataclass
class Commands:
    """Arguments of each command besides model, data and output, as one would type them."""

    sft: str = field(default="", metadata={"help": "Of trl sft."})
    dft: str = field(default="", metadata={"help": "Of llm-xrisk dft."})
    dpo: str = field(default="", metadata={"help": "Of trl dpo."})
    disco: str = field(default="", metadata={"help": "Of llm-xrisk disco."})
    grpo: str = field(default="", metadata={"help": "Of trl grpo."})
    tempnet: str = field(default="", metadata={"help": "Of llm-xrisk tempnet."})
    lora: str = field(default="", metadata={"help": "Of all of these but tempnet."})
    pool: str = field(default="", metadata={"help": "Of llm-xrisk pool."})
    evaluate: str = field(default="", metadata={"help": "Of llm-xrisk evaluate."})


def main(script_args: ScriptArguments, commands: Commands) -> str:
    """Run the stages, print a table of what each came to, return the last model's folder."""
    names = script_args.stages.split(",")
    check_stages(names)
    root = Path(script_args.output_dir)
    with stage_progress() as progress:
        stages = Stages(root, progress)
        pipeline = Pipeline(stages, asdict(commands), progress.console)
        policy = pipeline.start(script_args.model_name_or_path or tiny_model_path())
        found = {"start": pipeline.evaluate(policy)}
        data = pipeline.write_rows(script_args.dataset_name, script_args.limit)
        for number, name in enumerate(names, start=1):
            policy = pipeline.train(number, name, policy, data)
            found[policy.key] = pipeline.evaluate(policy)
        console = progress.console
    if stages.reused:
        console.print(f"reused from {root}: {', '.join(stages.reused)}; delete it to start anew")
    metrics = [name for name in found["start"].metrics if name.startswith(("pass@", "greedy"))]
    console.print(results_table(tabulate(found, metrics=metrics)))
    console.print(f"the last model: {policy.model}", soft_wrap=True)
    return policy.model


if __name__ == "__main__":
    parser = RecipeParser((ScriptArguments, Commands), description=__doc__)
    parsed = parser.parse_args_and_config()
    try:
        main(*parsed)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
