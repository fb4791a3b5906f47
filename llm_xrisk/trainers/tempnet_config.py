"""Settings of a TempNet's training, and the network they ask for."""

import logging
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_xrisk.models.tempnet import TempNet
from llm_xrisk.models.tempnet_loss import check_rho
from llm_xrisk.trainers.config import ScoreConfig

logger = logging.getLogger(__name__)
_OF_THE_NETWORK = {
    "hidden_size": "tempnet_hidden_size",
    "dropout": "tempnet_dropout",
    "tau_min": "tau_min",
    "tau_max": "tau_max",
}
_JOINT_LEARNING_RATE = 2e-5


@dataclass
class TempNetTrainingConfig(ScoreConfig):
    """Settings of :class:`~llm_xrisk.trainers.tempnet.TempNetTrainer`.

    A batch size counts rows: responses with their prompts, or pieces of documents.

    Args:
        rho: Bound on KL(softmax(s / tau), uniform), in [0, log V); 8.5 for LLaMA-2 (V = 32000).
        entropy: The same as the entropy in nats that temperatures aim at, in (0, log V]:
            ``rho = log V - entropy``. Give one of the two; 1.9 is rho = 8.5 at V = 32000.
        train_model: Train the language model too, with the gradient softmax(s / tau) - onehot;
            otherwise it is frozen and the labels do not matter.
        tempnet_learning_rate: AdamW's step size for the TempNet. The authors' 1e-4 is for tens of
            thousands of steps; 1e-2 suits a thousand.
        learning_rate: AdamW's step size for the language model, with ``train_model`` only (2e-5).
        tempnet: Folder of a TempNet to start from; by default a new one.
        tempnet_hidden_size: Width of a new TempNet's hidden layers (256).
        tempnet_dropout: Share of its hidden units dropped in training (0.5).
        tau_min: Smallest temperature, > 0 (0.01).
        tau_max: Largest (2.0).
        max_length: Longest row in tokens; responses are cut, documents are divided.
        save_base: Save a frozen language model beside its TempNet when training is over, which
            makes the folder whole. By default one that was given by name is referred to by it, in
            ``tempnet_config.json``, and one given as an object is saved.
    """

    rho: float | None = field(
        default=None, metadata={"help": "Bound on KL(softmax(s / tau), uniform), in [0, log V)."}
    )
    entropy: float | None = field(
        default=None, metadata={"help": "Instead of rho: log V - rho, the entropy aimed at (nats)."}
    )
    train_model: bool = field(
        default=False, metadata={"help": "Train the language model too; otherwise frozen."}
    )
    tempnet_learning_rate: float = field(
        default=1e-4, metadata={"help": "AdamW's step size for the TempNet."}
    )
    learning_rate: float | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, metadata={"help": "For the language model, with train_model (2e-5)."}
    )
    tempnet: str | None = field(
        default=None, metadata={"help": "Folder of a TempNet to start from; default: a new one."}
    )
    tempnet_hidden_size: int | None = field(
        default=None, metadata={"help": "Width of a new TempNet's hidden layers (256)."}
    )
    tempnet_dropout: float | None = field(
        default=None, metadata={"help": "Share of a new TempNet's hidden units dropped (0.5)."}
    )
    tau_min: float | None = field(
        default=None, metadata={"help": "Smallest temperature, > 0 (0.01)."}
    )
    tau_max: float | None = field(default=None, metadata={"help": "Largest temperature (2.0)."})
    max_length: int = field(default=512, metadata={"help": "Longest row in tokens."})
    save_base: bool | None = field(
        default=None, metadata={"help": "Save the frozen model too; default: if it has no name."}
    )

    def __post_init__(self) -> None:
        given = [name for name in ("rho", "entropy") if getattr(self, name) is not None]
        if len(given) == 2 or (not given and self.tempnet is None):
            raise ValueError(
                f"got rho={self.rho} and entropy={self.entropy}; give one of them (a YAML file may "
                "hold the other): rho = log V - entropy, 8.5 or 1.9 nats at V = 32000"
            )
        if self.max_length < 2 or self.tempnet_learning_rate <= 0:
            raise ValueError(
                "need max_length >= 2 and tempnet_learning_rate > 0, got "
                f"{self.max_length} and {self.tempnet_learning_rate}"
            )
        if self.train_model:
            if self.learning_rate is None:
                self.learning_rate = _JOINT_LEARNING_RATE
        elif self.learning_rate not in (None, self.tempnet_learning_rate):
            raise ValueError(
                f"got learning_rate={self.learning_rate} and a frozen language model; set "
                "tempnet_learning_rate, or train_model=True"
            )
        else:
            self.learning_rate = self.tempnet_learning_rate  # transformers logs it
        own = [name for name in _OF_THE_NETWORK.values() if getattr(self, name) is not None]
        if self.tempnet is not None and own:
            raise ValueError(
                f"got {', '.join(own)} and the TempNet in {self.tempnet}, which has its own; drop "
                "one of them"
            )
        super().__post_init__()


def build_tempnet(args: TempNetTrainingConfig, vocab_size: int, base_model: str) -> TempNet:
    """The network the settings ask for, new or read from a folder.

    Args:
        args: The settings.
        vocab_size: V of the language model.
        base_model: Its name or folder, to be written down; may be empty.

    Raises:
        ValueError: rho outside [0, log V), another option out of range, or a TempNet of another
            vocabulary.
        FileNotFoundError: the folder has no TempNet.
    """
    height, rho = math.log(vocab_size), args.rho
    base = str(Path(base_model).resolve()) if Path(base_model).is_dir() else base_model
    named: dict[str, Any] = {"base_model": base if base_model else None}
    if args.entropy is not None:
        if not 0 < args.entropy <= height:
            raise ValueError(
                f"entropy must be in (0, log V], got {args.entropy} nats with log V = "
                f"{height:.3f} for V = {vocab_size}; 1.9 is what rho = 8.5 leaves V = 32000"
            )
        rho = height - args.entropy
    if args.tempnet is not None:
        net = TempNet.from_pretrained(args.tempnet, vocab_size=vocab_size).float()
        net.config = replace(net.config, **named | ({} if rho is None else {"rho": rho}))
    else:
        check_rho(rho if rho is not None else math.nan, vocab_size)
        options = {name: getattr(args, ours) for name, ours in _OF_THE_NETWORK.items()}
        options = {name: value for name, value in options.items() if value is not None}
        net = TempNet(vocab_size, rho=rho, **named, **options)
    aimed = height - net.config.rho
    if aimed > height / 2:
        logger.warning(
            "rho = %.3f leaves %.3f nats of log V = %.3f: temperatures aim at an entropy of more "
            "than half the largest, which is close to random text. Take rho nearer to log V",
            *(net.config.rho, aimed, height),
        )
    return net


def with_weights(net: TempNet, weights: dict[str, Tensor]) -> TempNet:
    """A TempNet like ``net`` with other weights."""
    with torch.device("meta"):  # and draw no random numbers
        copy = TempNet(**asdict(net.config))
    shapes = {name: weight.shape for name, weight in copy.state_dict().items()}
    copy.load_state_dict({n: w.view(shapes[n]) for n, w in weights.items()}, assign=True)
    return copy
