"""Ways to find temperatures, and what is measured of each: right answers and perplexity."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from benchmarks.temperature.data import Part
from llm_xrisk.data.gsm8k_steps import is_correct
from llm_xrisk.data.tiny_calculator import char_tokenizer
from llm_xrisk.models import TempNet, fixed_entropy_temperature
from llm_xrisk.models.tempnet_loss import log_norms_and_entropy
from llm_xrisk.rollout.engine import SamplingConfig, expand_requests
from llm_xrisk.rollout.sampling import GumbelSampler
from llm_xrisk.rollout.scoring import left_pad, length_sorted_batches
from llm_xrisk.serving import (
    FixedEntropyLogitsProcessor,
    TemperatureLogitsProcessor,
    TempNetLogitsProcessor,
)

FIXED, ENTROPY, NET = "fixed temperature", "fixed entropy", "TempNet"
# of TempNet and of the fixed-entropy sampler
BOUNDS: dict[str, Any] = {"tau_min": 0.01, "tau_max": 2.0}
TEMPERATURES = {
    "steps": (0.01, 0.2, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0),
    "text": (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4),
}
ENTROPIES = {
    "steps": (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.3, 1.7),
    "text": (0.8, 1.0, 1.3, 1.5, 1.7, 2.0, 2.3, 2.6),
}
NET_ENTROPIES = {"steps": (0.05, 0.3, 0.8, 1.7), "text": (1.3, 1.7, 2.0, 2.3)}
RATES = (3e-3, 1e-2)
GENERATIONS, MAX_NEW_TOKENS, ROWS = 16, 12, 800
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Sampler:
    """A temperature, or the entropy aimed at, and the learning rate of what is trained for it."""

    method: str
    value: float
    rate: float | None = None

    @property
    def setting(self) -> str:
        """As tables show it."""
        letter = "tau" if self.method == FIXED else "h"
        return f"{letter}={self.value:g}" + ("" if self.rate is None else f" lr={self.rate:g}")


def grid(data: str, configurations: int) -> dict[str, list[Sampler]]:
    """As many configurations of every method, spread over its whole grid."""
    whole = {
        FIXED: [Sampler(FIXED, tau) for tau in TEMPERATURES[data]],
        ENTROPY: [Sampler(ENTROPY, h) for h in ENTROPIES[data]],
        NET: [Sampler(NET, h, rate) for h in NET_ENTROPIES[data] for rate in RATES],
    }
    return {
        method: [found[i * len(found) // configurations] for i in range(configurations)]
        for method, found in whole.items()
    }


class FixedTemperature(TemperatureLogitsProcessor):
    """The same temperature for every token."""

    def __init__(self, tau: float) -> None:
        self.tau = tau

    def temperature(self, scores: Tensor) -> Tensor:
        """Temperatures (rows,) of logits (rows, V)."""
        return torch.full_like(scores[..., 0], self.tau)


def processor(sampler: Sampler, net: TempNet | None) -> TemperatureLogitsProcessor:
    """What divides logits by the sampler's temperatures."""
    if net is not None:
        return TempNetLogitsProcessor(net)
    if sampler.method == FIXED:
        return FixedTemperature(sampler.value)
    return FixedEntropyLogitsProcessor(sampler.value, **BOUNDS)


