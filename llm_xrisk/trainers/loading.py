"""Models, adapters and tokenizers as trainers are given them."""

from types import MethodType
from typing import Any

from accelerate.utils.operations import ConvertOutputsToFp32
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

_PEFT_HINT = 'LoRA needs peft: pip install "peft>=0.17"'


def load_model(
    model: str | nn.Module, init_kwargs: Any, peft_config: Any, auto: Any = AutoModelForCausalLM
) -> Any:
    """Load a model by name, by default a causal language model, and put an adapter on it if asked.

    Args:
        model: A path, a model, or a PEFT model.
        init_kwargs: For ``from_pretrained``.
        peft_config: An adapter's configuration, or None.
        auto: The class of transformers that loads a name.

    Raises:
        ValueError: ``init_kwargs`` with a model that is loaded already, an adapter on top of one,
            or the name of an adapter, whose weights would be frozen.
        ImportError: peft is needed and missing.
    """
    if isinstance(model, str):
        name, model = model, auto.from_pretrained(model, **(init_kwargs or {}))
        if hasattr(model, "peft_config"):
            raise ValueError(
                f"got {name!r}, which is an adapter; to train it further pass the model "
                "peft.AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True), to build "
                "on it save that model's merge_and_unload() and pass its name"
            )
    elif init_kwargs:
        raise ValueError(
            f"got model_init_kwargs={init_kwargs} and a model that is loaded already; pass the "
            "model's name, or drop model_init_kwargs"
        )
    if peft_config is None:
        return model
    try:
        from peft import PeftModel, get_peft_model
    except ImportError as error:
        raise ImportError(_PEFT_HINT) from error
    if isinstance(model, PeftModel):
        raise ValueError(
            "got a PEFT model and a peft_config; pass the base model with the config, or the PEFT "
            "model without"
        )
    return get_peft_model(model, peft_config)  # pyright: ignore


def load_tokenizer(processing_class: Any, model: Any) -> Any:
    """The given tokenizer, or the model's own; it must know a pad token.

    Raises:
        ValueError: neither a pad nor an end-of-sequence token is defined.
    """
    if processing_class is None:
        processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path)
    if processing_class.pad_token_id is None:
        if processing_class.eos_token is None:
            raise ValueError("the tokenizer has neither pad nor eos token; set tokenizer.pad_token")
        processing_class.pad_token = processing_class.eos_token
    return processing_class


def is_peft(model: Any) -> bool:
    """Whether a model carries an adapter that can be switched off."""
    return hasattr(model, "disable_adapter") and hasattr(model, "peft_config")


def keep_outputs_narrow(model: Any) -> None:
    """Undo the float32 copy that accelerate makes of a model's outputs under mixed precision.

    Logits are reduced in float32 chunk by chunk; a whole copy would be their largest tensor.
    """
    forward = getattr(getattr(model, "forward", None), "__func__", None)
    wide = getattr(forward, "__wrapped__", None)
    if isinstance(wide, ConvertOutputsToFp32):
        model.forward = MethodType(wide.model_forward, model)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0: scores are taken without dropout, gradients should be too.

    Rates are those of ``nn.Dropout`` and the numbers that attention layers keep for themselves
    (``attention_dropout``, ``layerdrop``).
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
