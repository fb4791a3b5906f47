"""Make `tiny-calculator`, the model that the package ships: a base that generalises and doubts.

A Qwen3 model of 0.86 M parameters learns arithmetic from synthetic steps: shapes and numbers are drawn from GSM8K's
training steps, every real step is left out, and 40 % of the answers are wrong, as web text has it. So its greedy
answers are often right where its samples are not, which is what a verifier can improve.

    OMP_NUM_THREADS=2 python recipes/make_base_model.py --config recipes/make_base_model.yaml

Two CPU cores, about 6 minutes. To expect on the 1,434 held-out real steps: greedy NN %, sampled at temperature 1 NN %
(the model card in the output directory has the intervals). Interrupted, the same command resumes from `outputs/`.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM
from trl import TrlParser

from llm_xrisk.data.char_tokenizer import char_tokenizer
from llm_xrisk.data.gsm8k_steps import is_correct, load_steps
from llm_xrisk.data.synthetic_steps import StepSampler

CARD = (Path(__file__).parent / "make_base_model_card.md").read_text(encoding="utf-8")


@dataclass
class ScriptArguments:
    output_dir: str = field(metadata={"help": "directory of the finished model"})
    max_steps: int = field(default=1900, metadata={"help": "optimizer steps"})
    batch_size: int = field(default=128, metadata={"help": "synthetic steps per optimizer step"})
    learning_rate: float = field(default=2e-3, metadata={"help": "peak; 5 % warm-up, then cosine"})
    wrong_rate: float = field(default=0.4, metadata={"help": "share of wrong answers, in [0, 1]"})
    num_samples: int = field(default=8, metadata={"help": "samples per step in the evaluation"})
    save_steps: int = field(default=200, metadata={"help": "steps between checkpoints"})
    seed: int = field(default=0, metadata={"help": "of weights, data and samples"})


def build_model(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def batch_of(
    sampler: StepSampler, tokenizer: PreTrainedTokenizerBase, args: ScriptArguments, step: int
) -> dict[str, Tensor]:
    rng = random.Random(f"{args.seed}/{step}")
    rows = [sampler.sample(rng) for _ in range(args.batch_size)]
    texts = [prompt + answer + tokenizer.eos_token for prompt, answer in rows]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    places = torch.arange(batch["input_ids"].shape[1])
    is_prompt = places < torch.tensor([[len(prompt)] for prompt, _ in rows])
    ignored = is_prompt | (batch["attention_mask"] == 0)
    return {**batch, "labels": batch["input_ids"].masked_fill(ignored, -100)}


def train(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, args: ScriptArguments, bar: Progress
) -> None:
    train_prompts, test_prompts = ([row["prompt"] for row in load_steps(s)] for s in ("train", "test"))
    sampler = StepSampler(train_prompts, excluded=train_prompts + test_prompts, wrong_rate=args.wrong_rate)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.max_steps, pct_start=0.05
    )
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    checkpoint = Path("outputs") / "make_base_model" / f"seed{args.seed}-{args.max_steps}.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        first = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    task = bar.add_task("train", total=args.max_steps, completed=first)
    for step in range(first + 1, args.max_steps + 1):
        loss = model(**batch_of(sampler, tokenizer, args, step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.update(task, advance=1, description=f"train, loss {loss.item():.3f}")
        if step % args.save_steps == 0:
            torch.save({"step": step, **{k: part.state_dict() for k, part in parts.items()}}, checkpoint)


@torch.inference_mode()
def score(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str], repeats: int, bar: Progress
) -> Tensor:
    """Correctness (prompts, repeats); one repeat is the greedy answer, more are samples at temperature 1."""
    correct = []
    for start in bar.track(range(0, len(prompts), 128), description=f"evaluate, {repeats} each"):
        rows = [prompt for prompt in prompts[start : start + 128] for _ in range(repeats)]
        batch = tokenizer(rows, padding=True, return_tensors="pt")
        tokens = model.generate(**batch, max_new_tokens=12, do_sample=repeats > 1, top_k=0)
        answers = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        correct += [is_correct(*pair) for pair in zip(rows, answers, strict=True)]
    return torch.tensor(correct, dtype=torch.float32).view(-1, repeats)


def with_interval(correct: Tensor) -> str:
    rates = correct.mean(1)
    half_width = 1.96 * rates.std() / len(rates) ** 0.5
    return f"{100 * rates.mean():.1f} ± {100 * half_width:.1f} %"


def main(args: ScriptArguments) -> None:
    torch.manual_seed(args.seed)
    tokenizer = char_tokenizer()
    model = build_model(tokenizer)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        train(model.train(), tokenizer, args, bar)
        model.eval().save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
        held_out = [row["prompt"] for row in load_steps("test")]
        seen_later = [row["prompt"] for row in load_steps("train")[:: 10]]
        greedy = score(model, tokenizer, held_out, 1, bar)
        sampled = score(model, tokenizer, held_out, args.num_samples, bar)
        groups = score(model, tokenizer, seen_later, args.num_samples, bar).mean(1)
        mixed = ((groups > 0) & (groups < 1)).float()[:, None]
    numbers = {"greedy": greedy, "sampled": sampled, "mixed": mixed}
    card = CARD.format(**vars(args), **{k: with_interval(v) for k, v in numbers.items()})
    (Path(args.output_dir) / "README.md").write_text(card, encoding="utf-8")
    bar.console.print(card.partition("## Numbers")[2])


if __name__ == "__main__":
    main(*TrlParser(ScriptArguments).parse_args_and_config())