@torch.no_grad()
def sampled(
    model: Any, part: Part, divide: TemperatureLogitsProcessor, seed: int
) -> dict[str, Any]:
    """How many of 16 samples of each prompt are right.

    The noise of a token is a function of the seed, the prompt, the sample's number, the place and
    the token: the same for every sampler, so that differences between samplers are paired.
    """
    requests = expand_requests(
        part.prompts,
        SamplingConfig(seed=seed),
        sample_ids=part.ids,
        num_generations=GENERATIONS,
        policy_version=0,
    )
    right, tokens, seconds = np.zeros(len(part), dtype=int), 0, 0.0
    tokenizer: Any = char_tokenizer()
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=pad
    )
    divide.check(config)
    for rows in length_sorted_batches([len(r.prompt) for r in requests], ROWS):
        padded = left_pad(
            [requests[i].prompt for i in rows], pad_id=pad, device=torch.device("cpu")
        )
        seeds, width = torch.tensor([requests[i].seed for i in rows]), padded.input_ids.shape[1]
        start = time.process_time()
        sequences = model.generate(
            input_ids=padded.input_ids,
            attention_mask=padded.attention_mask,
            generation_config=config,
            logits_processor=LogitsProcessorList(
                [divide, GumbelSampler(seeds, width, SamplingConfig())]
            ),
        )
        seconds += time.process_time() - start
        new = sequences[:, width:]
        tokens += int((new != pad).sum())
        answers = tokenizer.batch_decode(new, skip_special_tokens=True)
        for i, answer in zip(rows, answers, strict=True):
            right[i // GENERATIONS] += is_correct(part.texts[i // GENERATIONS], answer)
    return {"right": right.tolist(), "tokens": tokens, "seconds": seconds}


@torch.no_grad()
def gold_logits(model: Any, part: Part, batch: int = 64) -> Tensor:
    """Logits (tokens, V) that predict the completions' tokens, row by row."""
    found: dict[int, Tensor] = {}
    rows = [p + c for p, c in zip(part.prompts, part.completions, strict=True)]
    for places in length_sorted_batches([len(row) for row in rows], batch):
        padded = left_pad([rows[i] for i in places], pad_id=0, device=torch.device("cpu"))
        logits = model(**vars(padded)).logits
        for i, own in zip(places, logits, strict=True):
            found[i] = own[-len(part.completions[i]) - 1 : -1]
    return torch.cat([found[i] for i in range(len(rows))])


@torch.no_grad()
def predicted(
    logits: Tensor, completions: Sequence[Sequence[int]], divide: TemperatureLogitsProcessor
) -> dict[str, Any]:
    """Negative log-likelihood of each completion, the mean entropy, and how temperatures spread."""
    labels = torch.tensor([token for completion in completions for token in completion])
    nll, entropies, taus = list[Tensor](), list[Tensor](), list[Tensor]()
    for own, label in zip(logits.split(4096), labels.split(4096), strict=True):
        taus.append(divide.temperature(own))
        scaled = (own - own.amax(-1, keepdim=True)) / taus[-1].unsqueeze(-1)
        norms, entropy = log_norms_and_entropy(scaled)
        nll.append(norms - scaled.gather(1, label.unsqueeze(1)).squeeze(1))
        entropies.append(entropy)
    tau, lengths = torch.cat(taus), [len(completion) for completion in completions]
    sums = [own.sum().item() for own in torch.cat(nll).double().split(lengths)]
    quantiles = tau.double().quantile(torch.tensor(QUANTILES, dtype=torch.float64))
    return {
        "nll": sums,
        "lengths": lengths,
        "entropy": torch.cat(entropies).mean().item(),
        "entropy_sd": torch.cat(entropies).std().item(),
        "tau_quantiles": [round(q, 4) for q in quantiles.tolist()],
    }


def beside_the_oracle(
    logits: Tensor, net: TempNet, entropy: float, temperatures: Sequence[float]
) -> dict[str, float]:
    """A TempNet's temperatures against those that its loss is least at, token by token.

    `correlation` is of the logarithms, `log_ratio` the mean of |log(tau / oracle)|, `at_bounds`
    the share of tokens whose oracle is one of the bounds, `loss_above` what the loss is above that
    of the oracle and `constant_above` what it is at the best of some single temperatures.
    """
    parts = logits.split(4096)
    with torch.no_grad():
        tau = torch.cat([net(part) for part in parts])
    best = torch.cat([fixed_entropy_temperature(part, entropy, **BOUNDS) for part in parts])
    pair = torch.stack([tau, best]).double().log()
    bounded = (best <= BOUNDS["tau_min"]) | (best >= BOUNDS["tau_max"])
    steady = pair.std(dim=1).min().item() < 1e-9  # a correlation with a constant is none
    oracle = _label_free_loss(logits, best, entropy)
    constants = [_label_free_loss(logits, torch.full_like(best, t), entropy) for t in temperatures]
    return {
        "correlation": math.nan if steady else pair.corrcoef()[0, 1].item(),
        "log_ratio": (pair[0] - pair[1]).abs().mean().item(),
        "at_bounds": bounded.double().mean().item(),
        "loss_above": _label_free_loss(logits, tau, entropy) - oracle,
        "constant_above": min(constants) - oracle,
    }


def _label_free_loss(logits: Tensor, tau: Tensor, entropy: float) -> float:
    """Mean of tau log sum exp((s - max s) / tau) - h tau: a token's loss but for its label's."""
    shifted = logits - logits.amax(-1, keepdim=True)
    norms = (shifted / tau.unsqueeze(-1)).logsumexp(-1)
    return (tau * (norms - entropy)).double().mean().item()
