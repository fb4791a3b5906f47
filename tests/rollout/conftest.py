"""Tiny random models whose distributions are far from flat."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

Build = Callable[..., PreTrainedModel]


def build_tiny_model(*, tied: bool = True, seed: int = 0) -> PreTrainedModel:
    """Two layers, 96 tokens, end of sequence 1; head_dim 32 is the least vLLM takes on a CPU."""
    config = Qwen3Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.2, generator=generator)
    return model


@pytest.fixture(scope="session")
def tiny_model() -> Build:
    """``tiny_model(tied=True, seed=0)`` builds a fresh model."""
    return build_tiny_model


PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10, 11], [12, 13]]
SAMPLE_IDS = [10, 11, 12, 13]


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Prompts of unequal length, whose sample ids are 10, 11, 12, 13."""
    return PROMPTS


@pytest.fixture(scope="session")
def chi_square() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """``chi_square(counts, probabilities)``: how many sigmas the statistic is above its mean.

    Cells expected fewer than 5 times are one cell.
    """

    def statistic(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
        expected = probabilities.double() * counts.sum()
        rare = expected < 5
        seen = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
        wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
        seen, wanted = seen[wanted > 0], wanted[wanted > 0]
        freedom = len(wanted) - 1
        value = ((seen - wanted) ** 2 / wanted).sum().item()
        return (value - freedom) / (2 * freedom) ** 0.5

    return statistic
