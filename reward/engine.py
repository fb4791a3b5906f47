# SPDX-License-Identifier: Apache-2.0
"""The part of a comparison that may take long: in a worker, which is killed at its deadline.

Values that the grammar of `reward.expression` covers are compared as functions by
`reward.numeric`; the rest goes to math_verify, with its own timeouts off (they need the main thread
and stop nothing there) and its loggers quiet (a traceback an item).
"""

import logging
from typing import Any

from reward import worker
from reward.compare import same_answer
from reward.expression import Node
from reward.normalize import normalize_answer
from reward.numeric import letters, same_equation, same_function
from reward.strictness import too_large
from reward.structure import ascending, read_shape
from reward.units import NO_UNIT, conversion
from reward.values import candidates, cheap_equal, is_degree, read_value, refusal, without_degree

MAX_ANSWER = 600
"""Characters of an answer that math_verify is asked about, where the gold answer is short."""


def equal_by_math_verify(gold: str, answer: str, strict: bool) -> bool:
    r"""Tell whether an answer equals the gold answer, taking as long as that takes.

    Args:
        gold: The gold answer, as written; never exchange the two.
        answer: The extracted answer, as written.
        strict: Whether the answer has to be evaluated.

    Example:
        >>> equal_by_math_verify(r"\frac{\sqrt{8}}{2}", r"\sqrt{2}", True)
        True
    """
    gold, answer = normalize_answer(gold), normalize_answer(answer)
    verdict = same_answer(gold, answer, _equal_values, strict)
    if verdict is None:
        verdict = _equal_equations(gold, answer)
    if verdict is None:
        verdict = _ask_math_verify(gold, answer)
    return verdict


def _equal_values(gold_text: str, answer_text: str, strict: bool) -> bool | None:
    verdict = cheap_equal(gold_text, answer_text, strict)
    if verdict is not None:
        return verdict
    gold, answer = read_value(gold_text), read_value(answer_text)
    if gold.tree is None or answer.tree is None or refusal(gold, answer, strict):
        return (
            False if strict and gold.tree is not None else _ask_math_verify(gold_text, answer_text)
        )
    factor = conversion(gold.unit or NO_UNIT, answer.unit or NO_UNIT) or 1
    first, second = gold.tree, answer.tree
    if first == Node("constant", (), "infty") or second == Node("constant", (), "infty"):
        return first == second
    if is_degree(first) == is_degree(second):
        first, second = without_degree(first), without_degree(second)
    factors = tuple(factor * scale for scale in candidates(gold, answer, strict))
    verdict = same_function(first, second, factors)
    if not verdict and is_degree(first) != is_degree(second):
        verdict = same_function(without_degree(first), without_degree(second), factors)
    if verdict is None:  # no value to be had: too large, or undefined
        return not strict and bool(letters(first)) and _ask_math_verify(gold_text, answer_text)
    return verdict


def _equal_equations(gold: str, answer: str) -> bool | None:
    """Compare two equations or inequalities as they stand, up to a factor."""
    sides, signs = [], set()
    for text in (gold, answer):
        shape = ascending(read_shape(text))
        texts = [item.text for item in shape.items] if shape.kind == "relation" else []
        if shape.kind == "value" and shape.label:
            texts = [shape.label, shape.text]
        elif len(shape.signs) != 1:
            return None
        signs.add(shape.signs[0] if shape.kind == "relation" else "=")
        trees = [read_value(text).tree for text in texts]
        if len(trees) != 2 or trees[0] is None or trees[1] is None:
            return None
        sides.append((trees[0], trees[1]))
    if len(signs) != 1 or not signs <= {"=", "<", r"\le"}:
        return None
    return same_equation(sides[0], sides[1], ordered="=" not in signs)


def _ask_math_verify(gold: str, answer: str) -> bool:
    if len(answer) > max(MAX_ANSWER, 4 * len(gold)) or too_large(answer) or too_large(gold):
        return False
    parse, verify, config, failures = _math_verify()
    try:
        parsed = [
            parse(
                f"\\boxed{{{_plain_latex(text)}}}",
                extraction_config=config,
                extraction_mode="first_match",
                fallback_mode="no_fallback",
                parsing_timeout=None,
            )
            for text in (gold, answer)
        ]
        return bool(verify(parsed[0], parsed[1], timeout_seconds=None))
    except failures:
        return False


def _plain_latex(text: str) -> str:
    return text.replace("¶", r"\\").replace("%", r"\%").replace("°", r"^{\circ}")


def _math_verify() -> tuple[Any, Any, list[Any], tuple[type[BaseException], ...]]:
    import math_verify
    from math_verify.errors import TimeoutException

    for name in ("math_verify", "latex2sympy2_extended", "sympy"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # The whole box or nothing: it must not go on to look for some number inside of it.
    config = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
    return math_verify.parse, math_verify.verify, config, (Exception, TimeoutException)


if worker.inside:  # importing a function's module takes none of an item's time
    _math_verify()
    _ask_math_verify("1", "2")
