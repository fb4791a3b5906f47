"""Which TempNet belongs to a model that is to be served."""

import os
from typing import Any

SETTING = "tempnet"  # the key in vLLM's additional_config, and in a request's extra_args
NO = (False, 0, "0", "false", "none")


def tempnet_folder(model: str, setting: Any = None) -> str | None:
    """Where the TempNet to serve is.

    Args:
        model: Name or folder of the model.
        setting: A folder, ``False`` or ``"none"`` for none, or ``None`` to look in the model's
            folder: what vLLM's ``additional_config`` has under ``"tempnet"``.

    Returns:
        A folder, or None.

    Example:
        >>> tempnet_folder("Qwen/Qwen2.5-0.5B"), tempnet_folder("Qwen/Qwen2.5-0.5B", "mine")
        (None, 'mine')
    """
    if setting is None:
        # not through pathlib, which raises on names of models that no path could have
        return model if os.path.isfile(os.path.join(model, "tempnet_config.json")) else None
    return None if said(setting) in NO else str(setting)


def said(value: Any) -> Any:
    """A word in lower case; anything else as it is."""
    return value.lower() if isinstance(value, str) else value
