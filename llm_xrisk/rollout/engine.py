"""What every rollout engine does, whoever computes the tokens: the interface and its data."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Progress = Callable[[int], None]

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn.

    Raises:
        ValueError: a field is outside its range.

    Example:
        >>> SamplingConfig(temperature=0.6).top_p
        1.0
    """

    max_new_tokens: int = field(
        default=256, metadata={"help": "Longest completion in tokens, at least 1."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Logits are divided by it; 0 picks the likeliest token."}
    )
    top_p: float = field(
        default=1.0, metadata={"help": "Sample from the smallest set of this mass, in (0, 1]."}
    )
    top_k: int = field(
        default=0, metadata={"help": "Sample from the k likeliest tokens only; 0 turns it off."}
    )
    seed: int = field(default=0, metadata={"help": "First of the four numbers a row's seed is of."})

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"temperature must be finite and not negative, got {self.temperature}; "
                "0 means greedy decoding"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}; 1 turns it off")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}; 0 turns it off")


@dataclass
class RolloutBatch:
    """Completions, one per row; row = prompt number * num_generations + generation.

    Attributes:
        sample_ids: Data set id of each row's prompt.
        prompt_ids: Token ids of the prompt, no padding.
        completion_ids: Token ids; ends with an end-of-sequence id iff the finish reason is
            ``"stop"``; never empty.
        log_probs: The engine's log pi of each sampled token under the temperature-scaled policy
            before top-k and top-p (at temperature 0: the policy at temperature 1).
        finish_reasons: ``"stop"`` or ``"length"``.
        policy_version: Version of the weights that produced the batch.
    """

    sample_ids: list[int]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    log_probs: list[list[float]]
    finish_reasons: list[str]
    policy_version: int

    def __len__(self) -> int:
        return len(self.completion_ids)


class RolloutEngine(ABC):
    """Draws completions and scores them with one policy, whose version it knows.

    The randomness of a row comes from :func:`row_seed` alone, so a batch does not depend on its
    layout: batch size, order and company of prompts change nothing but float rounding.

    Attributes:
        policy_version: Version given to the latest :meth:`sync`; 0 before the first.
    """

    policy_version: int = 0

    @abstractmethod
    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        *,
        sample_ids: list[int],
        num_generations: int = 1,
        on_progress: Progress | None = None,
    ) -> RolloutBatch:
        """Draw ``num_generations`` completions of every prompt.

        Args:
            prompts: Token ids of each prompt, no padding.
            sampling: How tokens are drawn.
            sample_ids: Data set id of each prompt.
            num_generations: Completions per prompt.
            on_progress: Called with the number of rows finished since its last call.

        Returns:
            ``len(prompts) * num_generations`` rows, prompt-major.

        Raises:
            ValueError: an empty prompt, a token outside the vocabulary, unequal lengths, or a
                prompt too long for the model's context.
        """

    @abstractmethod
    def log_probs(
        self,
        prompts: list[list[int]],
        completions: list[list[int]],
        *,
        temperature: float = 1.0,
    ) -> list[list[float]]:
        """Teacher-forced log pi of every completion token, one list per completion.

        Args:
            prompts: Token ids, one prompt per completion.
            completions: Token ids, none empty.
            temperature: Divides the logits; 0 counts as 1.
        """

    @abstractmethod
    def sync(self, model: nn.Module, *, version: int) -> None:
        """Bring the engine to the model's weights and set ``policy_version``."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the engine holds; a closed engine is not used again."""


@dataclass(frozen=True)
class Request:
    """One row to generate: the prompt, whose it is, and the seed of its randomness."""

    sample_id: int
    prompt: list[int]
    seed: int


@dataclass(frozen=True)
class Completion:
    """One generated row."""

    token_ids: list[int]
    log_probs: list[float]
    finish_reason: str


