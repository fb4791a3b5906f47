"""Moving weights from the trainer to an engine, and the check that they arrived."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_xrisk.rollout.engine import RolloutEngine, mix64

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]

_WRAPPERS = {
    "DataParallel",
    "DistributedDataParallel",
    "DeepSpeedEngine",
    "FullyShardedDataParallel",
}
_WRAPPER_PARTS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model inside DDP, DeepSpeed, FSDP and ``torch.compile``; PEFT stays on."""
    # By name: importing deepspeed only to look for its class costs seconds and prints.
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif any(kind.__name__ in _WRAPPERS for kind in type(model).__mro__):
            model = model.module  # type: ignore[assignment]
        else:
            return model


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore


def gather_zero3(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """The context in which DeepSpeed ZeRO-3 parameters are whole; nothing for other ones."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


@torch.inference_mode(False)
@torch.no_grad()
def iter_named_parameters(
    model: nn.Module, *, gather: Gather = gather_zero3
) -> Iterator[tuple[str, Tensor]]:
    """Name and full value of every parameter, as the model's checkpoint would have them.

    Adapters are merged layer by layer; a layer's own weights are put back bit for bit, so that
    many syncs do not let a bfloat16 base model drift. Tied parameters come once. Under ZeRO-3
    and FSDP2 every rank must run through the whole iterator, for gathering is collective.

    Args:
        model: The trainer's model, wrapped (DDP, DeepSpeed, FSDP2, compile, PEFT) or not; call
            inside ``FSDP.summon_full_params`` under FSDP1.
        gather: Given the parameters of one layer, a context in which they are whole.

    Yields:
        ``(name, tensor)``: a copy that belongs to the receiver.

    Raises:
        ValueError: the model has adapters that cannot be merged into a layer.

    Example:
        >>> [name for name, _ in iter_named_parameters(nn.Linear(1, 1))]
        ['weight', 'bias']
    """
    inner = unwrap_model(model)
    merged = _merged_layers(inner)
    seen: set[int] = set()
    for prefix, module in inner.named_modules():
        own = [(name, p) for name, p in _owned(prefix, module, merged) if id(p) not in seen]
        if not own:
            continue
        seen.update(id(parameter) for _, parameter in own)
        layer = merged.get(prefix)
        gathered = own if layer is None else list(layer.named_parameters())
        with gather([parameter for _, parameter in gathered]), _merged(layer):
            for name, parameter in own:
                yield _checkpoint_name(prefix, name), _whole(parameter)


def _merged_layers(model: nn.Module) -> dict[str, Any]:
    """The PEFT layers of a model by name; empty without PEFT."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    if model.active_peft_config.is_prompt_learning:  # type: ignore[union-attr]
        raise ValueError(
            f"{type(model.active_peft_config).__name__} learns a prompt, which has no merged "  # type: ignore[union-attr]
            "weight; use LoRA or the transformers engine"
        )
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            layers[name] = module
        elif isinstance(module, AuxiliaryTrainingWrapper) and not hasattr(
            module, "modules_to_save"
        ):
            raise ValueError(
                f"{name} is a {type(module).__name__}, which has no merged weight; "
                "use plain LoRA, modules_to_save, or the transformers engine"
            )
    return layers


def _owned(
    prefix: str, module: nn.Module, merged: dict[str, Any]
) -> list[tuple[str, nn.Parameter]]:
    """Parameters that ``module`` answers for, named relative to it."""
    layer = merged.get(prefix)
    if layer is not None:
        return list(layer.get_base_layer().named_parameters())
    if any(prefix.startswith(f"{name}.") for name in merged):
        return []  # inside a PEFT layer, which answers for it
    if ".original_module" in prefix:
        return []  # replaced by its trained copy
    return list(module.named_parameters(recurse=False))


@contextmanager
def _merged(layer: Any) -> Iterator[None]:
    """A PEFT layer with its adapters merged; its own weights come back exactly."""
    if layer is None or layer.merged:
        yield
        return
    parameters = list(layer.get_base_layer().parameters())
    kept = [parameter.detach().clone() for parameter in parameters]
    layer.merge()
    try:
        yield
    finally:
        layer.unmerge()
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.data.copy_(value)


def _checkpoint_name(prefix: str, name: str) -> str:
    full = f"{prefix}.{name}" if prefix else name
    full = full.removeprefix("base_model.model.")
    for part in _WRAPPER_PARTS:
        full = full.replace(part, "")
    head, found, tail = full.partition(".modules_to_save.")
    return f"{head}.{tail.partition('.')[2]}" if found else full


def _whole(parameter: Tensor) -> Tensor:
    """A copy of the full value. The copy matters: ZeRO-3 frees its own after the layer."""
    value = parameter.detach()
    if hasattr(value, "full_tensor"):
        return value.full_tensor().clone()  # type: ignore[union-attr]
    return value.clone()


@dataclass(frozen=True)
class SyncProbe:
    """Token sequences on which an engine and its trainer must agree."""

    prompts: list[list[int]]
    completions: list[list[int]]


def make_probe(vocab_size: int, *, num_sequences: int = 2, length: int = 12) -> SyncProbe:
    """Fixed pseudo-random token sequences: cheap, and no token of the vocabulary is special.

    Args:
        vocab_size: Token ids are below it.
        num_sequences: How many sequences.
        length: Tokens each; the first quarter (at least one) is the prompt.
    """
    rows = [
        [mix64((row << 32) + place) % vocab_size for place in range(length)]
        for row in range(1, num_sequences + 1)
    ]
    cut = max(1, length // 4)
    return SyncProbe([row[:cut] for row in rows], [row[cut:] for row in rows])


def largest_difference(left: Iterable[list[float]], right: Iterable[list[float]]) -> float:
    """Largest absolute difference of two equally long lists of rows; nan counts as infinite."""
    worst = 0.0
    for row, other in zip(left, right, strict=True):
        for a, b in zip(row, other, strict=True):
            gap = abs(a - b)
            worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def check_sync(
    engine: RolloutEngine,
    model_log_probs: list[list[float]],
    probe: SyncProbe,
    *,
    tolerance: float = 1e-4,
) -> float:
    """Compare the engine's log-probs of a probe with the trainer's; raise unless they agree.

    An engine may reload weights without an error and go on serving old ones: on a CPU vLLM keeps
    a packed copy of a tied ``lm_head`` that a reload passes by.

    Args:
        engine: The engine that was just synced.
        model_log_probs: The trainer's log-probs of the probe, e.g. from ``sequence_log_probs``.
        probe: The sequences.
        tolerance: Largest absolute difference allowed, in nats.

    Returns:
        The largest difference found.

    Raises:
        RuntimeError: the engine disagrees.
    """
    served = engine.log_probs(probe.prompts, probe.completions)
    worst = largest_difference(served, model_log_probs)
    if worst > tolerance:
        raise RuntimeError(
            f"after the weight sync the engine's log-probs differ from the trainer's by up to "
            f"{worst:.3g} nats, more than {tolerance:.3g}: it serves other weights than those "
            "being trained. Do not train on its rollouts. Build the engine anew from the current "
            "model or use the transformers engine; if one side computes in bfloat16, raise the "
            "tolerance"
        )
    return worst
