"""The main job in one command: a base model, negatives, DFT, DisCO, one table, one report.

    make quickstart                 # or: python recipes/quickstart.py
    make quickstart CONTROLS=1      # adds SFT at equal steps, GRPO at equal rollouts, a colder base
    make quickstart-seeds           # 5 seeds, paired intervals

Hardware: two CPU cores, no network. Finished stages are reused, interrupted ones go on. For a real
model use pool.py, dft.py, disco.py and evaluate.py beside this file.
"""

from dataclasses import dataclass, field
from pathlib import Path

from llm_xrisk.cli_help import RecipeParser
from llm_xrisk.quickstart import QuickstartConfig
from llm_xrisk.quickstart.run import run


@dataclass
class ScriptArguments:
    """What this script does beside the main job.

    Args:
        results_file: Also write the summary here.
    """

    results_file: str | None = field(
        default=None, metadata={"help": "Also write the summary to this JSON file."}
    )


def main(script_args: ScriptArguments, config: QuickstartConfig) -> None:
    """Run the main job."""
    summary = run(config)
    if script_args.results_file:
        import json

        path = Path(script_args.results_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main(
        *RecipeParser(
            (ScriptArguments, QuickstartConfig), description=__doc__
        ).parse_args_and_config()
    )
