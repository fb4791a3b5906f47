"""What counts as evaluated: the reason that a refusal gives."""

from reward.compare import decide


def test_the_operator_left_over_is_named_in_strict_mode_alone() -> None:
    for answer in (r"\sum_{k=1}^{100} k", r"\int_0^1 x\,dx", r"\gcd(6,9)"):
        decision = decide("3", answer, strict=True)
        assert decision is not None
        assert decision.rule.endswith("is not evaluated"), answer
    lenient = decide("3", r"\gcd(6,9)", strict=False)
    assert lenient is None or "evaluated" not in lenient.rule
