"""Generating completions with the policy being trained, behind one interface."""

from llm_xrisk.rollout.engine import RolloutBatch as RolloutBatch
from llm_xrisk.rollout.engine import RolloutEngine as RolloutEngine
from llm_xrisk.rollout.engine import SamplingConfig as SamplingConfig
from llm_xrisk.rollout.engine import make_engine as make_engine
from llm_xrisk.rollout.engine import row_seed as row_seed
from llm_xrisk.rollout.transformers_engine import TransformersEngine as TransformersEngine
