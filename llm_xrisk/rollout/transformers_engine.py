"""Rollouts by ``model.generate`` on the live model: no server, no second copy of the weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList

from llm_xrisk.rollout.engine import (
    Completion,
    Progress,
    Request,
    RolloutBatch,
    RolloutEngine,
    SamplingConfig,
    assemble,
    check_completions,
    check_prompts,
    expand_requests,
)
from llm_xrisk.rollout.sampling import GumbelSampler
from llm_xrisk.rollout.scoring import (
    evaluation_mode,
    left_pad,
    length_sorted_batches,
    sequence_log_probs,
)
from llm_xrisk.rollout.weight_sync import base_model, unwrap_model

GatherModel = Callable[[nn.Module], AbstractContextManager[Any]]


def end_of_sequence_ids(model: nn.Module, tokenizer: Any = None) -> list[int]:
    """Ids that end a completion: those of the generation config and the tokenizer's own.

    Raises:
        ValueError: there is none.
    """
    ids: list[int] = []
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is None:
        configured = getattr(getattr(model, "config", None), "eos_token_id", None)
    for source in (configured, getattr(tokenizer, "eos_token_id", None)):
        ids += source if isinstance(source, list) else [] if source is None else [source]
    if not ids:
        raise ValueError(
            "found no end-of-sequence id in the generation config, the model config or the "
            "tokenizer; pass eos_token_ids=[...]"
        )
    return sorted(set(ids))


class TransformersEngine(RolloutEngine):
    """Generates with the model that is being trained.

    Left-padded batches of rows of similar length, in eval mode and without graph, key-value cache
    on even where training with gradient checkpointing turned it off. PEFT models generate with
    their adapters. Completions are drawn by :class:`GumbelSampler`, so they do not depend on the
    batch a row is in, apart from float rounding.

    Args:
        model: A causal language model, wrapped (DDP, DeepSpeed, compile, PEFT) or not.
        tokenizer: Source of end-of-sequence and padding ids; may be left out if the model's
            configs have them.
        eos_token_ids: Ids that end a completion, in place of the discovered ones.
        pad_token_id: Fills short rows, in place of the tokenizer's; it is masked out.
        batch_size: Rows generated at once.
        synced_gpus: The forward pass is collective (ZeRO-3, FSDP): every rank runs as many steps
            and batches as the slowest. All ranks must then call ``generate`` together.
        gather: Given the model, a context in which its parameters are whole, for instance
            ``lambda m: deepspeed.zero.GatheredParameters(m.parameters())`` for faster decoding
            under ZeRO-3, or ``FSDP.summon_full_params``.

    Raises:
        ValueError: no end-of-sequence id is known, or ``batch_size`` is below 1.

    Example:
        >>> from llm_xrisk.rollout import SamplingConfig, TransformersEngine
        >>> from transformers import Qwen3Config, Qwen3ForCausalLM
        >>> config = Qwen3Config(vocab_size=16, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8)
        >>> engine = TransformersEngine(Qwen3ForCausalLM(config), eos_token_ids=[1])
        >>> batch = engine.generate([[5, 6]], SamplingConfig(max_new_tokens=2), sample_ids=[0],
        ...     num_generations=3)
        >>> len(batch), batch.policy_version
        (3, 0)
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        eos_token_ids: list[int] | None = None,
        pad_token_id: int | None = None,
        batch_size: int = 32,
        synced_gpus: bool = False,
        gather: GatherModel = nullcontext,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model: Any = unwrap_model(model)
        self.eos_token_ids = eos_token_ids or end_of_sequence_ids(self.model, tokenizer)
        if pad_token_id is None:
            pad_token_id = getattr(tokenizer, "pad_token_id", None)
        self.pad_token_id = self.eos_token_ids[0] if pad_token_id is None else pad_token_id
        self.batch_size = batch_size
        self.synced_gpus = synced_gpus
        self.gather = gather

    def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        *,
        sample_ids: list[int],
        num_generations: int = 1,
        on_progress: Progress | None = None,
    ) -> RolloutBatch:
        """Draw completions; see :meth:`RolloutEngine.generate`."""
        check_prompts(prompts, [sampling.max_new_tokens] * len(prompts), **self._limits())
        version = self.policy_version
        requests = expand_requests(
            prompts,
            sampling,
            sample_ids=sample_ids,
            num_generations=num_generations,
            policy_version=version,
        )
        batches = length_sorted_batches([len(r.prompt) for r in requests], self.batch_size)
        missing = self._most_batches(len(batches)) - len(batches)
        completions: dict[int, Completion] = {}
        with torch.no_grad(), evaluation_mode(self.model), self.gather(self.model):
            for rows in batches:
                drawn = self._draw([requests[row] for row in rows], sampling)
                completions |= zip(rows, drawn, strict=True)
                if on_progress is not None:
                    on_progress(len(rows))
            for _ in range(missing):  # take part in the forward passes of busier ranks
                self._draw(requests[:1], sampling)
        return assemble(requests, [completions[row] for row in range(len(requests))], version)

    def log_probs(
        self,
        prompts: list[list[int]],
        completions: list[list[int]],
        *,
        temperature: float = 1.0,
    ) -> list[list[float]]:
        """Teacher-forced log-probs; see :meth:`RolloutEngine.log_probs`."""
        check_completions(prompts, completions, **self._limits())
        with torch.no_grad(), self.gather(self.model):
            return sequence_log_probs(
                self.model,
                prompts,
                completions,
                temperature=temperature,
                pad_id=self.pad_token_id,
                batch_size=self.batch_size,
            )

    def sync(self, model: nn.Module, *, version: int) -> None:
        """Point at ``model``, whose weights are the engine's own, and set the version."""
        self.model = unwrap_model(model)
        self.policy_version = version

    def close(self) -> None:
        """Let go of the model."""
        self.model = None

    def _limits(self) -> dict[str, int | None]:
        config = self.model.config.get_text_config()
        return {
            "context_length": getattr(config, "max_position_embeddings", None),
            "vocab_size": getattr(config, "vocab_size", None),
        }

    def _draw(self, requests: Sequence[Request], sampling: SamplingConfig) -> list[Completion]:
        device = next(self.model.parameters()).device
        prompts = [request.prompt for request in requests]
        padded = left_pad(prompts, pad_id=self.pad_token_id, device=device)
        seeds = torch.tensor([request.seed for request in requests], device=device)
        width = padded.input_ids.shape[1]
        sampler = GumbelSampler(seeds, width, sampling)
        with self._generation_config(sampling.max_new_tokens) as config:
            sequences = self.model.generate(
                input_ids=padded.input_ids,
                attention_mask=padded.attention_mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([sampler]),
                synced_gpus=self.synced_gpus,
            )
        return self._cut(sequences[:, width:], sampler.log_probs())

    def _cut(self, tokens: Tensor, log_probs: Tensor) -> list[Completion]:
        """Cut every row after its first end-of-sequence id."""
        eos = set(self.eos_token_ids)
        completions: list[Completion] = []
        for row, scores in zip(tokens.tolist(), log_probs.tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in eos), None)
            length = len(row) if end is None else end + 1
            reason = "length" if end is None else "stop"
            completions.append(Completion(row[:length], scores[:length], reason))
        return completions

    @contextmanager
    def _generation_config(self, max_new_tokens: int) -> Iterator[GenerationConfig]:
        """The only settings ``generate`` sees while inside."""
        # `generate` fills gaps from the model's own config, whose penalties would bend the policy.
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=self.eos_token_ids,
            pad_token_id=self.pad_token_id,
        )
        inner: Any = base_model(self.model)
        kept = inner.generation_config
        inner.generation_config = config
        try:
            yield config
        finally:
            inner.generation_config = kept

    def _most_batches(self, num_batches: int) -> int:
        """Number of batches of the busiest rank if forward passes are collective."""
        if not (self.synced_gpus and dist.is_available() and dist.is_initialized()):
            return num_batches
        most = torch.tensor([num_batches], device=next(self.model.parameters()).device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most.item())
