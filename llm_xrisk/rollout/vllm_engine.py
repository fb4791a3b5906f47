"""Rollouts by vLLM in the trainer's process, on a CPU or a GPU."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

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
from llm_xrisk.rollout.scoring import sequence_log_probs
from llm_xrisk.rollout.transformers_engine import end_of_sequence_ids
from llm_xrisk.rollout.vllm_process import (
    leave_process_groups,
    process_groups_kept,
    process_state_kept,
    start_vllm,
)
from llm_xrisk.rollout.weight_sync import (
    Gather,
    check_sync,
    gather_zero3,
    iter_named_parameters,
    make_probe,
    unwrap_model,
)

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 3e-1}


class VLLMEngine(RolloutEngine):
    """Generates with a vLLM engine that lives in the trainer's process and owns its weights.

    Every request carries its own seed, so completions do not depend on scheduling, apart from
    float rounding. One engine per process: under a launcher with several processes each rank
    builds its own and all ranks call :meth:`sync` together. Building the engine and running it
    leave the process's random generators, its thread setting and its launcher variables alone.

    Args:
        model: A path to a checkpoint, or the trainer's model: then the engine starts from its
            config and takes the weights by :meth:`sync` at once.
        tokenizer: Source of end-of-sequence ids; a path brings its own.
        eos_token_ids: Ids that end a completion, in place of the discovered ones.
        dtype: What the engine computes in; float32 on a CPU and the checkpoint's on a GPU if
            left out.
        max_model_len: Most tokens of prompt and completion; if left out, one less than the
            model's own limit.
        gpu_memory_utilization: Share of the device's memory that vLLM may take.
        check: Whether each sync ends with :func:`check_sync` against the trainer's model.
        tolerance: Largest difference that check allows; by default 1e-4 in float32, 5e-2 in
            float16 and 0.3 in bfloat16, where it finds a broken sync but not a small lag.
        gather: See :func:`iter_named_parameters`.
        **options: Further arguments of ``vllm.LLM``.

    Raises:
        ImportError: vLLM is not installed.
        RuntimeError: the check after the first sync fails.

    Example:
        ``engine = VLLMEngine(trainer.model, tokenizer, max_model_len=4096)``
    """

    _alive = 0
    _opens_group = False

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        tokenizer: Any = None,
        *,
        eos_token_ids: list[int] | None = None,
        dtype: str | None = None,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.3,
        check: bool = True,
        tolerance: float | None = None,
        gather: Gather = gather_zero3,
        **options: Any,
    ) -> None:
        self.check = check
        self.gather = gather
        settings: dict[str, Any] = {
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            "additional_config": {"tempnet": False},  # rollouts are of the model, not tempered
            "dtype": dtype or ("auto" if torch.cuda.is_available() else "float32"),
            "gpu_memory_utilization": gpu_memory_utilization,
            # Log pi of the sampled token after the temperature; see generate() for truncation.
            "logprobs_mode": "processed_logprobs",
            **options,
        }
        live = model if isinstance(model, nn.Module) else None
        inner: Any = _Checkpoint(str(model)) if live is None else unwrap_model(live)
        text_config = inner.config.get_text_config()
        self.vocab_size: int = text_config.vocab_size
        # vLLM's own limit is one above ours: scoring a full row asks it for one more token.
        longest = int(text_config.max_position_embeddings)
        settings["max_model_len"] = min((max_model_len or longest) + 1, longest)
        self.context_length = settings["max_model_len"] - 1
        tokenizer = tokenizer or getattr(inner, "tokenizer", None)
        self.eos_token_ids = eos_token_ids or end_of_sequence_ids(inner, tokenizer)
        if VLLMEngine._alive == 0:
            VLLMEngine._opens_group = not dist.is_initialized()
        self.llm: Any = start_vllm(inner, live is not None, settings)
        VLLMEngine._alive += 1
        compute_dtype = self.llm.llm_engine.model_config.dtype
        self.tolerance = _TOLERANCE[compute_dtype] if tolerance is None else tolerance
        if live is not None:
            self._sync_or_close(live)

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
        completions: list[Completion] = []
        for part in self._parts(requests, on_progress):
            completions += self._draw(part, sampling)
            if on_progress is not None:
                on_progress(len(part))
        batch = assemble(requests, completions, version)
        if sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0):
            # vLLM's processed log-probs are those of the truncated distribution.
            batch.log_probs = self.log_probs(
                batch.prompt_ids, batch.completion_ids, temperature=sampling.temperature
            )
        return batch

    def log_probs(
        self,
        prompts: list[list[int]],
        completions: list[list[int]],
        *,
        temperature: float = 1.0,
    ) -> list[list[float]]:
        """Teacher-forced log-probs; see :meth:`RolloutEngine.log_probs`."""
        from vllm import SamplingParams

        check_completions(prompts, completions, **self._limits())
        parameters = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False
        )
        rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
        with self._logits_scaled(1 / (temperature or 1.0)):
            outputs = self._run(rows, [parameters] * len(rows))
        return [
            [
                scores[token].logprob
                for token, scores in zip(
                    completion, output.prompt_logprobs[-len(completion) :], strict=True
                )
            ]
            for completion, output in zip(completions, outputs, strict=True)
        ]

    def sync(self, model: nn.Module, *, version: int) -> None:
        """Stream the model's weights into vLLM and check that they arrived.

        Args:
            model: The trainer's model; see :func:`iter_named_parameters` for what it may be.
            version: The new ``policy_version``.

        Raises:
            RuntimeError: the engine's log-probs of a probe differ from the model's.
        """
        weights = iter_named_parameters(model, gather=self.gather)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.apply_model(refresh_tied_heads)
        self.llm.reset_prefix_cache()
        self.policy_version = version
        if self.check:
            probe = make_probe(self.vocab_size, length=min(12, self.context_length))
            expected = sequence_log_probs(unwrap_model(model), probe.prompts, probe.completions)
            check_sync(self, expected, probe, tolerance=self.tolerance)

    def close(self) -> None:
        """Stop vLLM, give back its memory, and leave no process group that it opened."""
        if self.llm is None:
            return
        with process_groups_kept():
            self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        VLLMEngine._alive -= 1
        if VLLMEngine._alive == 0:
            leave_process_groups(also_world=VLLMEngine._opens_group)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _sync_or_close(self, model: nn.Module) -> None:
        try:
            self.sync(model, version=0)
        except BaseException:
            self.close()
            raise

    def _limits(self) -> dict[str, int | None]:
        return {"context_length": self.context_length, "vocab_size": self.vocab_size}

    def _parts(
        self, requests: Sequence[Request], on_progress: Progress | None
    ) -> list[Sequence[Request]]:
        """All requests at once, or pieces of twice the engine's batch if someone watches."""
        if on_progress is None:
            return [requests]
        size = 2 * self.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        return [requests[start : start + size] for start in range(0, len(requests), size)]

    def _draw(self, requests: Sequence[Request], sampling: SamplingConfig) -> list[Completion]:
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=request.seed,
                stop_token_ids=self.eos_token_ids,
                logprobs=0,
                detokenize=False,
            )
            for request in requests
        ]
        outputs = self._run([request.prompt for request in requests], parameters)
        return [_completion(output.outputs[0]) for output in outputs]

    def _run(self, rows: Sequence[list[int]], parameters: list[Any]) -> list[Any]:
        inputs = [{"prompt_token_ids": row} for row in rows]
        with process_state_kept():
            return self.llm.generate(inputs, parameters, use_tqdm=False)

    @contextmanager
    def _logits_scaled(self, factor: float) -> Iterator[None]:
        """Logits at another temperature: vLLM scores prompts at temperature 1 only."""
        if factor == 1:
            yield
            return
        kept = self.llm.apply_model(partial(_scale_logits, factor=factor))[0]
        try:
            yield
        finally:
            self.llm.apply_model(partial(_restore_logit_scales, scales=kept))


