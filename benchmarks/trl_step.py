"""One optimizer step of DisCOTrainer against one of TRL's GRPOTrainer, as a ratio of medians.

Both train the same model on the same stored completions: nothing is generated, every micro-batch
is padded to the same width, every question has right and wrong answers. A run is one rollout:
old log-probs of all rows, then the same number of updates. Layouts:

    whole   the mini-batch is one micro-batch; DisCO needs no score pass, and takes the first step's
            old log-probs from that step's own forward pass
    split   two micro-batches; DisCO scores the mini-batch first, except right after the rollout

``tokens_per_run`` counts what passed the model on either side, ``ratio_per_token`` sets it off.
On a CPU the seconds are the process's own, on one thread: others may share the machine.

    OMP_NUM_THREADS=1 python benchmarks/trl_step.py --repeats 5
"""

import argparse
import json
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from llm_xrisk.rollout import RolloutBatch, RolloutEngine, SamplingConfig
from llm_xrisk.trainers import DisCOConfig, DisCOTrainer, RolloutConfig

RESULTS = Path(__file__).parent / "results"
VOCABULARY, EOS, PAD = 8192, 1, 0
GENERATIONS, ROWS, UPDATES = 8, 16, 4  # answers to a question, rows of a step, steps of a rollout
PROMPT, COMPLETION = 24, 64
LAYOUTS = {"whole": 1, "split": 2}  # micro-batches of a step
GOALS = {"whole": 1.0, "split": 1.25}


class StoredCompletions(RolloutEngine):
    """Answers every prompt with the completions drawn for it beforehand."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.kept: dict[tuple[int, ...], list[list[int]]] = {}

    def of(self, prompt: list[int]) -> list[list[int]]:
        """Completions of unequal length, the first of full length, alternately right and wrong."""
        key = tuple(prompt)
        if key not in self.kept:
            generator = torch.Generator().manual_seed(self.seed + len(self.kept))
            lengths = torch.randint(
                COMPLETION // 4, COMPLETION, (GENERATIONS,), generator=generator
            )
            lengths[0] = COMPLETION
            self.kept[key] = [
                [
                    2 + k % 2,
                    *torch.randint(4, VOCABULARY, (n - 2,), generator=generator).tolist(),
                    EOS,
                ]
                for k, n in enumerate(lengths.tolist())
            ]
        return self.kept[key]

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        *,
        sample_ids: list[int],
        num_generations: int = 1,
        on_progress: Callable[[int], None] | None = None,
    ) -> RolloutBatch:
        completions = [row for prompt in prompts for row in self.of(prompt)]
        return RolloutBatch(
            [i for i in sample_ids for _ in range(num_generations)],
            [prompt for prompt in prompts for _ in range(num_generations)],
            completions,
            [[0.0] * len(row) for row in completions],
            ["stop"] * len(completions),
            self.policy_version,
        )

    def log_probs(self, *_: Any, **__: Any) -> list[list[float]]:
        raise TypeError("completions are stored, not scored")

    def sync(self, model: nn.Module, *, version: int) -> None:
        self.policy_version = version

    def close(self) -> None:
        pass

    def rollout_func(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """The same for TRL, which repeats each prompt."""
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        rows = [self.of(prompt)[k % GENERATIONS] for k, prompt in enumerate(ids)]
        return {"prompt_ids": ids, "completion_ids": rows, "logprobs": None}


def now() -> float:
    """Wall-clock seconds of finished work on a GPU, processor seconds of this process elsewhere."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Clock(TrainerCallback):
    """Seconds between the beginning and the end of training."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = now()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds = now() - self.began


def make_model(seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{k}": k for k in range(2, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_questions(seed: int) -> Dataset:
    """As many questions as a rollout asks, all of the same length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (ROWS * UPDATES // GENERATIONS, PROMPT), generator=generator)
    return Dataset.from_list([{"prompt": " ".join(f"w{k}" for k in row)} for row in ids.tolist()])


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(ids[0] % 2) for ids in completion_ids]


