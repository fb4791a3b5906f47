# SPDX-License-Identifier: Apache-2.0
"""Verifiable rewards, independent of `llm_xrisk` and of torch."""

from reward.arithmetic import ArithmeticVerifier as ArithmeticVerifier
from reward.arithmetic import arithmetic_reward as arithmetic_reward
from reward.cache import VerdictCache as VerdictCache
from reward.code import CodeVerifier as CodeVerifier
from reward.code import code_reward as code_reward
from reward.compose import ByDataSource as ByDataSource
from reward.compose import Gate as Gate
from reward.compose import WeightedSum as WeightedSum
from reward.format import boxed_once as boxed_once
from reward.format import sections as sections
from reward.format import tag_count as tag_count
from reward.format import think_answer_format as think_answer_format
from reward.lean import LeanVerifier as LeanVerifier
from reward.lean import lean_reward as lean_reward
from reward.length import cosine_length as cosine_length
from reward.length import repetition as repetition
from reward.length import soft_overlong as soft_overlong
from reward.math import MathReward as MathReward
from reward.math import MathVerifier as MathVerifier
from reward.math import math_reward as math_reward
from reward.math import validate_golds as validate_golds
from reward.metrics import Interval as Interval
from reward.metrics import avg_at_k as avg_at_k
from reward.metrics import bootstrap_interval as bootstrap_interval
from reward.metrics import maj_at_k as maj_at_k
from reward.metrics import pass_at_k as pass_at_k
from reward.metrics import pass_hat_k as pass_hat_k
from reward.pool import Outcome as Outcome
from reward.pool import WorkerPool as WorkerPool
from reward.pool import shared_pool as shared_pool
from reward.sandbox import Limits as Limits
from reward.sandbox import Sandbox as Sandbox
from reward.sandbox import SandboxUnavailable as SandboxUnavailable
from reward.sandbox import isolation_level as isolation_level
from reward.types import Verdict as Verdict
