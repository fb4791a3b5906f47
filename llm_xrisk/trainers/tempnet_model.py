"""What a TempNet's trainer trains: a language model's logits, and the robust loss on them."""

import logging
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from llm_xrisk.data.next_token_dataset import IGNORED, next_token_targets
from llm_xrisk.models import logprobs
from llm_xrisk.models.tempnet import TempNet
from llm_xrisk.models.tempnet_loss import wide
from llm_xrisk.rollout.weight_sync import base_model, gather_zero3, unwrap_model

logger = logging.getLogger(__name__)
_PROBE_TOKENS = 8


class TemperedModel(nn.Module):
    """A language model and its TempNet; the forward pass gives the loss of a batch.

    A frozen language model is none of this module's children: wrappers neither broadcast nor save
    it, and optimizers do not see it. Where its logits are the head's product and nothing more,
    bit for bit on a probe, they exist one chunk of tokens at a time; soft-capped or scaled logits
    are computed whole.

    Args:
        model: The language model, with or without adapter; one that is frozen is put in eval mode
            and its parameters take no gradient from here on.
        net: The TempNet.
        train_model: Whether the language model is trained too.
    """

    _keys_to_ignore_on_save = None  # transformers asks for it when a run is resumed

    def __init__(self, model: Any, net: TempNet, *, train_model: bool) -> None:
        super().__init__()
        self.losses = TempNetLoss(net)
        self.train_model = train_model
        self.model = model if train_model else None
        self._frozen: list[Any] = [] if train_model else [FrozenModel(model)]
        config: Any = base_model(model).config
        self.config = config if train_model else deepcopy(config)  # transformers writes to it
        self._chunked: bool | None = False if train_model else None

    @property
    def net(self) -> TempNet:
        """The TempNet."""
        return self.losses.net

    @property
    def language_model(self) -> Any:
        """The language model, with its adapter."""
        return self.model if self.train_model else unwrap_model(self._frozen[0]).model

    def replace_frozen(self, wrap: Any) -> None:
        """Put the frozen model, a :class:`FrozenModel`, into a wrapper, or on a device."""
        self._frozen = [wrap(frozen) for frozen in self._frozen]

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute the language model's activations, if there is a backward pass through it."""
        if self.model is not None:
            self.model.gradient_checkpointing_enable(**kwargs)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, keep: int
    ) -> dict[str, Tensor]:
        """Loss of a batch; see :class:`TempNetLoss`.

        Args:
            input_ids: (R, T).
            attention_mask: (R, T) 1 on tokens, 0 on padding.
            completion_mask: (R, T) true on tokens with a label.
            keep: Number of trailing positions that hold all of these.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.long().cumsum(-1) - 1).clamp(min=0),
        }
        targets = next_token_targets(input_ids, completion_mask, keep)
        if self.model is not None:
            return self.losses(logits_of(self.model, inputs, keep), targets)
        frozen = self._frozen[0]
        with torch.no_grad():
            if self._chunked is None:
                self._chunked = self._probe(input_ids.device)
            states = frozen(inputs, keep, whole=not self._chunked)
        if not self._chunked:
            return self.losses(states, targets)
        head: Any = unwrap_model(frozen).head
        with gather_zero3(list(head.parameters())):
            return self.losses(states, targets, (head.weight, head.bias))

    @torch.no_grad()
    def _probe(self, device: torch.device) -> bool:
        """Whether the logits are the head's product, found out alike on every process."""
        frozen = self._frozen[0]
        head: Any = unwrap_model(frozen).head
        if head is None:
            return False
        ids = torch.arange(_PROBE_TOKENS, device=device).remainder(self.net.config.vocab_size)
        inputs = {"input_ids": ids.unsqueeze(0)}
        whole = frozen(inputs, _PROBE_TOKENS - 1, whole=True)
        states = frozen(inputs, _PROBE_TOKENS - 1, whole=False)
        if states is None:
            return False
        with gather_zero3(list(head.parameters())):
            product = nn.functional.linear(states, head.weight, head.bias)
        equal = bool(torch.equal(product.to(whole.dtype), whole))
        if not equal:
            logger.info("The logits are not the head's product alone, so they are computed whole.")
        return equal


