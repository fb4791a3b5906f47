# SPDX-License-Identifier: Apache-2.0
"""From one verifier to a batch reward function with TRL's signature."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from reward.types import Verdict

LogMetric = Callable[[str, float], None]
LogExtra = Callable[[str, list], None]


class Verifier(Protocol):
    """Anything that grades one completion against one gold answer."""

    def verify(self, gold: object, completion: str, *, truncated: bool = False) -> Verdict:
        """Return the verdict; never raise, whatever the two arguments are."""
        ...


def completion_text(completion: object) -> str:
    """Return the text of a completion, plain or conversational.

    A conversational completion is a list of messages; its text is the content of the last one,
    with the text parts of a multi-part content joined. Anything of another shape has no text and
    gives "", because a malformed completion must score 0.0 and not stop a training run.

    Args:
        completion: A string, or a list of `{"role": ..., "content": ...}` messages.

    Returns:
        The text to grade.

    Example:
        >>> completion_text([{"role": "assistant", "content": "24"}])
        '24'
    """
    if isinstance(completion, str):
        return completion
    message = completion[-1] if isinstance(completion, list | tuple) and completion else None
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, list | tuple):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def verify_batch(
    verifier: Verifier,
    completions: Sequence[object],
    golds: Sequence[object],
    *,
    finish_reasons: Sequence[str] | None = None,
) -> list[Verdict]:
    """Grade every completion against its own gold answer.

    Args:
        verifier: What grades one pair.
        completions: Completions, plain or conversational.
        golds: One gold answer for each completion.
        finish_reasons: "stop" or "length" for each completion, if known; "length" is truncated.

    Returns:
        One verdict for each completion, in order.

    Raises:
        ValueError: If the three lists differ in length.
    """
    reasons = ["stop"] * len(completions) if finish_reasons is None else finish_reasons
    if not len(completions) == len(golds) == len(reasons):
        raise ValueError(
            f"got {len(completions)} completions, {len(golds)} gold answers and {len(reasons)} "
            "finish reasons; need one of each per completion: repeat the columns of a prompt for "
            "each of its completions"
        )
    return [
        verifier.verify(gold, completion_text(completion), truncated=reason == "length")
        for completion, gold, reason in zip(completions, golds, reasons, strict=True)
    ]


def log_verdicts(
    verdicts: Iterable[Verdict],
    *,
    name: str,
    log_metric: LogMetric | None = None,
    log_extra: LogExtra | None = None,
) -> None:
    """Report the rate of each status that occurred, and the answers extracted.

    Args:
        verdicts: The verdicts of one batch.
        name: Prefix of the metrics: `{name}/{status}_rate`, and of the extra columns.
        log_metric: TRL's callback for scalars, if there is one.
        log_extra: TRL's callback for columns of the completions table, if there is one.
    """
    verdicts = list(verdicts)
    if log_metric is not None:
        for status, count in sorted(Counter(verdict.status for verdict in verdicts).items()):
            log_metric(f"{name}/{status}_rate", count / len(verdicts))
    if log_extra is not None:
        log_extra(f"{name}_status", [verdict.status for verdict in verdicts])
        log_extra(f"{name}_extracted", [verdict.extracted for verdict in verdicts])
