"""Splits of steps and of text, and the frozen models of each seed."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from llm_xrisk.data.gsm8k_steps import load_steps, tiny_model_path
from llm_xrisk.data.tiny_calculator import char_tokenizer, untrained_calculator

MOST_CHARACTERS = 10_000  # of a document
DOCUMENTS = 7_000  # of the 7,473 for training are trained on, the others are to choose by
SEEN = 300  # chunks of the test text that were looked at with a first grid, which was too narrow


@dataclass(frozen=True)
class Sizes:
    """How much of everything, the same for every method.

    Args:
        net_steps: Optimizer steps of a TempNet.
        net_rows: Steps in the batch of each of them.
        net_chunks: Chunks in a batch, where the data are text.
        text_steps: Optimizer steps of the models of text.
        text_chunks: Chunks in a batch of theirs.
        chunk: Tokens of a chunk.
        validation: Steps to choose by.
        test: Steps to report on.
        chunks: Chunks of text to choose by, and as many to report on.
        configurations: Of every method.
    """

    net_steps: int = 2000
    net_rows: int = 16
    net_chunks: int = 2
    text_steps: int = 150
    text_chunks: int = 32
    chunk: int = 128
    validation: int = 300
    test: int = 600
    chunks: int = 300
    configurations: int = 8


@dataclass(frozen=True)
class Part:
    """Rows of a split.

    Args:
        ids: Of each row, for the noise it is sampled with.
        texts: Prompts, empty for text.
        prompts: Tokens to read.
        completions: Tokens to predict.
    """

    ids: list[int]
    texts: list[str]
    prompts: list[list[int]]
    completions: list[list[int]]

    def __len__(self) -> int:
        return len(self.ids)


def steps(sizes: Sizes) -> dict[str, Part]:
    """Distinct steps; no prompt is in two splits, and no model of steps has seen any of them."""
    known, rows = set[str](), dict[str, list[tuple[int, str, str]]]()
    for split in ("train", "test"):
        # of several ways to write an answer, the first
        distinct = {row["prompt"]: row for row in reversed(load_steps(split))}
        found = [distinct[prompt] for prompt in distinct if prompt not in known]
        known |= set(distinct)
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
        rows[split] = [(found[i]["id"], found[i]["prompt"], found[i]["answer"]) for i in order]
    train, count = rows["train"], sizes.validation
    splits = {"train": train[count:], "validation": train[:count], "test": rows["test"]}
    splits["test"] = splits["test"][: sizes.test]
    return {name: _part(found) for name, found in splits.items()}


def _part(rows: list[tuple[int, str, str]]) -> Part:
    tokenizer = char_tokenizer()
    ids, prompts, answers = ([*column] for column in zip(*rows, strict=True))
    ends = [answer + tokenizer.eos_token for answer in answers]
    return Part(ids, prompts, tokenizer(prompts)["input_ids"], tokenizer(ends)["input_ids"])


def text(sizes: Sizes) -> dict[str, Part]:
    """GSM8K's questions and solutions as one text, in chunks whose first token is only read.

    Empty where $XRISK_DATA is not set.
    """
    folder = os.environ.get("XRISK_DATA")
    if folder is None:
        return {}
    tokenizer = char_tokenizer(MOST_CHARACTERS)
    documents: dict[str, list[list[int]]] = {}
    for split in ("train", "test"):
        lines = (Path(folder) / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in lines.splitlines()]
        texts = [f"{row['question']}\n{row['answer']}{tokenizer.eos_token}" for row in rows]
        documents[split] = tokenizer(texts)["input_ids"]
    splits = {
        "train": _chunks(documents["train"][:DOCUMENTS], sizes.chunk),
        "validation": _chunks(documents["train"][DOCUMENTS:], sizes.chunk)[: sizes.chunks],
        "test": _chunks(documents["test"], sizes.chunk)[SEEN : SEEN + sizes.chunks],
    }
    return {
        name: Part([*range(len(c))], [""] * len(c), [x[:1] for x in c], [x[1:] for x in c])
        for name, c in splits.items()
    }


def _chunks(documents: list[list[int]], size: int) -> list[list[int]]:
    tokens = [token for document in documents for token in document]
    return [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]


def frozen_model(name: str, seed: int, folder: Path, train: Part, sizes: Sizes) -> Any:
    """The embedded calculator for steps; for text the model of this seed, trained once and kept."""
    path = Path(tiny_model_path())
    if name == "text":
        path = folder / f"text-model-{seed}"
        if not path.exists():
            unfinished = path.with_name(path.name + ".unfinished")
            learned(train, seed, sizes).save_pretrained(unfinished)
            unfinished.rename(path)
    return AutoModelForCausalLM.from_pretrained(path).requires_grad_(False).eval()


def learned(train: Part, seed: int, sizes: Sizes) -> Qwen3ForCausalLM:
    """A model of the calculator's architecture and training settings that has read the chunks."""
    torch.manual_seed(seed)
    model = untrained_calculator(char_tokenizer()).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=sizes.text_steps, pct_start=0.05
    )
    for _ in range(sizes.text_steps):
        drawn = torch.randint(len(train), (sizes.text_chunks,)).tolist()
        chunks = torch.tensor([train.prompts[i] + train.completions[i] for i in drawn])
        model(input_ids=chunks, labels=chunks).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model
