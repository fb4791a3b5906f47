"""Settings of DRRHO, and the objective they name."""

import inspect
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from llm_xrisk.fcco import cosine
from llm_xrisk.objectives import OBJECTIVES, Objective
from llm_xrisk.objectives.robust import RobustObjective
from llm_xrisk.trainers.config import ScoreConfig

ROBUST = ("KLDRO", "KLConstrainedDRO", "CVaRDRO", "Chi2DRO", "Chi2ConstrainedDRO")
_CHOICES = {
    "objective": ROBUST,
    "selection": ("dro", "rho_topk"),
    "level": ("sequence", "token"),
    "loss_reduction": ("mean", "sum"),
}
_OF_THE_OBJECTIVE = ("gamma", "tau", "rho", "alpha")


@dataclass
class DRRHOConfig(ScoreConfig):
    """Settings of :class:`~llm_xrisk.trainers.drrho.DRRHOTrainer`.

    A batch size counts rows, each a prompt with its response. The weights compare the rows of a
    mini-batch: let it be large, by accumulation where memory is short.

    Args:
        objective: "KLDRO" (6.118), "KLConstrainedDRO" (6.120, learns tau), "CVaRDRO" (6.117),
            "Chi2ConstrainedDRO" (6.114) or "Chi2DRO".
        objective_kwargs: Further settings of the objective, as JSON: ``{"nu_lr": 0.1}``.
        gamma: gamma in (0, 1], weight of the new mini-batch value; by default the objective's.
        gamma_decay_epochs: E > 0 lets gamma fall from 1 to ``gamma`` over E epochs by a cosine.
        tau: Temperature of the KL objectives, the first one where it is learned.
        rho: Radius of the constrained objectives; the book's is ``rho / n``, ours has the n in it.
        alpha: Share of the rows that CVaR trains on, in (0, 1].
        k: The same as a number of rows of the data set: ``alpha = k / n``.
        level: "sequence" weighs responses, "token" weighs their tokens.
        loss_reduction: A response's loss is the "mean" or the "sum" of its tokens' (level
            "sequence").
        reference_model: Name of the reference model, which needs the same vocabulary; by default
            the model as training starts, of an adapter its base.
        reference_init_kwargs: For ``from_pretrained`` of the reference model, as JSON.
        reference_cache: File of the reference losses, shared by runs that name it; by default
            ``reference_losses.safetensors`` in ``output_dir``.
        use_reference: False trains on the losses themselves, which is plain DRO.
        selection: "dro" weighs rows by the objective; "rho_topk" is the RHO-LOSS baseline, which
            trains on the rows of a mini-batch with the largest RHO losses and has no objective.
        keep_fraction: Share of a mini-batch that "rho_topk" keeps, in (0, 1].
        max_length: Longest prompt + response in tokens; longer responses are cut and get no
            end-of-sequence token.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *ScoreConfig._VALID_DICT_FIELDS,
        *("objective_kwargs", "reference_init_kwargs"),
    ]

    objective: str = field(default="KLDRO", metadata={"help": ", ".join(ROBUST) + "."})
    objective_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further settings of the objective, as JSON."}
    )
    gamma: float | None = field(
        default=None, metadata={"help": "gamma in (0, 1]: weight of the new value (0.9)."}
    )
    gamma_decay_epochs: float = field(
        default=0.0, metadata={"help": "E: cosine from 1 to gamma over E epochs; 0 is constant."}
    )
    tau: float | None = field(
        default=None, metadata={"help": "Temperature (KLDRO 0.5, KLConstrainedDRO from 1)."}
    )
    rho: float | None = field(default=None, metadata={"help": "Radius > 0 (constrained ones)."})
    alpha: float | None = field(
        default=None, metadata={"help": "CVaRDRO: share of the rows, in (0, 1] (0.1)."}
    )
    k: int | None = field(default=None, metadata={"help": "CVaRDRO: alpha = k / rows."})
    level: str = field(default="sequence", metadata={"help": "Weighs sequence or token."})
    loss_reduction: str = field(
        default="mean", metadata={"help": "A response's loss: mean or sum over its tokens."}
    )
    reference_model: str | None = field(
        default=None, metadata={"help": "Reference model; default: the initial model."}
    )
    reference_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "For its from_pretrained, as JSON."}
    )
    reference_cache: str | None = field(
        default=None, metadata={"help": "File of the reference losses; default: in output_dir."}
    )
    use_reference: bool = field(default=True, metadata={"help": "False is DRO without reference."})
    selection: str = field(default="dro", metadata={"help": "dro, or rho_topk (RHO-LOSS)."})
    keep_fraction: float = field(
        default=0.1, metadata={"help": "rho_topk: share of a mini-batch, in (0, 1]."}
    )
    max_length: int = field(default=1024, metadata={"help": "Longest prompt + response, tokens."})

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if self.level == "token" and self.loss_reduction != "mean":
            raise ValueError(
                f'got level="token" with loss_reduction={self.loss_reduction!r}; a token\'s loss '
                'is reduced over nothing: drop loss_reduction, or take level="sequence"'
            )
        if not 0 < self.keep_fraction <= 1:
            raise ValueError(f"keep_fraction must be in (0, 1], got {self.keep_fraction}")
        if self.k is not None and (self.alpha is not None or self.level == "token" or self.k < 1):
            raise ValueError(
                f"got k={self.k} with alpha={self.alpha} and level={self.level!r}; k is a positive "
                "number of rows and sets alpha = k / rows: give one of the two, tokens alpha"
            )
        if self.reference_model is not None and not self.use_reference:
            raise ValueError(
                f"got reference_model={self.reference_model!r} with use_reference=False, so it "
                "would not be asked; drop one of them"
            )
        if isinstance(self.reference_init_kwargs, str):
            self.reference_init_kwargs = json.loads(self.reference_init_kwargs)
        super().__post_init__()


def robust_objective(args: DRRHOConfig, num_rows: int) -> Objective:
    """Build the objective that the settings name, for a data set of ``num_rows``.

    Raises:
        ValueError: a setting the objective does not have, or one out of its range.
    """
    further = args.objective_kwargs or {}
    chosen: dict[str, Any] = dict(json.loads(further) if isinstance(further, str) else further)
    named = {name: getattr(args, name) for name in _OF_THE_OBJECTIVE}
    chosen |= {name: value for name, value in named.items() if value is not None}
    if args.k is not None:
        if args.k > num_rows:
            raise ValueError(
                f"got k={args.k} and a data set of {num_rows} rows; k counts rows of the data "
                "set, or set alpha, their share"
            )
        chosen["alpha"] = args.k / num_rows
    top = args.selection == "rho_topk"
    kind: Any = RHOTopK if top else OBJECTIVES[args.objective]
    taken = inspect.signature(kind).parameters
    if args.gamma_decay_epochs:
        floor = chosen.get("gamma", taken["gamma"].default if "gamma" in taken else 1.0)
        chosen["gamma"] = cosine(floor, args.gamma_decay_epochs)
    unknown = sorted(set(chosen) - set(taken))
    if unknown:
        raise ValueError(
            f"{'selection=rho_topk' if top else args.objective} has no {unknown}; it takes "
            f"{sorted(taken)}: drop the others"
        )
    return kind(**chosen | ({"keep_fraction": args.keep_fraction} if top else {}))


class RHOTopK(RobustObjective):
    r"""RHO-LOSS selection: the mean over the rows of a mini-batch with the largest RHO losses.

    The baseline that DRRHO improves on: the rest of the mini-batch is passed over, and nothing is
    tracked from one mini-batch to the next.

    .. math:: F(w) = \frac1k \sum_{i=1}^k (\ell_{[i]}(w) - \ell_{[i]}(w_{ref})), \qquad
              k = \text{keep\_fraction} \cdot B

    Args:
        keep_fraction: Share of the rows, in (0, 1]; at least one row is kept.

    Example:
        >>> objective = RHOTopK(0.5)
        >>> objective(torch.tensor([0.0, 1.0, 2.0, 4.0])).loss  # (2 + 4) / 2
        tensor(3.)

    Relations: CVaRDRO with this share as alpha and a threshold for each mini-batch.

    Source: Mindermann et al., ICML 2022 (10 % of 320 rows); book section 6.9.
    """

    def __init__(self, keep_fraction: float = 0.1) -> None:
        super().__init__()
        self.keep_fraction = keep_fraction

    def estimate(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the kept rows, and weights B / k on them."""
        kept = max(1, round(self.keep_fraction * losses.numel()))
        rows = torch.argsort(losses, descending=True, stable=True)[:kept]
        weights = torch.zeros_like(losses).index_fill(0, rows, losses.numel() / kept)
        return losses[rows].mean(), weights

    def worst_case(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The same of a whole set."""
        return self.estimate(losses)
