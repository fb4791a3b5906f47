"""Prompts and answers, plain or conversational, to token ids: where the answer starts and ends.

The conventions are TRL's: the prompt is tokenized with its generation prompt, prompt and completion
are tokenized together, and the completion starts where the two diverge. Beyond that, a completion
ends in exactly one end-of-sequence token, as a generated one does.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Text = str | Sequence[Message]

logger = logging.getLogger(__name__)
_WARNED: set[str] = set()


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Text,
    system_prompt: str | None = None,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids that a model is to continue.

    Text is tokenized as it stands. Messages go through the chat template up to where the
    assistant's turn begins; if the last message is the assistant's, it is continued instead.

    Args:
        tokenizer: The model's tokenizer.
        prompt: Text, or a list of ``{"role": ..., "content": ...}`` messages.
        system_prompt: Takes the place of the messages' system message, or stands before a plain
            prompt with an empty line between.
        chat_template_kwargs: Further arguments of the chat template (``enable_thinking``,
            ``tools``).

    Raises:
        ValueError: an empty prompt, or neither text nor messages.

    Example:
        >>> from llm_xrisk.data.gsm8k_steps import tiny_model_path
        >>> from transformers import AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
        >>> tokenizer.decode(encode_prompt(tokenizer, [{"role": "user", "content": "8/2="}]))
        '<|user|>8/2=<|end|><|assistant|>'
    """
    prompt = _with_system(prompt, system_prompt)
    if isinstance(prompt, str):
        return _encode_text(tokenizer, prompt)
    return _open_turn(tokenizer, prompt, dict(chat_template_kwargs or {}))


def encode_prompt_completion(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Text,
    completion: Text,
    *,
    system_prompt: str | None = None,
    add_eos: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    eos_token_ids: Iterable[int] | None = None,
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its completion, whose concatenation the model is to score.

    The completion holds no header of the assistant's turn and ends in exactly one end-of-sequence
    id; what the template writes behind that (a newline, a second one) is cut. Where the tokenized
    prompt is no prefix of the tokenized whole, the prompt is cut to what they share, with one
    warning: the completion then begins with the rest.

    Args:
        tokenizer: The model's tokenizer.
        prompt: Text, or a list of messages.
        completion: Text, or a list of one assistant message.
        system_prompt: See :func:`encode_prompt`.
        add_eos: False for an answer cut at a length limit, which gets no end-of-sequence id.
        chat_template_kwargs: Further arguments of the chat template.
        eos_token_ids: Ids that end an answer, besides the tokenizer's own. Without them a template
            that never writes the tokenizer's own ends a turn with its first special token.

    Returns:
        ``(prompt_ids, completion_ids)``, neither empty.

    Raises:
        ValueError: an empty prompt or completion, several messages as completion, a prompt that
            melts into the completion, or no end-of-sequence token where one is needed.

    Example:
        >>> from llm_xrisk.data.gsm8k_steps import tiny_model_path
        >>> from transformers import AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
        >>> prompt_ids, completion_ids = encode_prompt_completion(tokenizer, "8/2=", "4")
        >>> tokenizer.decode(prompt_ids), tokenizer.decode(completion_ids)
        ('8/2=', '4<|end|>')
    """
    prompt = _with_system(prompt, system_prompt)
    prompt_ids = encode_prompt(tokenizer, prompt, chat_template_kwargs=chat_template_kwargs)
    content = completion_content(completion)
    whole = _encode_whole(tokenizer, prompt, content, dict(chat_template_kwargs or {}))
    shared = _common_prefix(prompt_ids, whole)
    if shared == 0:
        raise ValueError(
            f"prompt {prompt!r} and completion {content!r} share no first token; the prompt needs "
            "at least one token of its own: end it on a token boundary, for instance with a space"
        )
    if shared < len(prompt_ids):
        _warn_of_boundary(tokenizer, prompt_ids[shared:])
    plain = isinstance(prompt, str)
    body, end = _split_at_end(tokenizer, whole[shared:], eos_token_ids or (), plain)
    if not body:
        raise ValueError(
            f"got the empty completion {completion!r} for prompt {prompt!r}; it needs at least one "
            "token before the end of sequence: filter such rows out"
        )
    if not add_eos:
        return whole[:shared], body
    if end is None:
        raise ValueError(
            "the tokenizer has no eos_token and none stands in the text; a completion must end in "
            "one: set tokenizer.eos_token or pass eos_token_ids"
        )
    return whole[:shared], [*body, end]


def completion_content(completion: Text) -> str:
    """The text of a completion, which is a string or a list of one assistant message.

    Raises:
        ValueError: several messages, or none from an assistant.

    Example:
        >>> completion_content([{"role": "assistant", "content": "24"}])
        '24'
    """
    if isinstance(completion, str):
        return completion
    messages = _messages("completion", completion) if len(completion) else []
    if not messages:
        return ""
    if len(messages) > 1 or messages[0]["role"] != "assistant":
        roles = [message["role"] for message in messages]
        raise ValueError(
            f"got a completion of messages by {roles}; it must be one assistant message: move "
            "earlier turns into the prompt"
        )
    return messages[0]["content"]


def as_completion(prompt: Text, text: str) -> str | list[dict[str, str]]:
    """A completion in the form of its prompt: text for text, one message for messages.

    Example:
        >>> as_completion("8/2=", "4")
        '4'
    """
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _encode_text(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    # Some tokenizers end every text; a prompt that is to be continued must not end.
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids.pop()
    return ids


def _with_system(prompt: Text, system_prompt: str | None) -> str | list[dict[str, Any]]:
    """The prompt, checked, under the given system prompt."""
    if len(prompt) == 0:
        raise ValueError(
            f"got the empty prompt {prompt!r}; it needs at least one token: filter such rows out"
        )
    if isinstance(prompt, str):
        return prompt if system_prompt is None else f"{system_prompt}\n\n{prompt}"
    messages = _messages("prompt", prompt)
    if system_prompt is None:
        return messages
    rest = messages[1:] if messages[0]["role"] == "system" else messages
    return [{"role": "system", "content": system_prompt}, *rest]


def _encode_whole(
    tokenizer: Any, prompt: str | list[dict[str, Any]], content: str, kwargs: dict[str, Any]
) -> list[int]:
    if isinstance(prompt, str):
        return _encode_text(tokenizer, prompt + content)
    if prompt[-1]["role"] == "assistant":
        *prompt, begun = prompt
        content = begun["content"] + content
    return _render(tokenizer, [*prompt, {"role": "assistant", "content": content}], kwargs)


def _open_turn(tokenizer: Any, messages: list[dict[str, Any]], kwargs: dict[str, Any]) -> list[int]:
    """The conversation up to the first token of the assistant's answer."""
    if messages[-1]["role"] == "assistant":
        return _render(tokenizer, messages, kwargs | {"continue_final_message": True})
    opened = _render(tokenizer, messages, kwargs | {"add_generation_prompt": True})
    if opened != _render(tokenizer, messages, kwargs):
        return opened
    # The template knows no generation prompt; the header is what two different answers share.
    one, other = (
        _render(tokenizer, [*messages, {"role": "assistant", "content": answer}], kwargs)
        for answer in ("0", "x")
    )
    header = _common_prefix(one, other)
    return one[:header] if header > len(opened) else opened


def _render(tokenizer: Any, messages: list[dict[str, Any]], kwargs: dict[str, Any]) -> list[int]:
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)
    return list(encoded["input_ids"])


