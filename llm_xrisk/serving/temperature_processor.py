"""Temperatures of their own for every token, in ``generate`` of transformers."""

import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from llm_xrisk.models.fixed_entropy import fixed_entropy_temperature
from llm_xrisk.models.tempnet import TempNet
from llm_xrisk.rollout.scoring import evaluation_mode
from llm_xrisk.serving.division import divide_logits

# What a generation config says when nothing is changed. transformers runs these of its own
# processors before those it is given, on logits that a temperature is predicted from.
_UNCHANGED: dict[str, tuple[object, ...]] = {
    "temperature": (None, 1.0),
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "guidance_scale": (None, 1.0),
    "sequence_bias": (None,),
    "exponential_decay_length_penalty": (None,),
}


class TemperatureLogitsProcessor(LogitsProcessor):
    """Divides the logits of each row by a temperature found from them.

    Put it first in the list: others, and top-k and top-p, then see the divided logits. The
    largest logit stays the largest, also among those that a division would round together, so
    greedy decoding does not change. Beam search gives processors log-probabilities, which serve
    as well: a shift changes nothing.
    """

    def temperature(self, scores: Tensor) -> Tensor:
        """Temperatures (rows,) of logits (rows, V)."""
        raise TypeError(f"{type(self).__name__} does not define temperature")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits over temperature, (rows, V) in float32 or wider."""
        with torch.no_grad():
            return divide_logits(scores, self.temperature(scores))

    def check(self, generation_config: GenerationConfig) -> None:
        """Refuse settings that act on the logits before this does, or a second temperature.

        Raises:
            ValueError: with the setting and what to do.
        """
        for name, unchanged in _UNCHANGED.items():
            found = getattr(generation_config, name, None)
            if found in unchanged:
                continue
            if name == "temperature":
                remedy = "set temperature=1.0: the logits are already divided by one"
            else:
                remedy = (
                    f"{type(self).__name__} has to come before it: leave it out here and put its "
                    "processor behind this one in logits_processor"
                )
            raise ValueError(f"{name}={found!r} of the generation config: {remedy}")


class TempNetLogitsProcessor(TemperatureLogitsProcessor):
    """Samples at the temperatures a TempNet predicts.

    The network is used in eval mode whatever mode it is in, and keeps its mode.

    Args:
        net: On the model's device.

    Example:
        >>> net = TempNet(vocab_size=4, rho=0.5, tau_min=0.5, tau_max=1.5)
        >>> processor = TempNetLogitsProcessor(net)
        >>> scores = torch.zeros(1, 4)
        >>> processor(torch.zeros(1, 2), scores).equal(scores)  # model.generate calls it so
        True
    """

    def __init__(self, net: TempNet) -> None:
        self.net = net

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, vocab_size: int | None = None
    ) -> "TempNetLogitsProcessor":
        """Read the TempNet beside a model: see :meth:`TempNet.from_pretrained`."""
        return cls(TempNet.from_pretrained(folder, vocab_size=vocab_size))

    def temperature(self, scores: Tensor) -> Tensor:
        """Temperatures (rows,) of logits (rows, V)."""
        if not self.net.training:  # as a rule: walking through the modules would cost more
            return self.net(scores)
        with evaluation_mode(self.net):
            return self.net(scores)


class FixedEntropyLogitsProcessor(TemperatureLogitsProcessor):
    """Samples every token at the same entropy: the baseline a TempNet has to beat.

    Args:
        entropy: In nats, in (0, log V]; log V - rho is what a TempNet of that rho aims at.
        tau_min: Smallest temperature, > 0.
        tau_max: Largest.

    Example:
        >>> processor = FixedEntropyLogitsProcessor(entropy=0.5)
        >>> scores = processor(torch.zeros(1, 2), torch.tensor([[3.0, 0.0, -1.0]]))
        >>> torch.distributions.Categorical(logits=scores).entropy()
        tensor([0.5000])
    """

    def __init__(self, entropy: float, *, tau_min: float = 0.01, tau_max: float = 2.0) -> None:
        if entropy <= 0 or not 0 < tau_min < tau_max < math.inf:
            raise ValueError(
                "need entropy > 0 and 0 < tau_min < tau_max, got "
                f"{entropy}, {tau_min} and {tau_max}"
            )
        self.entropy, self.tau_min, self.tau_max = entropy, tau_min, tau_max

    def temperature(self, scores: Tensor) -> Tensor:
        """Temperatures (rows,) of logits (rows, V)."""
        return fixed_entropy_temperature(
            scores, self.entropy, tau_min=self.tau_min, tau_max=self.tau_max
        )
