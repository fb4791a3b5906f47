# SPDX-License-Identifier: Apache-2.0
"""How often a policy is right: sampled pass@k, greedy accuracy, lengths, with intervals."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import numpy as np
from transformers import PreTrainedTokenizerBase

from llm_xrisk.data.columns import require_columns
from llm_xrisk.data.pool_writer import replace_file
from llm_xrisk.data.tokenize import Text, as_completion, encode_prompt
from llm_xrisk.evaluation.bootstrap import Bootstrap, Interval, Values
from llm_xrisk.rollout.engine import RolloutBatch, RolloutEngine, SamplingConfig
from reward.metrics import pass_at_k

RewardFunction = Callable[..., Sequence[float | None]]
Row = Mapping[str, Any]

FORMAT = 1
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompletionSample:
    """One completion with its verdict, kept for reading."""

    sample_id: int
    prompt: str
    gold: str
    text: str
    correct: bool
    greedy: bool
    truncated: bool
    length: int


@dataclass(frozen=True)
class Evaluation:
    """What one policy did on one set of prompts, prompt by prompt.

    Args:
        name: Name of the run, as tables show it.
        sample_ids: Dataset id of each prompt (n of them).
        num_generations: Completions sampled per prompt.
        correct: How many of them were right, per prompt.
        mean_lengths: Their mean length in tokens, end token included, per prompt.
        truncated: How many were cut at the length limit, per prompt.
        greedy_correct: Whether greedy decoding was right, per prompt; `None` if it was not run.
        ks: The k for which pass@k is reported.
        sampling: The sampling settings, as a dict.
        policy_version: Version of the weights.
        ungradable: Prompts left out because the reward function could not grade them.
        seconds: Wall time of generation and grading.
        samples: A sample of the completions.

    Example:
        >>> run = Evaluation("base", [0, 1], 2, [2, 1], [3.0, 3.0], [0, 0], ks=[1, 2])
        >>> run.mean("pass@1"), run.mean("pass@2")
        (0.75, 1.0)
    """

    name: str
    sample_ids: list[int]
    num_generations: int
    correct: list[int]
    mean_lengths: list[float]
    truncated: list[int]
    greedy_correct: list[int] | None = None
    ks: list[int] = field(default_factory=lambda: [1])
    sampling: dict[str, Any] = field(default_factory=dict)
    policy_version: int = 0
    ungradable: int = 0
    seconds: float = 0.0
    samples: list[CompletionSample] = field(default_factory=list)

    @property
    def metrics(self) -> list[str]:
        """Names that `values` takes, in the order of the tables."""
        greedy = [] if self.greedy_correct is None else ["greedy"]
        first, *others = [f"pass@{k}" for k in self.ks]
        return [first, *greedy, *others, "mean_length", "truncation_rate"]

    def values(self, metric: str) -> Values:
        """Return a metric prompt by prompt, in the order of `sample_ids`.

        Args:
            metric: One of `metrics`.

        Returns:
            (n,) floats whose mean is the metric.

        Raises:
            ValueError: If this run does not have the metric.
        """
        if metric not in self.metrics:
            raise ValueError(
                f"run {self.name!r} has no metric {metric!r}, only {', '.join(self.metrics)}; "
                "choose one of these or evaluate again with other ks"
            )
        if metric == "greedy":
            return np.asarray(self.greedy_correct, dtype=np.float64)
        if metric == "mean_length":
            return np.asarray(self.mean_lengths, dtype=np.float64)
        if metric == "truncation_rate":
            return np.asarray(self.truncated, dtype=np.float64) / self.num_generations
        k = int(metric.removeprefix("pass@"))
        estimate = [pass_at_k(self.num_generations, c, k) for c in range(self.num_generations + 1)]
        return np.asarray(estimate)[self.correct]

    def mean(self, metric: str) -> float:
        """Return a metric over all prompts."""
        return float(self.values(metric).mean())

    def summary(self, bootstrap: Bootstrap | None = None) -> dict[str, Interval]:
        """Return every metric with its 95 % interval by bootstrap over prompts.

        Args:
            bootstrap: The resamples to use; by default 4,000 with seed 0.

        Returns:
            Metric name to interval; `Bootstrap.method` says how it was made.
        """
        bootstrap = bootstrap or Bootstrap(len(self.sample_ids))
        return {metric: bootstrap.interval(self.values(metric)) for metric in self.metrics}

    def save(self, path: str | Path) -> None:
        """Write the evaluation as JSON, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps({"format": FORMAT, **asdict(self)}).encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: If the file is of another format.
        """
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        found = data.pop("format", None) if isinstance(data, dict) else None
        if found != FORMAT:
            raise ValueError(
                f"{path} has format {found!r}, need {FORMAT}; write it with Evaluation.save of "
                "this version"
            )
        samples = [CompletionSample(**sample) for sample in data.pop("samples")]
        return cls(**data, samples=samples)


@dataclass(frozen=True)
class _Graded:
    """Completions of one generation call with their rewards, both prompt-major."""

    batch: RolloutBatch
    texts: list[str]
    rewards: list[float | None]
    per_prompt: int

    def reward_rows(self) -> list[list[float | None]]:
        return [
            self.rewards[start : start + self.per_prompt]
            for start in range(0, len(self.rewards), self.per_prompt)
        ]

    def array(self, values: Sequence[float], keep: Sequence[int]) -> Values:
        """Return (kept prompts, per_prompt)."""
        return np.asarray(values, dtype=np.float64).reshape(-1, self.per_prompt)[list(keep)]

    def sample(self, row: int, source: Row, *, greedy: bool, gold: str) -> CompletionSample:
        return CompletionSample(
            sample_id=self.batch.sample_ids[row],
            prompt=_shown(source["prompt"]),
            gold=gold,
            text=self.texts[row],
            correct=self.rewards[row] == 1,
            greedy=greedy,
            truncated=self.batch.finish_reasons[row] == "length",
            length=len(self.batch.completion_ids[row]),
        )


def evaluate(
    engine: RolloutEngine,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    reward_fn: RewardFunction,
    *,
    sampling: SamplingConfig,
    num_generations: int = 8,
    ks: Sequence[int] = (1, 8),
    greedy: bool = True,
    name: str = "policy",
    keep_prompts: int = 100,
    keep_generations: int = 2,
    answer_column: str = "answer",
    on_progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Sample completions of every prompt, grade them, and count.

    Args:
        engine: The rollout engine, at the weights to evaluate.
        rows: Dataset rows with a `prompt` (text or messages), whatever columns the reward function
            needs, and optionally an `id`; without one a row's position is its id.
        tokenizer: The policy's tokenizer.
        reward_fn: A reward function with TRL's signature and rewards in {0, 1}. It also receives
            the column `finish_reasons`.
        sampling: How to sample; greedy decoding uses the same length limit.
        num_generations: Completions sampled per prompt, at least max(ks).
        ks: The k of pass@k.
        greedy: Whether to decode greedily too.
        name: Name of the run.
        keep_prompts: For how many prompts, evenly spread, completions are kept for reading.
        keep_generations: How many sampled completions to keep for each, beside the greedy one.
        answer_column: The column shown as the gold answer beside kept completions.
        on_progress: Called with the number of completions finished since its last call; they add
            up to `len(rows) * (num_generations + greedy)`.

    Returns:
        The evaluation. Prompts with an ungradable completion (reward `None`) are left out of it and
        counted in `ungradable`.

    Raises:
        ValueError: If k exceeds `num_generations`, ids repeat, a reward is not in {0, 1, None}, or
            nothing could be graded.
    """
    rows, ids = _check_rows(rows), _sample_ids(rows)
    require_columns(reward_fn, rows[0])
    if not ks or not 1 <= min(ks) <= max(ks) <= num_generations:
        raise ValueError(
            f"got ks={list(ks)} with num_generations={num_generations}; pass@k needs "
            "1 <= k <= num_generations: raise num_generations or lower k"
        )
    start = perf_counter()
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]

    def run(settings: SamplingConfig, count: int) -> _Graded:
        batch = engine.generate(
            prompts, settings, sample_ids=ids, num_generations=count, on_progress=on_progress
        )
        return _grade(batch, rows, tokenizer, reward_fn, count)

    sampled = run(sampling, num_generations)
    decoded = run(replace(sampling, temperature=0.0), 1) if greedy else None
    keep = _gradable([sampled, decoded] if decoded else [sampled], name)
    lengths = [len(completion) for completion in sampled.batch.completion_ids]
    cut = [reason == "length" for reason in sampled.batch.finish_reasons]
    kept_rewards = sampled.array([reward or 0.0 for reward in sampled.rewards], keep)
    return Evaluation(
        name=name,
        sample_ids=[ids[row] for row in keep],
        num_generations=num_generations,
        correct=[int(count) for count in kept_rewards.sum(axis=1)],
        mean_lengths=sampled.array(lengths, keep).mean(axis=1).tolist(),
        truncated=[int(count) for count in sampled.array(cut, keep).sum(axis=1)],
        greedy_correct=[int(decoded.rewards[row] or 0) for row in keep] if decoded else None,
        ks=sorted(set(ks)),
        sampling=asdict(sampling),
        policy_version=sampled.batch.policy_version,
        ungradable=len(rows) - len(keep),
        seconds=perf_counter() - start,
        samples=_samples(
            rows, sampled, decoded, _spread(keep, keep_prompts), keep_generations, answer_column
        ),
    )