def _messages(what: str, value: Sequence[Message]) -> list[dict[str, Any]]:
    if not all(isinstance(item, Mapping) and {"role", "content"} <= set(item) for item in value):
        raise ValueError(
            f"got a {what} of type {type(value).__name__}: {str(value)[:80]!r}; it must be text or "
            "a list of messages with 'role' and 'content': convert the column"
        )
    return [dict(item) for item in value]


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    differ = (place for place, (a, b) in enumerate(pairs) if a != b)
    return next(differ, min(len(one), len(other)))


def _split_at_end(
    tokenizer: Any, ids: list[int], eos_token_ids: Iterable[int], plain: bool
) -> tuple[list[int], int | None]:
    """What comes before the first id that ends a completion, and that id."""
    ends = {*eos_token_ids, tokenizer.eos_token_id}
    if not plain and not ends & set(ids):
        ends = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    place = next((place for place, number in enumerate(ids) if number in ends), None)
    if place is None:
        return ids, tokenizer.eos_token_id
    return ids[:place], ids[place]


def _warn_of_boundary(tokenizer: Any, lost: list[int]) -> None:
    if tokenizer.name_or_path in _WARNED:
        return
    _WARNED.add(tokenizer.name_or_path)
    logger.warning(
        "The tokenized prompt is no prefix of the tokenized prompt and completion: tokens merge "
        "across the boundary, or the chat template renders the prompt differently by itself. "
        "Completions start where the two diverge, which leaves %r out of the prompt and gives the "
        "model another context than at inference. End prompts on a token boundary, or use a "
        "template that renders both alike. Said once; it likely holds for every row.",
        tokenizer.decode(lost),
    )