def mix64(value: int) -> int:
    """The finaliser of splitmix64: a bijection of 64-bit integers whose output bits look random."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def row_seed(seed: int, sample_id: int, generation: int, policy_version: int) -> int:
    """Seed of one rollout row, a 63-bit hash of the four numbers that name the row.

    Args:
        seed: ``SamplingConfig.seed``.
        sample_id: Data set id of the prompt.
        generation: Which of the prompt's completions, from 0.
        policy_version: Version of the weights.

    Returns:
        An integer in [0, 2^63).

    Example:
        >>> row_seed(0, 7, 1, 3) == row_seed(0, 7, 1, 3)
        True
        >>> row_seed(0, 7, 1, 3) == row_seed(0, 7, 2, 3)
        False
    """
    state = 0
    for part in (seed, sample_id, generation, policy_version):
        state = mix64((state + _GOLDEN + mix64(part & _MASK64)) & _MASK64)
    return state >> 1


def expand_requests(
    prompts: Sequence[list[int]],
    sampling: SamplingConfig,
    *,
    sample_ids: Sequence[int],
    num_generations: int,
    policy_version: int,
) -> list[Request]:
    """One request per row, prompt-major, each with its own seed.

    Raises:
        ValueError: ``sample_ids`` does not match the prompts, or ``num_generations`` is below 1.
    """
    if len(sample_ids) != len(prompts):
        raise ValueError(
            f"got {len(sample_ids)} sample_ids for {len(prompts)} prompts; "
            "give the data set id of every prompt"
        )
    if num_generations < 1:
        raise ValueError(f"num_generations must be at least 1, got {num_generations}")
    return [
        Request(sample_id, prompt, row_seed(sampling.seed, sample_id, j, policy_version))
        for sample_id, prompt in zip(sample_ids, prompts, strict=True)
        for j in range(num_generations)
    ]


def check_prompts(
    prompts: Sequence[Sequence[int]],
    new_tokens: Iterable[int],
    *,
    context_length: int | None,
    vocab_size: int | None,
) -> None:
    """Refuse prompts that a model cannot continue by so many tokens.

    Args:
        prompts: Token ids.
        new_tokens: Tokens to come after each prompt.
        context_length: Most tokens the model takes; ``None`` if it has no limit.
        vocab_size: Number of token ids; ``None`` leaves them unchecked.

    Raises:
        ValueError: naming the first prompt at fault.
    """
    if len(prompts) == 0:
        raise ValueError("got no prompts; generate and log_probs need at least one")
    for number, (prompt, new) in enumerate(zip(prompts, new_tokens, strict=True)):
        if len(prompt) == 0:
            raise ValueError(
                f"prompt {number} is empty; a prompt needs at least one token, "
                "for instance the tokenizer's bos token"
            )
        if context_length is not None and len(prompt) + new > context_length:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens and {new} are to follow, but the "
                f"context holds {context_length}; shorten the prompt or lower max_new_tokens"
            )
        _check_vocabulary(f"prompt {number}", prompt, vocab_size)


def _check_vocabulary(what: str, tokens: Sequence[int], vocab_size: int | None) -> None:
    if vocab_size is not None and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise ValueError(
            f"{what} has token ids from {min(tokens)} to {max(tokens)}, the model's "
            f"go from 0 to {vocab_size - 1}; tokenize with the model's own tokenizer"
        )


def check_completions(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    context_length: int | None,
    vocab_size: int | None,
) -> None:
    """Refuse prompt-completion pairs that a model cannot score.

    Raises:
        ValueError: unequal numbers, an empty completion, or what :func:`check_prompts` refuses.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"got {len(completions)} completions for {len(prompts)} prompts")
    for number, completion in enumerate(completions):
        if len(completion) == 0:
            raise ValueError(f"completion {number} is empty; there is no token to score")
        _check_vocabulary(f"completion {number}", completion, vocab_size)
    lengths = [len(completion) for completion in completions]
    check_prompts(prompts, lengths, context_length=context_length, vocab_size=vocab_size)


def assemble(
    requests: Sequence[Request], completions: Sequence[Completion], policy_version: int
) -> RolloutBatch:
    """The batch of finished rows, in the order of the requests."""
    return RolloutBatch(
        sample_ids=[request.sample_id for request in requests],
        prompt_ids=[list(request.prompt) for request in requests],
        completion_ids=[completion.token_ids for completion in completions],
        log_probs=[completion.log_probs for completion in completions],
        finish_reasons=[completion.finish_reason for completion in completions],
        policy_version=policy_version,
    )


def make_engine(name: str, model: Any, tokenizer: Any = None, **options: Any) -> RolloutEngine:
    """Build an engine by name.

    Args:
        name: ``"transformers"`` (runs wherever the model runs) or ``"vllm"`` (in process, CPU or
            GPU; needs the extra package).
        model: The model; the vLLM engine takes a path as well.
        tokenizer: Where the end-of-sequence and padding ids come from.
        **options: Further arguments of the engine's constructor.

    Raises:
        ValueError: an unknown name.
        ImportError: vLLM is not installed.
    """
    if name == "transformers":
        from llm_xrisk.rollout.transformers_engine import TransformersEngine

        return TransformersEngine(model, tokenizer, **options)
    if name == "vllm":
        from llm_xrisk.rollout.vllm_engine import VLLMEngine

        return VLLMEngine(model, tokenizer, **options)
    raise ValueError(f"unknown rollout engine {name!r}; choose 'transformers' or 'vllm'")