def settings(folder: str, micro_batches: int) -> dict[str, Any]:
    """What both trainers are told, word for word."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": ROWS // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "max_steps": UPDATES,
        "learning_rate": 1e-6,
        "gradient_checkpointing": False,
        "bf16": torch.cuda.is_available(),
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def make_trl(folder: str, micro_batches: int, seed: int) -> GRPOTrainer:
    args = GRPOConfig(
        **settings(folder, micro_batches),
        num_generations=GENERATIONS,
        steps_per_generation=UPDATES * micro_batches,
        max_completion_length=COMPLETION,
        temperature=1.0,
    )
    return GRPOTrainer(
        make_model(seed),
        reward,
        args,
        train_dataset=make_questions(seed),
        processing_class=make_tokenizer(),
        rollout_func=StoredCompletions(seed).rollout_func,
        callbacks=[Clock()],
    )


def make_ours(folder: str, micro_batches: int, seed: int) -> DisCOTrainer:
    rollout = RolloutConfig(
        max_new_tokens=COMPLETION,
        temperature=1.0,
        num_generations=GENERATIONS,
        updates_per_rollout=UPDATES,
    )
    return DisCOTrainer(
        make_model(seed),
        DisCOConfig(**settings(folder, micro_batches)),
        reward_funcs=reward,
        train_dataset=make_questions(seed),
        processing_class=make_tokenizer(),
        rollout=rollout,
        engine=StoredCompletions(seed),
        callbacks=[Clock()],
    )


def count_tokens(trainer: Any) -> Callable[[], dict[str, int]]:
    """Count the tokens that pass the model with and without a graph, over one run."""
    seen = {"with graph": 0, "without graph": 0}

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen["with graph" if torch.is_grad_enabled() else "without graph"] += kwargs[
            "input_ids"
        ].numel()

    handle = trainer.model.model.register_forward_pre_hook(hook, with_kwargs=True)

    def stop() -> dict[str, int]:
        handle.remove()
        return seen

    return stop


def seconds(trainer: Any) -> float:
    """Of one run of ``UPDATES`` steps."""
    trainer.train()
    if trainer.state.global_step != UPDATES:
        raise RuntimeError(f"took {trainer.state.global_step} steps instead of {UPDATES}")
    clock = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Clock))
    return clock.seconds


def compare(layout: str, repeats: int, seed: int, folder: str) -> dict[str, Any]:
    """Alternate runs of both trainers in one layout."""
    count = LAYOUTS[layout]
    pair = {"trl": make_trl(folder, count, seed), "llm_xrisk": make_ours(folder, count, seed)}
    tokens = {}
    for trainer in pair.values():
        trainer.remove_callback(PrinterCallback)
    for name, trainer in pair.items():  # the first run of each warms up and is counted, not timed
        stop = count_tokens(trainer)
        seconds(trainer)
        tokens[name] = stop()
    times: dict[str, list[float]] = {name: [] for name in pair}
    for k in range(repeats):
        for name in list(pair)[:: 1 if k % 2 else -1]:
            times[name].append(seconds(pair[name]) / UPDATES)
    ratios = [b / a for a, b in zip(times["trl"], times["llm_xrisk"], strict=True)]
    # a pass with a graph costs about three without: forward, and backward twice that
    work = {name: 3 * seen["with graph"] + seen["without graph"] for name, seen in tokens.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "micro_batches": count,
        "tokens_per_run": tokens,
        "seconds_per_step": {k: [round(v, 4) for v in values] for k, values in times.items()},
        "median_seconds_per_step": {k: round(v, 4) for k, v in medians.items()},
        "ratio_of_medians": round(medians["llm_xrisk"] / medians["trl"], 3),
        "ratio_of_neighbours": [round(r, 3) for r in sorted(ratios)],
        "ratio_per_token": round(statistics.median(ratios) * work["trl"] / work["llm_xrisk"], 3),
        "goal": GOALS[layout],
    }


def hardware() -> str:
    """A name of the machine's kind for a file."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
    else:
        info = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
        name = f"cpu-{found[1] if found else platform.machine()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each trainer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / f"trl-step-{hardware()}.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func is how stored completions get in
    packages = ("torch", "transformers", "trl", "accelerate")
    result: dict[str, Any] = {
        "what": "seconds per optimizer step on stored completions, llm_xrisk over TRL",
        "versions": {name: version(name) for name in packages},
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "seed": args.seed,
        "parameters": sum(p.numel() for p in make_model(args.seed).parameters()),
        "rows_per_step": ROWS,
        "num_generations": GENERATIONS,
        "updates_per_rollout": UPDATES,
        "prompt_and_completion_tokens": [PROMPT, COMPLETION],
        "vocabulary": VOCABULARY,
    }
    with tempfile.TemporaryDirectory() as folder:
        for layout in LAYOUTS:
            result[layout] = compare(layout, args.repeats, args.seed, folder)
            found = result[layout]
            print(
                f"{layout}: {found['ratio_of_medians']:.3f} x TRL's step "
                f"(goal <= {found['goal']}), {found['median_seconds_per_step']}"
            )
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
