"""Negatives of a batch of prompts: drawn, freed of right answers, scored by a reference policy."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llm_xrisk.data.pool import COUNTS, Negative, PoolRow
from llm_xrisk.data.tokenize import (
    as_completion,
    completion_content,
    encode_prompt,
    encode_prompt_completion,
)
from llm_xrisk.rollout.engine import RolloutEngine, SamplingConfig

Row = Mapping[str, Any]
RewardFunction = Callable[..., Sequence[float | None]]

_ID_COLUMNS = ("prompt_id", "index", "id")
_OWN_COLUMNS = {
    *_ID_COLUMNS,
    *("prompt", "completion", "prompt_ids", "completion_ids"),
    *("negative_ids", "ref_log_likelihoods", "negative_truncated"),
}


@dataclass(frozen=True)
class Sample:
    """One completion and what is known of it."""

    generation: int
    ids: list[int]
    text: str
    truncated: bool
    right: bool


def select_negatives(
    samples: Iterable[Sample], gold: str, num_negatives: int
) -> tuple[list[Sample], dict[str, int]]:
    """Keep the samples that are negatives, and count what became of each.

    A sample cut at the length limit that is the beginning of the gold answer counts as equal to
    it: pushing it down would push the gold answer down.

    Args:
        samples: Of one prompt, in order.
        gold: Text of the gold answer.
        num_negatives: Most samples kept.

    Returns:
        The samples kept, and numbers by the names in ``COUNTS``.

    Example:
        >>> samples = [Sample(k, [], t, False, t == "4.0") for k, t in enumerate(["4", "5", "4.0"])]
        >>> kept, counts = select_negatives(samples, gold="4", num_negatives=2)
        >>> [sample.text for sample in kept], counts["equal_to_gold"], counts["verified_right"]
        (['5'], 1, 1)
    """
    counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
    kept: dict[tuple[str, bool], Sample] = {}
    gold = gold.strip()
    for sample in samples:
        text, key = sample.text.strip(), (sample.text, sample.truncated)
        counts["generated"] += 1
        if text == gold or (sample.truncated and gold.startswith(text)):
            fate = "equal_to_gold"
        elif sample.right:
            fate = "verified_right"
        elif key in kept:
            fate = "duplicates"
        elif len(kept) == num_negatives:
            fate = "surplus"
        else:
            fate = "kept"
            kept[key] = sample
        counts[fate] += 1
    return list(kept.values()), counts


@dataclass(frozen=True)
class PromptRow:
    """A row ready for drawing.

    Attributes:
        prompt_id: Seeds the samples, with the generation and the policy version.
        prompt: Text or messages.
        completion: The gold answer, text or messages.
        prompt_ids: Token ids of the plain prompt, as far as it shares them with the gold answer.
        completion_ids: Token ids of the gold answer.
        opening: Token ids of the plain prompt, which a sampled answer follows.
        columns: What else the row holds.
    """

    prompt_id: int
    prompt: Any
    completion: Any
    prompt_ids: list[int]
    completion_ids: list[int]
    opening: list[int]
    columns: dict[str, Any]


@dataclass(frozen=True)
class NegativeSampler:
    """Draws, filters and scores negatives; what a pool and a trainer have in common.

    Attributes:
        engine: Of the policy to sample from.
        ref_engine: Of the policy whose likelihoods are wanted.
        tokenizer: Of both.
        sampling: How samples are drawn.
        num_negatives: Most negatives kept per prompt.
        num_generations: Samples per prompt.
        system_prompt: Over the prompt when sampling, never when scoring.
        verify: Reward function with TRL's signature; what it pays is no negative.

    Raises:
        ValueError: fewer than one negative, or fewer samples than negatives.
    """

    engine: RolloutEngine
    ref_engine: RolloutEngine
    tokenizer: Any
    sampling: SamplingConfig
    num_negatives: int
    num_generations: int
    system_prompt: str | None
    verify: RewardFunction | None

    def __post_init__(self) -> None:
        if self.num_negatives < 1:
            raise ValueError(f"num_negatives must be at least 1, got {self.num_negatives}")
        if self.num_generations < self.num_negatives:
            raise ValueError(
                f"num_generations={self.num_generations} samples cannot give "
                f"num_negatives={self.num_negatives}; draw at least as many"
            )

    def settings(self) -> dict[str, Any]:
        """What the samples depend on besides prompts and policy."""
        return {
            **asdict(self.sampling),
            "system_prompt": self.system_prompt,
            "num_negatives": self.num_negatives,
            "num_generations": self.num_generations,
            "policy_version": self.engine.policy_version,
        }

    def prepare(self, row: Row) -> PromptRow:
        """Tokenize a row of text, or take a tokenized one as it is."""
        prompt_id = _prompt_id(row)
        prompt = row.get("prompt")
        if row.get("prompt_ids") is not None:
            prompt_ids, completion_ids = list(row["prompt_ids"]), list(row["completion_ids"])
        else:
            prompt_ids, completion_ids = self._encode(prompt_id, row)
        opening = prompt_ids if prompt is None else self._opening(row, None)
        return PromptRow(
            prompt_id=prompt_id,
            prompt=self._text(prompt_ids) if prompt is None else prompt,
            completion=row.get("completion") or self._text(completion_ids),
            prompt_ids=prompt_ids,
            completion_ids=completion_ids,
            # The tokens of a tokenized row count, whatever its text would become here.
            opening=opening if opening[: len(prompt_ids)] == prompt_ids else prompt_ids,
            columns={name: value for name, value in row.items() if name not in _OWN_COLUMNS},
        )

    def draw(self, prompts: Sequence[PromptRow]) -> list[PoolRow]:
        """Pool rows of some prompts."""
        selected = [
            select_negatives(samples, completion_content(prompt.completion), self.num_negatives)
            for prompt, samples in zip(prompts, self._samples(prompts), strict=True)
        ]
        # Where prompt and gold answer share less than the prompt, a sampled answer starts earlier.
        gaps = [prompt.opening[len(prompt.prompt_ids) :] for prompt in prompts]
        ids = [
            [[*gap, *sample.ids] for sample in kept]
            for gap, (kept, _) in zip(gaps, selected, strict=True)
        ]
        scores = iter(self._log_likelihoods(prompts, ids))
        return [
            PoolRow(
                prompt_id=prompt.prompt_id,
                prompt=prompt.prompt,
                completion=prompt.completion,
                prompt_ids=prompt.prompt_ids,
                completion_ids=prompt.completion_ids,
                negatives=[
                    Negative(tokens, sample.text, sample.truncated, next(scores), sample.generation)
                    for tokens, sample in zip(row_ids, kept, strict=True)
                ],
                counts=counts,
                columns=prompt.columns,
            )
            for prompt, row_ids, (kept, counts) in zip(prompts, ids, selected, strict=True)
        ]

    def _encode(self, prompt_id: int, row: Row) -> tuple[list[int], list[int]]:
        missing = [name for name in ("prompt", "completion") if not row.get(name)]
        if missing:
            raise ValueError(
                f"the question with id {prompt_id} has the columns {sorted(row)} and no "
                f"{' and no '.join(missing)}; give every prompt its gold answer as `completion`, "
                "or leave such questions out"
            )
        return encode_prompt_completion(
            self.tokenizer,
            row["prompt"],
            row["completion"],
            chat_template_kwargs=row.get("chat_template_kwargs"),
            eos_token_ids=getattr(self.engine, "eos_token_ids", None),
        )

    def _opening(self, row: Row, system_prompt: str | None) -> list[int]:
        kwargs = row.get("chat_template_kwargs")
        return encode_prompt(
            self.tokenizer, row["prompt"], system_prompt, chat_template_kwargs=kwargs
        )

    def _samples(self, prompts: Sequence[PromptRow]) -> list[list[Sample]]:
        """The samples of each prompt."""
        under_system_prompt = (
            [prompt.opening for prompt in prompts]
            if self.system_prompt is None
            else [
                self._opening({**prompt.columns, "prompt": prompt.prompt}, self.system_prompt)
                for prompt in prompts
            ]
        )
        batch = self.engine.generate(
            under_system_prompt,
            self.sampling,
            sample_ids=[prompt.prompt_id for prompt in prompts],
            num_generations=self.num_generations,
        )
        n = self.num_generations
        texts = [self._text(ids) for ids in batch.completion_ids]
        repeated = [prompt for prompt in prompts for _ in range(n)]
        right = self._verified(repeated, texts, batch.completion_ids)
        truncated = [reason == "length" for reason in batch.finish_reasons]
        rows = zip(batch.completion_ids, texts, truncated, right, strict=True)
        samples = [Sample(number % n, *row) for number, row in enumerate(rows)]
        return [samples[start : start + n] for start in range(0, len(samples), n)]

    def _verified(
        self, prompts: Sequence[PromptRow], texts: Sequence[str], completion_ids: list[list[int]]
    ) -> list[bool]:
        """Whether the reward function pays each sample."""
        if self.verify is None:
            return [False] * len(texts)
        pairs = zip(prompts, texts, strict=True)
        rewards = self.verify(
            prompts=[prompt.prompt for prompt in prompts],
            completions=[as_completion(prompt.prompt, text) for prompt, text in pairs],
            completion_ids=completion_ids,
            **{name: [row.columns[name] for row in prompts] for name in prompts[0].columns},
        )
        if len(rewards) != len(texts):
            raise ValueError(
                f"verify returned {len(rewards)} rewards for {len(texts)} completions; a reward "
                "function returns one for each, None where it cannot tell"
            )
        return [reward is not None and reward > 0 for reward in rewards]

    def _log_likelihoods(
        self, prompts: Sequence[PromptRow], ids: Sequence[list[list[int]]]
    ) -> list[float]:
        """Log pi_ref of all negatives on their plain prompts, at temperature 1."""
        pairs = zip(prompts, ids, strict=True)
        openings = [prompt.prompt_ids for prompt, negatives in pairs for _ in negatives]
        completions = [tokens for negatives in ids for tokens in negatives]
        if not completions:
            return []
        return [sum(scores) for scores in self.ref_engine.log_probs(openings, completions)]

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _prompt_id(row: Row) -> int:
    for name in _ID_COLUMNS:
        if row.get(name) is not None:
            return int(row[name])
    raise ValueError(
        f"got a row with the columns {sorted(row)} and no id; a pool keeps the stable integer id "
        "of each prompt: number the rows with llm_xrisk.data.with_index(dataset)"
    )