def refresh_tied_heads(model: nn.Module) -> int:
    """Repack every output head of a vLLM model from the weight it now has.

    On a CPU vLLM computes with a packed copy of the head's weight. A head tied to the embedding
    has no weight of its own in the stream, so a reload leaves the copy as it was.

    Returns:
        The number of heads repacked; 0 on a GPU, where nothing is packed.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    heads: list[Any] = [
        module
        for module in model.modules()
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear")
    ]
    for head in heads:
        head.quant_method.process_weights_after_loading(head)
    return len(heads)


def _logits_processors(model: nn.Module) -> list[Any]:
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    return [module for module in model.modules() if isinstance(module, LogitsProcessor)]


def _scale_logits(model: nn.Module, factor: float) -> list[float]:
    processors = _logits_processors(model)
    kept = [processor.scale for processor in processors]
    for processor in processors:
        processor.scale *= factor
    return kept


def _restore_logit_scales(model: nn.Module, scales: list[float]) -> None:
    for processor, scale in zip(_logits_processors(model), scales, strict=True):
        processor.scale = scale


def _completion(output: Any) -> Completion:
    tokens = list(output.token_ids)
    scores = [step[token].logprob for token, step in zip(tokens, output.logprobs, strict=True)]
    return Completion(tokens, scores, output.finish_reason)


class _Checkpoint:
    """What the engine reads of a checkpoint on disk besides its weights."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.config = AutoConfig.from_pretrained(path)
        self.generation_config = GenerationConfig.from_model_config(self.config)
        if os.path.exists(os.path.join(path, "generation_config.json")):
            self.generation_config = GenerationConfig.from_pretrained(path)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError):  # a checkpoint without tokenizer; its ids must do
            self.tokenizer = None
