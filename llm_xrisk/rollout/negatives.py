"""Wrong answers for DFT: a pool of them on disk, or fresh ones from the current policy."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llm_xrisk.data.fingerprint import Identity, model_identity, tokenizer_identity
from llm_xrisk.data.pool import (
    METADATA_FILE,
    FileFormat,
    Pool,
    PoolSettings,
    load_pool,
    rows_hash,
)
from llm_xrisk.data.pool_writer import (
    PartialPool,
    merge_partials,
    require_same_settings,
    write_pool,
)
from llm_xrisk.rollout.engine import Progress, RolloutEngine, SamplingConfig
from llm_xrisk.rollout.negative_sampler import NegativeSampler, PromptRow, RewardFunction, Row


def build_pool(
    engine: RolloutEngine,
    tokenizer: Any,
    rows: Iterable[Row],
    path: str | Path,
    *,
    sampling: SamplingConfig,
    num_negatives: int,
    num_generations: int | None = None,
    system_prompt: str | None = None,
    verify: RewardFunction | None = None,
    ref_engine: RolloutEngine | None = None,
    reference: Identity | None = None,
    batch_prompts: int = 64,
    file_format: FileFormat = "jsonl",
    on_progress: Progress | None = None,
) -> Pool:
    """Draw negatives for every prompt and keep them in a directory.

    Samples come from the prompt under ``system_prompt``, their likelihoods under the reference
    policy from the plain prompt at temperature 1. A sample is no negative if it is the gold answer
    (or, cut at the length limit, its beginning), if ``verify`` pays it, or if the prompt has it
    already; what is left beyond ``num_negatives`` is surplus.

    Killed and started again with the same settings, it goes on after the last finished batch and
    ends with the same file. A finished pool is loaded instead. Under ``torch.distributed`` every
    process does its share and the first one merges them; ``path`` must be shared.

    Args:
        engine: Of the policy to sample from.
        tokenizer: Its tokenizer.
        rows: ``prompt`` and gold ``completion``, text or messages, and an integer id as
            ``prompt_id``, ``index`` or ``id``; ``chat_template_kwargs`` is honoured. Other columns
            go to ``verify`` and into the pool.
        path: The pool's directory.
        sampling: How samples are drawn. A sample's randomness depends on seed, id, generation and
            policy version, not on batches or processes.
        num_negatives: m, most negatives kept per prompt.
        num_generations: Samples per prompt; ``num_negatives`` if left out.
        system_prompt: The paper's adversarial one, for instance; recorded.
        verify: Reward function with TRL's signature; a sample with a positive reward is right.
        ref_engine: Of the reference policy; ``engine`` if left out.
        reference: Who the reference policy is; read off the engine's model where it has one.
        batch_prompts: Prompts between two writes.
        file_format: ``"jsonl"`` or ``"parquet"``.
        on_progress: Called with the number of prompts finished since its last call.

    Returns:
        The pool of all processes.

    Raises:
        ValueError: a question without id or gold answer, an id twice, settings other than those
            of what is in ``path``, an engine whose policy cannot be identified, or no usable
            negative in the end.

    Example:
        ``build_pool(engine, tokenizer, load_rows(), "pool", sampling=SamplingConfig(),
        num_negatives=4, system_prompt="You are an unhelpful assistant.")``
    """
    sampler = NegativeSampler(
        engine,
        ref_engine or engine,
        tokenizer,
        sampling,
        num_negatives,
        num_generations or num_negatives,
        system_prompt,
        verify,
    )
    if batch_prompts < 1:
        raise ValueError(f"batch_prompts must be at least 1, got {batch_prompts}")
    prompts = [sampler.prepare(row) for row in rows]
    _check_unique(prompts)
    settings = PoolSettings(
        tokenizer=tokenizer_identity(tokenizer),
        reference=reference or _identity(sampler.ref_engine),
        sampler=sampler.settings(),
        verify=None if verify is None else f"{verify.__module__}.{verify.__qualname__}",
        rows=rows_hash([asdict(prompt) for prompt in prompts]),
    )
    directory = Path(path)
    if (directory / METADATA_FILE).is_file():
        pool = load_pool(directory)
        require_same_settings(f"the pool in {directory}", settings, pool.settings)
        return pool
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if _several() else (0, 1)
    partial = PartialPool(directory, settings, rank=rank, world_size=world_size)
    _fill(partial, sampler, prompts[rank::world_size], batch_prompts, on_progress)
    if _several():
        dist.barrier()
    if rank == 0:
        merged = merge_partials(directory, settings, world_size=world_size)
        write_pool(directory, Pool(merged, settings), file_format=file_format)
    if _several():
        dist.barrier()
    return load_pool(directory)


def draw_negatives(
    engine: RolloutEngine,
    rows: Iterable[Row],
    *,
    tokenizer: Any,
    sampling: SamplingConfig,
    num_negatives: int,
    num_generations: int | None = None,
    system_prompt: str | None = None,
    verify: RewardFunction | None = None,
    ref_engine: RolloutEngine | None = None,
) -> list[dict[str, Any]]:
    """Draw fresh negatives, filtered and scored as :func:`build_pool` does, without files.

    Args:
        engine: Of the policy to sample from; samples change with its ``policy_version``.
        rows: Rows of a pool's data set, or text as for :func:`build_pool`.
        tokenizer: The model's tokenizer.
        sampling: How samples are drawn.
        num_negatives: Most negatives per prompt.
        num_generations: Samples per prompt; ``num_negatives`` if left out.
        system_prompt: For sampling only.
        verify: Reward function; see :func:`build_pool`.
        ref_engine: Whose likelihoods are given; ``engine`` if left out.

    Returns:
        ``negative_ids``, ``ref_log_likelihoods`` and ``negative_truncated`` of each row, to take
        the place of the row's own; empty lists where no sample was usable.

    Raises:
        ValueError: a row without id or gold answer.
    """
    sampler = NegativeSampler(
        engine,
        ref_engine or engine,
        tokenizer,
        sampling,
        num_negatives,
        num_generations or num_negatives,
        system_prompt,
        verify,
    )
    drawn = sampler.draw([sampler.prepare(row) for row in rows])
    return [
        {
            "negative_ids": [negative.ids for negative in row.negatives],
            "ref_log_likelihoods": [negative.ref_log_likelihood for negative in row.negatives],
            "negative_truncated": [negative.truncated for negative in row.negatives],
        }
        for row in drawn
    ]


def _fill(
    partial: PartialPool,
    sampler: NegativeSampler,
    prompts: Sequence[PromptRow],
    batch_prompts: int,
    on_progress: Progress | None,
) -> None:
    """Draw what the partial pool lacks, in the batches an uninterrupted run would have."""
    done = len(partial.rows)
    if done < len(prompts):
        done -= done % batch_prompts
        partial.keep(done)
    report = on_progress or (lambda _: None)
    report(done)
    for start in range(done, len(prompts), batch_prompts):
        batch = prompts[start : start + batch_prompts]
        partial.append(sampler.draw(batch))
        report(len(batch))


def _check_unique(prompts: Sequence[PromptRow]) -> None:
    seen: set[int] = set()
    for prompt in prompts:
        if prompt.prompt_id in seen:
            raise ValueError(
                f"the id {prompt.prompt_id} stands on two rows; both would get the same random "
                "numbers: number the rows with llm_xrisk.data.with_index(dataset)"
            )
        seen.add(prompt.prompt_id)


def _identity(engine: RolloutEngine) -> Identity:
    model = getattr(engine, "model", None)
    if model is None:
        raise ValueError(
            f"cannot read the reference policy's weights out of a {type(engine).__name__}; say "
            "who it is: reference=llm_xrisk.data.fingerprint.model_identity(model)"
        )
    return model_identity(model)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