def _check_rows(rows: Sequence[Row]) -> list[Row]:
    rows = list(rows)
    if not rows or any("prompt" not in row for row in rows):
        columns = sorted(rows[0]) if rows else "no rows"
        raise ValueError(
            f"got {columns}; need rows with a column 'prompt': rename it or pass another dataset"
        )
    return rows


def _sample_ids(rows: Sequence[Row]) -> list[int]:
    ids = [int(row.get("id", position)) for position, row in enumerate(rows)]
    if len(set(ids)) < len(ids):
        raise ValueError(
            f"got {len(ids)} rows with {len(set(ids))} distinct values of 'id'; need a different "
            "id for each row: drop the duplicates, or the column to number rows by position"
        )
    return ids


def _grade(
    batch: RolloutBatch,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    reward_fn: RewardFunction,
    count: int,
) -> _Graded:
    texts = tokenizer.batch_decode(batch.completion_ids, skip_special_tokens=True)
    repeated = [row for row in rows for _ in range(count)]
    columns = {
        key: [row[key] for row in repeated]
        for key in rows[0]
        if key not in ("prompt", "completion", "completion_ids")
    }
    columns["finish_reasons"] = batch.finish_reasons
    rewards = reward_fn(
        prompts=[row["prompt"] for row in repeated],
        completions=[
            as_completion(row["prompt"], text) for row, text in zip(repeated, texts, strict=True)
        ],
        completion_ids=batch.completion_ids,
        **columns,
    )
    if len(rewards) != len(texts):
        raise ValueError(
            f"the reward function gave {len(rewards)} rewards for {len(texts)} completions; it "
            "must return one for each, None where it cannot grade"
        )
    strange = sorted({reward for reward in rewards if reward is not None} - {0, 1})
    if strange:
        raise ValueError(
            f"pass@k needs binary rewards, got values {strange[:5]}; threshold them or evaluate "
            "with the accuracy reward alone"
        )
    return _Graded(batch, texts, list(rewards), count)


