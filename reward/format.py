# SPDX-License-Identifier: Apache-2.0
"""Does a completion have the form that was asked for? All by plain search, in linear time.

A form says nothing of the answer: pay it through `reward.compose.Gate`, where the answer is right.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from reward.base import completion_text

OPEN, CLOSE = "<think>", "</think>"
TAGS = (OPEN, CLOSE, "<answer>", "</answer>")

_BOX = re.compile(r"\\(?:boxed|fbox)[ \t\n]*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is a sign, not a bracket


def think_answer_format(
    prompts: Sequence[object],
    completions: Sequence[object],
    completion_ids: Sequence[Sequence[int]] | None = None,
    **columns: object,
) -> list[float | None]:
    """Reward 1.0 for reasoning in think tags and then the answer, else 0.0.

    The text must start with `<think>`, hold no second `<think>`, and hold a `</think>`. That is
    what TRL's `think_format_reward` takes: no whitespace before the tag, while an empty thought, an
    empty answer and a second `</think>` pass; :func:`sections` is stricter. TRL looks at the first
    message of a completion and stops at one without text; this looks at the last, and a completion
    without text scores 0.0.

    Args:
        prompts: Unused; part of the signature.
        completions: Strings, or lists of messages of which the last one is read.
        completion_ids: Unused; part of the signature.
        columns: Other data set columns; unused.

    Returns:
        One reward for each completion, in order.

    Example:
        >>> think_answer_format(["1+1="] * 2, ["<think>easy</think>2", "<think>easy 2"])
        [1.0, 0.0]
    """
    return [float(_has_thought(completion_text(completion))) for completion in completions]


def boxed_once(
    prompts: Sequence[object],
    completions: Sequence[object],
    completion_ids: Sequence[Sequence[int]] | None = None,
    **columns: object,
) -> list[float | None]:
    r"""Reward 1.0 for exactly one answer in a box, `\boxed{...}` or `\fbox{...}`, else 0.0.

    Only what follows the last `</think>` counts, and a thought that is never closed has no answer.
    The braces must close and hold something; a box in a box is two boxes.

    Args:
        prompts: Unused; part of the signature.
        completions: Strings, or lists of messages of which the last one is read.
        completion_ids: Unused; part of the signature.
        columns: Other data set columns; unused.

    Returns:
        One reward for each completion, in order.

    Example:
        >>> boxed_once(["1+1="] * 3, [r"\boxed{2}", "2", r"\boxed{2} or \boxed{3}"])
        [1.0, 0.0, 0.0]
    """
    return [float(_has_one_box(completion_text(completion))) for completion in completions]


def tag_count(
    prompts: Sequence[object],
    completions: Sequence[object],
    completion_ids: Sequence[Sequence[int]] | None = None,
    **columns: object,
) -> list[float | None]:
    """Reward a quarter for each of the think and answer tags that occurs exactly once.

    A ramp towards a form that a model does not have yet. It asks neither for an order nor, as
    open-r1's `tag_count_reward` does, for line breaks around the tags.

    Args:
        prompts: Unused; part of the signature.
        completions: Strings, or lists of messages of which the last one is read.
        completion_ids: Unused; part of the signature.
        columns: Other data set columns; unused.

    Returns:
        One reward in [0, 1] for each completion, in order.

    Example:
        >>> tag_count(["1+1="] * 2, ["<think>easy</think>2", "<think><think>"])
        [0.5, 0.0]
    """
    texts = map(completion_text, completions)
    return [sum(text.count(tag) == 1 for tag in TAGS) / len(TAGS) for text in texts]


def sections(*tags: str) -> "Sections":
    """Reward 1.0 for a text that is tagged sections, in this order, each once, and nothing else.

    Whitespace may stand between, before and after the sections. Each must hold something, and no
    tag of theirs. With `sections("think", "answer")` this is the form of DeepSeek-R1-Zero.

    Args:
        tags: Names of the sections, without brackets.

    Returns:
        A reward function named `sections`.

    Raises:
        ValueError: If there are no names, or a name is given twice or is not one word.

    Example:
        >>> reward = sections("think", "answer")
        >>> reward(["1+1="] * 2, ["<think>easy</think> <answer>2</answer>", "<think>easy</think>2"])
        [1.0, 0.0]
    """
    return Sections(tags)


@dataclass(frozen=True)
class Sections:
    """What :func:`sections` returns."""

    tags: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse names that make no tags."""
        words = all(re.fullmatch(r"\w[\w-]*", tag) for tag in self.tags)
        if not self.tags or not words or len(set(self.tags)) < len(self.tags):
            raise ValueError(
                f"got the sections {list(self.tags)}; need one or several different words, as in "
                "sections('think', 'answer')"
            )
        for attribute in ("__name__", "__qualname__"):
            object.__setattr__(self, attribute, "sections")

    def __call__(
        self,
        prompts: Sequence[object],
        completions: Sequence[object],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: object,
    ) -> list[float | None]:
        """Return one reward per completion (TRL's reward signature)."""
        return [float(self._matches(completion_text(completion))) for completion in completions]

    def _matches(self, text: str) -> bool:
        marks = [mark for tag in self.tags for mark in (f"<{tag}>", f"</{tag}>")]
        if any(text.count(mark) != 1 for mark in marks):
            return False
        starts = [text.index(mark) for mark in marks]
        if starts != sorted(starts):
            return False
        ends = [0, *(start + len(mark) for start, mark in zip(starts, marks, strict=True))]
        between = [text[a:b].strip() for a, b in zip(ends, [*starts, len(text)], strict=True)]
        return not any(between[::2]) and all(between[1::2])


def _has_thought(text: str) -> bool:
    if not text.startswith(OPEN):
        return False
    return text.find(OPEN, len(OPEN)) < 0 and text.find(CLOSE, len(OPEN)) >= 0


def _has_one_box(text: str) -> bool:
    text = text[text.rfind(CLOSE) + len(CLOSE) :] if CLOSE in text else text
    boxes = list(_BOX.finditer(text))
    if OPEN in text or len(boxes) != 1:
        return False
    start, depth = boxes[0].end(), 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return bool(text[start : brace.start()].strip())
    return False
