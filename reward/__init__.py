# SPDX-License-Identifier: Apache-2.0
"""Verifiable rewards, independent of `llm_xrisk` and of torch."""

from reward.arithmetic import ArithmeticVerifier as ArithmeticVerifier
from reward.arithmetic import arithmetic_reward as arithmetic_reward
from reward.metrics import avg_at_k as avg_at_k
from reward.metrics import maj_at_k as maj_at_k
from reward.metrics import pass_at_k as pass_at_k
from reward.types import Verdict as Verdict
