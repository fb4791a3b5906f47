"""What happens at fixed points of a run: epochs, the first step, log lines."""

import logging
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class EpochCallback(TrainerCallback):
    """Tells the objective's gamma schedule and the collator which epoch begins."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch (whole numbers; a resumed run begins inside one)."""
        epoch = int(state.epoch or 0)
        self.trainer.objective.set_epoch(epoch)
        if hasattr(self.trainer.data_collator, "epoch"):
            self.trainer.data_collator.epoch = epoch


class TrainBeginCallback(TrainerCallback):
    """Calls a function once the model is wrapped and before its first step."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call the function."""
        self.function()


class WarnOnceCallback(TrainerCallback):
    """Warns once when a logged metric exceeds a threshold for several log lines in a row.

    Args:
        metric: Its name.
        threshold: Above it the line counts.
        message: Formatted with the value.
        patience: Lines in a row.
    """

    def __init__(self, metric: str, threshold: float, message: str, patience: int = 1) -> None:
        self.metric, self.threshold, self.message = metric, threshold, message
        self.patience, self.lines = patience, 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Count the line; warn when it is the last of the row."""
        value = (logs or {}).get(self.metric)
        if value is None:
            return
        self.lines = self.lines + 1 if value > self.threshold else min(self.lines, 0)
        if self.lines == self.patience:
            self.lines = -(10**9)
            logger.warning(self.message.format(value))


def inert_weights(threshold: float) -> WarnOnceCallback:
    """Warns when a temperature weighs all negatives alike, five log lines in a row.

    At the reference policy, and right after a rollout, weights are uniform at any temperature.
    """
    return WarnOnceCallback(
        "negatives/effective_fraction",
        threshold,
        "the effective fraction of negatives is {:.4f} (1 is uniform): at this tau the weights do "
        "nothing and the objective is the plain mean over negatives; lower tau to let hard "
        "negatives count more",
        patience=5,
    )