class FrozenModel(nn.Module):
    """A language model in eval mode whose parameters take no gradient.

    Attributes:
        head: Its last layer where that is a plain linear one behind a body of its own, or None.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        inner: Any = base_model(model)
        head = inner.get_output_embeddings()
        plain = type(head) is nn.Linear and inner.base_model is not inner
        self._head = (head if plain else None,)
        self.eval()

    @property
    def head(self) -> Any:
        """See the class."""
        return self._head[0]

    def train(self, mode: bool = True) -> "FrozenModel":
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, inputs: dict[str, Tensor], keep: int, whole: bool) -> Tensor | None:
        """Logits (R, keep + 1, V), or what the head takes (R, keep + 1, H), if that can be told."""
        if whole:
            return logits_of(self.model, inputs, keep)
        inner: Any = base_model(self.model)
        output = inner.base_model(**inputs, use_cache=False)
        states = getattr(output, "last_hidden_state", None)
        return None if states is None else states[:, -keep - 1 :]


class TempNetLoss(nn.Module):
    """The loss of a TempNet, which owns its parameters.

    The network itself is no child, so that DeepSpeed ZeRO-3, which gathers parameters around the
    forward pass of the module that owns them, does so once a batch and not once a chunk: processes
    have unequal numbers of chunks, and gathering is collective.
    """

    def __init__(self, net: TempNet) -> None:
        super().__init__()
        self._net = (net,)
        for name, parameter in net.named_parameters():
            self.register_parameter(own_name(name), parameter)

    @property
    def net(self) -> TempNet:
        """The TempNet."""
        return self._net[0]

    def without_scalars(self) -> None:
        """Give parameters that are numbers a dimension, which DeepSpeed's broadcast needs."""
        for parameter in self.parameters():
            parameter.data = torch.atleast_1d(parameter.data)

    def train(self, mode: bool = True) -> "TempNetLoss":
        """Switch the network's dropout."""
        self.net.train(mode)
        return super().train(mode)

    def forward(
        self, states: Tensor, targets: Tensor, head: tuple[Tensor, Tensor | None] | None = None
    ) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            states: (R, K, V) logits, or (R, K, H) what ``head`` makes logits of.
            targets: (R, K) token ids.
            head: Weight (V, H) and bias (V,) of a frozen head.

        Returns:
            ``total``, the sum of the losses of the N tokens with a label, and of each of these
            ``values``, ``tau`` and ``entropy``, (N,) without gradient.
        """
        if torch.is_grad_enabled() and states.requires_grad:
            with _full_precision(states):
                found = self.net.loss(states, targets, num_tokens=1)
            where = targets != IGNORED
            per_token = {"values": found.values, "tau": found.tau, "entropy": found.entropy}
            return {"total": found.loss} | {n: v.detach()[where] for n, v in per_token.items()}
        return self._by_chunks(states.flatten(0, 1), targets.flatten(), head)

    def _by_chunks(
        self, states: Tensor, targets: Tensor, head: tuple[Tensor, Tensor | None] | None
    ) -> dict[str, Tensor]:
        """The loss on few tokens at a time: no logits outlive their chunk, its gradient does."""
        weights = [weight for weight in self.net.parameters() if weight.requires_grad]
        learns = torch.is_grad_enabled() and bool(weights)
        total = torch.zeros((), device=targets.device, dtype=wide(states))
        grads = [torch.zeros_like(w, dtype=wide(w)) for w in weights] if learns else []
        parts: list[dict[str, Tensor]] = []
        for rows in _chunks_of(targets, self.net.config.vocab_size):
            with torch.no_grad():
                logits = states[rows.to(states.device)]
                logits = logits if head is None else nn.functional.linear(logits, *head)
            with _full_precision(logits):
                found = self.net.loss(logits.to(targets.device), targets[rows], num_tokens=1)
                step = torch.autograd.grad(found.loss, weights) if learns else ()
            for sums, one in zip(grads, step, strict=True):
                sums.add_(one)
            total += found.loss.detach()
            kept = {"values": found.values, "tau": found.tau, "entropy": found.entropy}
            parts.append({name: value.detach() for name, value in kept.items()})
            del logits, found
        if learns:
            with _full_precision(total):
                pairs = zip(weights, grads, strict=True)
                own = torch.stack([(w.to(g.dtype) * g).sum() for w, g in pairs]).sum()
            total = total + (own - own.detach())  # the value found, the gradient found
        empty = {name: total.new_zeros(0) for name in ("values", "tau", "entropy")}
        joined = {n: torch.cat([part[n] for part in parts]) if parts else empty[n] for n in empty}
        return {"total": total} | joined


def logits_of(model: Any, inputs: dict[str, Tensor], keep: int) -> Tensor:
    """Logits of the last ``keep`` + 1 positions."""
    logits = model(**inputs, use_cache=False, logits_to_keep=keep + 1).logits
    # a model that knows no logits_to_keep gives all
    return logits if logits.shape[1] <= keep + 1 else logits[:, -keep - 1 :]


def own_name(name: str) -> str:
    """The name under which :class:`TempNetLoss` owns a parameter of its network."""
    return name.replace(".", "_")


def _chunks_of(targets: Tensor, vocab_size: int) -> Iterator[Tensor]:
    """Places of the tokens with a label, so many at a time as have logits that fit a chunk."""
    places = (targets != IGNORED).nonzero().squeeze(1)
    yield from places.split(max(1, logprobs._CHUNK_NUMBERS // vocab_size)) if len(places) else ()


def _full_precision(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)
