"""Hashes that tell whether two tokenizers, or two policies, are the same."""

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLED = 512
# What trainers and engines set on a config without changing what the model computes.
_INCIDENTAL = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id"),
    *("output_attentions", "output_hidden_states", "return_dict", "problem_type"),
    *("_attn_implementation_internal", "attn_implementation", "quantization_config"),
}


@dataclass(frozen=True)
class Identity:
    """What a tokenizer or a policy is: the hash decides, the name is for people."""

    name: str
    fingerprint: str


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of vocabulary, chat template and special tokens.

    The padding token is left out: it is never scored, and trainers set it where it is missing.

    Returns:
        16 hexadecimal digits.
    """
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"}
    parts = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, special]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> Identity:
    """Name and fingerprint of a tokenizer."""
    return Identity(tokenizer.name_or_path, tokenizer_fingerprint(tokenizer))


@torch.no_grad()
def model_fingerprint(
    model: nn.Module,
    *,
    gather: Callable[[list[nn.Parameter]], AbstractContextManager[Any]] = lambda _: nullcontext(),
) -> str:
    """Hash of a policy: its config, and up to 512 evenly spaced numbers of every parameter.

    A training step moves nearly all numbers, so two policies differ in thousands of the sampled
    ones. The numbers are rounded to bfloat16 first: a checkpoint is the same policy whichever
    precision it is loaded in. Adapters are left out; a PEFT model has the fingerprint of its base,
    which is the reference policy when training adapters.

    Args:
        model: A causal language model, wrapped in PEFT or not.
        gather: Context in which the given parameters are whole, for ZeRO-3; collective.

    Returns:
        16 hexadecimal digits.

    Raises:
        ValueError: a parameter is empty, as the partitioned ones of ZeRO-3 are, or the model came
            with its adapter from the adapter's directory: base and policy cannot be told apart.
    """
    if hasattr(model, "peft_config") and not hasattr(model, "get_base_model"):
        raise ValueError(
            "got a model loaded from an adapter's directory, needs a model whose weights are the "
            "policy's: save peft.AutoPeftModelForCausalLM.from_pretrained(directory)"
            ".merge_and_unload() and use that"
        )
    prefix = getattr(getattr(model, "base_model", None), "prefix", "lora_")
    if hasattr(model, "peft_config"):
        model = model.get_base_model()  # type: ignore[operator]
    digest = hashlib.sha256(_config_text(model).encode())
    for name, parameter in model.named_parameters():
        if prefix in name or "modules_to_save" in name:
            continue
        name = name.replace("base_layer.", "").replace("original_module.", "")
        with gather([parameter]):
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(_sample(name, parameter))
    return digest.hexdigest()[:16]


def model_identity(model: nn.Module) -> Identity:
    """Name and fingerprint of a policy."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return Identity(name, model_fingerprint(model))


def _sample(name: str, parameter: nn.Parameter) -> bytes:
    if parameter.numel() == 0:
        raise ValueError(
            f"parameter {name} is empty here; a fingerprint needs whole weights: pass "
            "gather=llm_xrisk.rollout.weight_sync.gather_zero3"
        )
    numbers = parameter.detach().flatten()
    chosen = numbers[:: max(1, numbers.numel() // _SAMPLED)]
    return chosen.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes()


def _config_text(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    fields = config.to_dict() if hasattr(config, "to_dict") else {}
    return json.dumps(_essential(fields), sort_keys=True, default=str)


def _essential(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _essential(value) if isinstance(value, dict) else value
        for key, value in fields.items()
        if key not in _INCIDENTAL
    }
