"""TempNet: a small network that predicts the temperature of each token from its logits."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llm_xrisk.fcco.groups import readable
from llm_xrisk.models.logprobs import _chunks
from llm_xrisk.models.tempnet_loss import (
    LogitGradient,
    TemperedLoss,
    as_rows,
    check_rho,
    tempered_loss,
    wide,
)

# The weights lie a folder down: vLLM takes every *.safetensors beside a model for the model's own.
CONFIG_NAME, WEIGHTS_NAME = "tempnet_config.json", "tempnet/model.safetensors"
_INPUT = "max_l2"
_FEW_TOKENS = 32
_FEW_NUMBERS = 1 << 24  # float32 numbers that a step of generation copies at once: 64 MB
_LEAST_NORM = 1e-12  # flat logits have norm 0


@dataclass(frozen=True)
class TempNetConfig:
    """What a TempNet is made of and was trained for; ``tempnet_config.json`` beside a model.

    Attributes:
        vocab_size: V, the width of the model's logits: ``model.config.vocab_size``, which may be
            more than the tokenizer's length.
        hidden_size: Width of both hidden layers.
        tau_min: Smallest temperature, > 0.
        tau_max: Largest. [0.01, 2] was used for LLaMA, [0.5, 5] for GPT-2.
        rho: Bound on KL(softmax(s / tau), uniform), in [0, log V).
        dropout: Share of hidden units dropped in training.
        input: How logits enter: "max_l2" subtracts the largest and divides by the Euclidean norm,
            in float32. There is no other choice; it is written down so that weights trained with
            another one are refused rather than misread.
        base_model: Name or path of the language model it was trained for, for folders that do
            not hold it.

    Raises:
        ValueError: an argument out of range.
    """

    vocab_size: int
    hidden_size: int = 256
    tau_min: float = 0.01
    tau_max: float = 2.0
    rho: float = 8.5
    dropout: float = 0.5
    input: str = _INPUT
    base_model: str | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.vocab_size < 2 or self.hidden_size < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                "need vocab_size >= 2, hidden_size >= 1 and dropout in [0, 1), got "
                f"{self.vocab_size}, {self.hidden_size} and {self.dropout}"
            )
        if not 0 < self.tau_min < self.tau_max < math.inf:
            raise ValueError(
                f"need 0 < tau_min < tau_max, got tau_min={self.tau_min}, tau_max={self.tau_max}"
            )
        if self.input != _INPUT:
            raise ValueError(
                f"input must be {_INPUT!r}, got {self.input!r}: a TempNet reads logits as it was "
                "trained to; train it again with this one"
            )
        check_rho(self.rho, self.vocab_size)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TempNetConfig":
        """Read ``tempnet_config.json``.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it has unknown fields or values out of range.
        """
        path = _existing(folder, CONFIG_NAME)
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        unknown = sorted(set(found) - {field.name for field in fields(cls)})
        if unknown or "vocab_size" not in found:
            raise ValueError(
                f"{path} needs vocab_size and knows {[f.name for f in fields(cls)]}, got {unknown}"
                " besides; it was written by another version or is not a TempNet's"
            )
        return cls(**found)


class TempNet(nn.Module):
    r"""Temperature network of a language model (Qiu et al., 2024; (6.50) is its form for CLIP).

    .. math:: \tau(x) = \tau_{\min} + (\tau_{\max} - \tau_{\min}) \, \sigma\Big( b + \sum_m a_m
              \big(p_m - \tfrac1M\big) q_m \Big), \qquad p = \mathrm{softmax}(q / e^{c}),

    q = W_2 dropout(sigmoid(W_1 x + b_1)) + b_2 with M hidden units, x the logits minus their
    maximum, of unit Euclidean norm. At first a = 1, b = 0 and c = 0: the sum is the covariance of
    p and q, >= 0, and tau starts a little above the middle of its range.

    The logits get no gradient from tau. The first layer works on chunks of tokens and keeps no
    normalised copy of them. At V = 32000 the network has 8.26 million parameters.

    Args:
        vocab_size: V, ``model.config.vocab_size``.
        **options: Further fields of :class:`TempNetConfig`.

    Raises:
        ValueError: an option out of range, among them rho >= log V.

    Example:
        >>> net = TempNet(vocab_size=4, rho=0.5, tau_min=0.5, tau_max=1.5).eval()
        >>> net(torch.zeros(2, 4)).shape
        torch.Size([2])
    """

    def __init__(self, vocab_size: int, **options: Any) -> None:
        super().__init__()
        self.config = TempNetConfig(vocab_size, **options)
        width = self.config.hidden_size
        self.project = LogitProjection(vocab_size, width)
        self.dropout = nn.Dropout(self.config.dropout)
        self.mix = nn.Linear(width, width)
        self.scaler = nn.Parameter(torch.zeros(()))
        self.last = nn.Linear(width, 1)
        nn.init.ones_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(
        self, logits: Tensor, *, where: Tensor | None = None, gradient: LogitGradient | None = None
    ) -> Tensor:
        """Temperatures of the tokens.

        Args:
            logits: (..., V) with up to two dimensions before V, of any float dtype.
            where: (...) false on tokens that are not to be looked at; their tau is of no use.
            gradient: For :meth:`loss`.

        Returns:
            (...) in float32 or wider, with the gradient of this network's parameters alone.

        Raises:
            ValueError: another vocabulary; on a CPU also logits that are NaN.
        """
        if logits.shape[-1] != self.config.vocab_size or not 1 <= logits.ndim <= 3:
            raise ValueError(
                f"this TempNet reads logits (..., {self.config.vocab_size}) of up to 3 dimensions, "
                f"got {tuple(logits.shape)}; use the one trained for this model's vocabulary"
            )
        if not (self.training or torch.is_grad_enabled()) and where is None and logits.ndim == 2:
            tau = self.predict(logits)
            _refuse_nan(tau, logits)
            return tau
        hidden = self.project(logits, where, gradient)
        q = self.mix(self.dropout(hidden.sigmoid())).to(wide(hidden))
        pooled = ((q / self.scaler.exp()).softmax(-1) - 1 / q.shape[-1]) * q
        share = self.last(pooled.to(self.last.weight.dtype)).squeeze(-1).to(q.dtype).sigmoid()
        _refuse_nan(share, logits)
        return self.config.tau_min + (self.config.tau_max - self.config.tau_min) * share

    def predict(self, logits: Tensor) -> Tensor:
        """Temperatures in a step of generation: without dropout, in the fewest operations.

        Args:
            logits: (rows, V) of any float dtype.

        Returns:
            (rows,) in float32 or wider, without gradient; NaN where a row's logits are NaN or
            infinite.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.predict(logits)
        project, mix, last, config = self.project, self.mix, self.last, self.config
        w, linear = project.weight, nn.functional.linear
        dtype = wide(w)
        if logits.numel() > _FEW_NUMBERS:
            hidden = project(logits)
        else:
            numbers = logits.to(dtype)
            x = numbers - numbers.amax(-1, keepdim=True)
            x.nan_to_num_(nan=math.nan, neginf=0.0)  # tokens not to be generated say nothing
            x.div_(torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=_LEAST_NORM))
            hidden = linear(x.to(w.dtype), w, project.bias)
        q = linear(hidden.sigmoid_(), mix.weight, mix.bias).to(dtype)
        pooled = (q / self.scaler.exp()).softmax(-1).sub_(1 / q.shape[-1]).mul_(q)
        share = linear(pooled.to(w.dtype), last.weight, last.bias).to(dtype)
        tau = share.sigmoid_().mul_(config.tau_max - config.tau_min).add_(config.tau_min)
        return tau.squeeze(-1)

    def loss(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        rho: float | None = None,
        ignore_index: int = -100,
        num_tokens: Tensor | int | None = None,
    ) -> TemperedLoss:
        """:func:`tempered_loss` at the temperatures predicted from the same logits.

        Logits without gradient (a frozen model) train this network alone. Logits with gradient
        train the model too: it is written into their memory once this network is done with them,
        so call backward once.

        Args:
            logits: (R, K, V) or (K, V).
            targets: (R, K) or (K,); the logits at a place predict its target: shift the labels,
                not the logits, whose slice would be copied.
            rho: In place of the config's.
            ignore_index: Marks tokens without a label. Whatever their logits are, they count for
                nothing.
            num_tokens: As in :func:`tempered_loss`.

        Example:
            >>> net = TempNet(vocab_size=4, rho=0.5, tau_min=0.5, tau_max=1.5).eval()
            >>> found = net.loss(torch.zeros(1, 4), torch.tensor([2]))
            >>> torch.allclose(found.loss, 0.5 * found.tau)  # flat logits: rho tau
            True
        """
        gradient = LogitGradient()
        tau = self(logits, where=targets != ignore_index, gradient=gradient)
        return tempered_loss(
            logits,
            targets,
            tau,
            rho=self.config.rho if rho is None else rho,
            ignore_index=ignore_index,
            num_tokens=num_tokens,
            gradient=gradient,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``tempnet_config.json`` and ``tempnet/model.safetensors`` into a model's folder."""
        folder = Path(folder)
        (folder / WEIGHTS_NAME).parent.mkdir(parents=True, exist_ok=True)
        weights = {name: w.contiguous() for name, w in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        text = json.dumps(asdict(self.config), indent=2)
        (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, vocab_size: int | None = None) -> "TempNet":
        """Read what :meth:`save_pretrained` wrote, in eval mode.

        Args:
            folder: Where the two files are, as a rule a model's folder.
            vocab_size: The model's; by default that of a ``config.json`` in the same folder.

        Raises:
            FileNotFoundError: one of the files is missing.
            ValueError: the TempNet is for another vocabulary, or its weights are not those of its
                config.
        """
        config = TempNetConfig.from_pretrained(folder)
        expected = _model_vocabulary(Path(folder)) if vocab_size is None else vocab_size
        if expected is not None and expected != config.vocab_size:
            raise ValueError(
                f"the TempNet in {folder} reads a vocabulary of {config.vocab_size}, the model has "
                f"{expected}; use the TempNet trained for this model"
            )
        weights = load_file(_existing(folder, WEIGHTS_NAME))
        with torch.device("meta"):
            net = cls(**asdict(config))
        wanted = {name: tuple(w.shape) for name, w in net.state_dict().items()}
        found = {name: tuple(w.shape) for name, w in weights.items()}
        if found != wanted:
            differing = sorted(n for n in found | wanted if found.get(n) != wanted.get(n))
            raise ValueError(
                f"{WEIGHTS_NAME} does not fit {CONFIG_NAME} in {folder}: "
                + ", ".join(f"{n} is {found.get(n)}, not {wanted.get(n)}" for n in differing)
            )
        net.load_state_dict(weights, assign=True)  # in the dtype they were saved in
        return net.eval()


class LogitProjection(nn.Linear):
    """First layer: W x + b of normalised logits x, with no copy of them kept for the gradient."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, logits: Tensor, where: Tensor | None = None, gradient: LogitGradient | None = None
    ) -> Tensor:
        """Hidden units (..., M) of logits (..., V)."""
        few = gradient is None and logits.shape[:-1].numel() <= _FEW_TOKENS
        if few and not torch.is_grad_enabled():
            # a step of generation: no graph, and one chunk
            whole = (slice(None), slice(None))[: logits.ndim - 1]
            inputs = _inputs(logits, where, whole, self.weight)
            return nn.functional.linear(inputs, self.weight, self.bias)
        shape = logits.shape[:-1]
        rows = as_rows(logits if gradient is not None else logits.detach())
        where = None if where is None else where.view(rows.shape[:2])
        hidden, gate = _Project.apply(rows, self.weight, self.bias, where, gradient)  # pyright: ignore
        if gradient is not None:
            gradient.gate = gate.view(shape)
        return hidden.view(*shape, self.out_features)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        weight: Tensor,
        bias: Tensor,
        where: Tensor | None,
        gradient: LogitGradient | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, where)
        ctx.gradient = gradient
        hidden = weight.new_empty(*logits.shape[:2], weight.shape[0])
        for part in _chunks(*logits.shape):
            hidden[part] = nn.functional.linear(_inputs(logits, where, part, weight), weight, bias)
        return hidden, logits.new_zeros(logits.shape[:2], dtype=wide(logits))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, where = ctx.saved_tensors
        grad, weight, above = grads[0], None, None
        if ctx.needs_input_grad[1]:
            weight = grad.new_zeros(grad.shape[-1], logits.shape[-1])
            for part in _chunks(*logits.shape):
                inputs = _inputs(logits, where, part, weight).flatten(0, 1)
                weight.addmm_(grad[part].flatten(0, 1).T, inputs)
        if ctx.needs_input_grad[0]:  # only now may the logits be overwritten
            above = ctx.gradient.write(logits, grads[1])
        return above, weight, grad.sum((0, 1)), None, None


def _inputs(
    logits: Tensor, where: Tensor | None, part: tuple[slice, ...], weight: Tensor
) -> Tensor:
    """Normalised logits of a chunk, in the dtype of ``weight``."""
    numbers = logits[part].to(wide(weight))
    x = numbers - numbers.amax(-1, keepdim=True)
    x.masked_fill_(x == -math.inf, 0.0)  # tokens that are not to be generated say nothing
    x.div_(x.norm(dim=-1, keepdim=True).clamp_(min=_LEAST_NORM))
    if where is not None:
        x.masked_fill_(~where[part].unsqueeze(-1), 0.0)  # 0 times NaN would be NaN
    return x.to(weight.dtype)


def _refuse_nan(found: Tensor, logits: Tensor) -> None:
    if readable(found) and math.isnan(found.sum().item()):
        cause = "the logits" if bool(logits.isnan().any()) else "infinite logits or weights"
        raise ValueError(
            f"TempNet met NaN: {cause}; see whether the model's forward pass overflows"
        )


def _existing(folder: str | Path, name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {name}; a TempNet is the two files {WEIGHTS_NAME} and {CONFIG_NAME} "
            "that TempNet.save_pretrained(folder) writes"
        )
    return path


def _model_vocabulary(folder: Path) -> int | None:
    """``vocab_size`` of the model in the same folder, if there is one."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