def _gradable(results: Sequence[_Graded], name: str) -> list[int]:
    """Return the numbers of the prompts all of whose completions have a reward."""
    graded = zip(*(result.reward_rows() for result in results), strict=True)
    keep = [
        number
        for number, parts in enumerate(graded)
        if all(reward is not None for part in parts for reward in part)
    ]
    total = len(results[0].reward_rows())
    if not keep:
        raise ValueError(
            f"none of the {total} prompts could be graded (every one had a reward of None); check "
            "that the gold column holds what the reward function reads"
        )
    if len(keep) < total:
        _logger.warning("%s: %d of %d prompts ungradable, left out", name, total - len(keep), total)
    return keep


def _shown(prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _spread(keep: Sequence[int], count: int) -> list[int]:
    places = np.linspace(0, len(keep) - 1, min(count, len(keep))).round().astype(int)
    return [keep[place] for place in places]


def _samples(
    rows: Sequence[Row],
    sampled: _Graded,
    decoded: _Graded | None,
    chosen: Sequence[int],
    per_prompt: int,
    answer_column: str,
) -> list[CompletionSample]:
    samples: list[CompletionSample] = []
    for number in chosen:
        row = rows[number]
        gold = str(row.get(answer_column, ""))
        if decoded is not None:
            samples.append(decoded.sample(number, row, greedy=True, gold=gold))
        first = number * sampled.per_prompt
        samples += [
            sampled.sample(first + draw, row, greedy=False, gold=gold)
            for draw in range(min(per_prompt, sampled.per_prompt))
        ]
    return samples
