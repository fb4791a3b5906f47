"""Sampling that depends on the row alone: Gumbel-max with counter-based noise."""

import torch
from torch import Tensor
from transformers import LogitsProcessor

from llm_xrisk.rollout.engine import SamplingConfig


def _signed(value: int) -> int:
    """The 64 bits of an unsigned integer as the signed one that torch.int64 holds."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)


def _xor_shift_(x: Tensor, bits: int) -> Tensor:
    # `>>` on int64 copies the sign; the mask makes it the logical shift of the hash's definition.
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (64 - bits)) - 1))


def _mix64_(x: Tensor) -> Tensor:
    """:func:`llm_xrisk.rollout.engine.mix64` in place; int64 products wrap modulo 2^64."""
    _xor_shift_(x, 30).mul_(_MULTIPLIER_1)
    _xor_shift_(x, 27).mul_(_MULTIPLIER_2)
    return _xor_shift_(x, 31)


def counter_gumbel(row_seeds: Tensor, step: int, vocab_size: int) -> Tensor:
    r"""Standard Gumbel noise that is a function of (row seed, step, token id).

    .. math:: g = -\log(-\log u), \quad u = (\lfloor h / 2^{12} \rfloor + 1/2) / 2^{52}

    with the 64-bit hash h of the three numbers. No generator, no state, no loop over rows: the
    noise of a row is the same in every batch, on CPU and on GPU (up to the rounding of log).

    Args:
        row_seeds: One 63-bit seed per row, (rows,) int64.
        step: Number of tokens generated before this one.
        vocab_size: Number of token ids.

    Returns:
        float32 noise (rows, vocab_size) on the device of ``row_seeds``.

    Example:
        >>> both = counter_gumbel(torch.tensor([5, 9]), step=2, vocab_size=4)
        >>> torch.equal(both[1:], counter_gumbel(torch.tensor([9]), step=2, vocab_size=4))
        True
    """
    row_keys = _mix64_(row_seeds + _signed((step + 1) * 0x9E3779B97F4A7C15 % (1 << 64)))
    tokens = torch.arange(1, vocab_size + 1, device=row_seeds.device) * _GOLDEN
    hashed = _mix64_(row_keys[:, None] + tokens)
    # 52 bits plus a half are exact in float64 and stay inside (0, 1), so no noise is infinite.
    uniform = (hashed >> 12).bitwise_and_((1 << 52) - 1).to(torch.float64)
    uniform = uniform.add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_().to(torch.float32)


def truncate_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set to -inf all but the ``top_k`` likeliest tokens, and of these all beyond mass ``top_p``.

    Args:
        logits: (rows, vocab) unnormalised.
        top_k: 0 keeps all.
        top_p: 1 keeps all; the likeliest token always stays.

    Example:
        >>> truncate_logits(torch.tensor([[0.6, 0.3, 0.1]]).log(), top_p=0.8).isinf().tolist()
        [[False, False, True]]
    """
    if 0 < top_k < logits.shape[-1]:
        weakest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, float("-inf"))
    if top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True)
        probabilities = ranked.softmax(dim=-1)
        mass_before = probabilities.cumsum(dim=-1) - probabilities
        beyond = torch.zeros_like(ranked, dtype=torch.bool)
        beyond.scatter_(1, order, mass_before >= top_p)
        logits = logits.masked_fill(beyond, float("-inf"))
    return logits


class GumbelSampler(LogitsProcessor):
    """Turns greedy decoding into exact sampling, and keeps the log-probs of what was sampled.

    ``argmax(logits / temperature + g)`` with independent Gumbel noise g is a draw from the softmax
    (the Gumbel-max trick). Only one number per row and step is kept, never the logits.

    Args:
        row_seeds: One 63-bit seed per row, (rows,) int64, on the model's device.
        prompt_length: Columns of ``input_ids`` before the first new token.
        sampling: Temperature, top-k and top-p.
    """

    def __init__(self, row_seeds: Tensor, prompt_length: int, sampling: SamplingConfig) -> None:
        self.row_seeds = row_seeds
        self.prompt_length = prompt_length
        self.sampling = sampling
        self._chosen_log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores whose argmax is the token to take, (rows, vocab)."""
        greedy = self.sampling.temperature == 0
        logits = scores.float() if greedy else scores.float() / self.sampling.temperature
        choice = logits
        if not greedy:
            kept = truncate_logits(logits, top_k=self.sampling.top_k, top_p=self.sampling.top_p)
            step = input_ids.shape[1] - self.prompt_length
            choice = kept + counter_gumbel(self.row_seeds, step, logits.shape[1])
        token = choice.argmax(dim=-1, keepdim=True)
        chosen = logits.gather(1, token) - logits.logsumexp(dim=-1, keepdim=True)
        self._chosen_log_probs.append(chosen[:, 0])
        return choice

    def log_probs(self) -> Tensor:
        """Log pi of every token so far, before top-k and top-p; (rows, steps) float32."""
        return torch.stack(self._chosen_log_probs, dim=1)
