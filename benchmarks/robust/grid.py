"""The methods that are compared, and the settings of which each chooses one on validation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ERM, CONTROL, REFERENCE = "ERM", "ERM, train + holdout", "The reference model"
TOP_K = "RHO-LOSS, top k"


@dataclass(frozen=True)
class Method:
    """A method by its settings for ``DRRHOConfig``; one of these is varied.

    Args:
        arguments: Settings that stay.
        name: The setting that is varied, None for those that vary the learning rate alone.
        values: Its values.
        rows: Rows it trains on: "train", "holdout" or "both".
        peer: The method that a difference is also taken to, beside plain ERM.
    """

    arguments: Mapping[str, Any]
    name: str | None = None
    values: tuple[float, ...] = ()
    rows: str = "train"
    peer: str | None = None

    @property
    def settings(self) -> list[dict[str, float]]:
        """The values of what is varied."""
        return [{self.name: value} for value in self.values] if self.name else [{}]

    @property
    def uses_reference(self) -> bool:
        """Whether its rows have losses of the reference model."""
        return bool(self.arguments.get("use_reference", True))


@dataclass(frozen=True)
class Rates:
    """Learning rates: ``few`` beside three values of a setting, ``many`` where nothing else varies.

    Args:
        few: Two of them.
        many: Six, which begin lower and end higher.
    """

    few: tuple[float, ...]
    many: tuple[float, ...] = field(default=())

    def of(self, method: Method) -> tuple[float, ...]:
        """Those of a method: every method has six configurations."""
        return self.few if method.name else self.many


# the top k of all rows are all rows: the mean loss
_PLAIN = {"selection": "rho_topk", "keep_fraction": 1.0, "use_reference": False}
_DRO = {"use_reference": False}
_TAUS, _RADII, _SHARES = (0.5, 2.0, 8.0), (0.01, 0.05, 0.25), (0.3, 0.6, 0.9)
# over some dozens of steps the default step sizes of tau and nu would not move them
_KL = {"objective": "KLDRO"}
_LEARNED = {"objective": "KLConstrainedDRO", "tau": 1.0, "objective_kwargs": {"tau_lr": 1.0}}
_CVAR = {"objective": "CVaRDRO", "objective_kwargs": {"nu_lr": 0.05}}

METHODS: dict[str, Method] = {
    REFERENCE: Method(_PLAIN, rows="holdout"),
    ERM: Method(_PLAIN),
    CONTROL: Method(_PLAIN, rows="both"),
    "KL-DRO": Method(_KL | _DRO, "tau", _TAUS),
    "CVaR-DRO": Method(_CVAR | _DRO, "alpha", _SHARES),
    TOP_K: Method({"selection": "rho_topk"}, "keep_fraction", _SHARES),
    "DRRHO, KL": Method(_KL, "tau", _TAUS, peer="KL-DRO"),
    "DRRHO, KL constraint": Method(_LEARNED, "rho", _RADII, peer="KL-DRO"),
    "DRRHO, CVaR": Method(_CVAR, "alpha", _SHARES, peer="CVaR-DRO"),
}
