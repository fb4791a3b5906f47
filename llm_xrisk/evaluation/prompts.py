# SPDX-License-Identifier: Apache-2.0
"""Prompts, plain or conversational: to token ids, to messages, to text for a reader."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[Mapping[str, Any]]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Return the token ids a model is to continue.

    Text is tokenized as it is, with the tokenizer's own special tokens. Messages go through its
    chat template, up to the point where the assistant's turn begins; if the last message is the
    assistant's, that message is continued instead.

    Args:
        tokenizer: The model's tokenizer.
        prompt: Text, or a list of `{"role": ..., "content": ...}` messages.

    Returns:
        Token ids, unpadded.

    Raises:
        ValueError: If the prompt is neither, or is empty once tokenized.
    """
    ids: Any
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif _is_conversation(prompt):
        continues = prompt[-1]["role"] == "assistant"
        encoded: Any = tokenizer.apply_chat_template(
            [dict(message) for message in prompt],
            add_generation_prompt=not continues,
            continue_final_message=continues,
            tokenize=True,
            return_dict=True,
        )
        ids = encoded["input_ids"]
    else:
        raise ValueError(
            f"got a prompt of type {type(prompt).__name__}: {str(prompt)[:80]!r}; need text or a "
            "non-empty list of messages with 'role' and 'content': convert the column `prompt`"
        )
    if not ids:
        raise ValueError(f"prompt {prompt!r} has no tokens; remove the row or add a start token")
    return list(ids)


def as_completion(prompt: Prompt, text: str) -> str | list[dict[str, str]]:
    """Return a completion in the form of its prompt: text for text, a message for messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt as text for a reader, one paragraph per message.

    Example:
        >>> prompt_text([{"role": "user", "content": "48/2="}])
        'user: 48/2='
    """
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _is_conversation(prompt: object) -> bool:
    return (
        isinstance(prompt, Sequence)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) and "role" in message for message in prompt)
    )
