"""What all samplers share: the epoch's plan, this rank's part of it, and a position to save."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import Sampler

from llm_xrisk.data.sampler_draws import distinct, passes, seeded
from llm_xrisk.fcco.arguments import fits, shown

logger = logging.getLogger(__name__)
_SHARE = 8  # epochs that share one pass, which costs up to so many draws for each row used


class PlannedBatchSampler(Sampler[list[int]]):
    """Batches of an epoch as a function of seed, epoch and step alone, so that any can be replayed.

    A subclass plans an epoch at once, (batches, units, ...) row numbers with -1 for none; units are
    what ranks share out. Iterating again plays the next epoch, or, where the last was left before
    its end, that one from its start.

    Args:
        sizes: What the plan depends on besides seed and epoch, by name; saved and compared.
        num_batches: Batches in an epoch, at least 1.
        units: Units in a batch.
        num_replicas: Processes that share each batch.
        rank: Of this process.
        seed: Of every draw.

    Attributes:
        epoch: The epoch that is being played, or is next.
        num_replicas: As given.
        rank: As given.
        seed: As given, or as loaded.

    Raises:
        ValueError: a rank outside 0..num_replicas-1, or fewer units than ranks.
    """

    #: rows in each batch of this rank, None where it varies; accelerate asks for it
    batch_size: int | None = None
    drop_last: bool

    def __init__(
        self,
        sizes: Mapping[str, int],
        *,
        num_batches: int,
        units: int,
        num_replicas: int,
        rank: int,
        seed: int,
    ) -> None:
        if not 0 <= rank < num_replicas:
            raise ValueError(
                f"rank must be in 0..num_replicas-1, got rank={rank} of num_replicas={num_replicas}"
            )
        if units < num_replicas:
            raise ValueError(
                f"got a batch of {units} for num_replicas={num_replicas}; each rank needs a part "
                "of it: a batch is that of all ranks together, so give its size times the ranks"
            )
        self._sizes = {**sizes, "num_batches": num_batches}
        self.num_replicas, self.rank = num_replicas, rank
        self._part = slice(units * rank // num_replicas, units * (rank + 1) // num_replicas)
        self.seed = seed
        self.epoch = 0
        self._step = 0  # batches drawn in this epoch
        self._resume = 0  # where the next iteration begins, after a state was loaded

    def __len__(self) -> int:
        return self._sizes["num_batches"]

    def __iter__(self) -> Iterator[list[int]]:
        if self._step >= len(self):
            self.set_epoch(self.epoch + 1)
        begin, self._resume, self._step = self._resume, 0, self._resume
        return self._play(self._plan()[:, self._part].flatten(1), begin)

    def _play(self, plan: Tensor, begin: int) -> Iterator[list[int]]:
        ragged = bool((plan < 0).any())
        for step in range(begin, len(self)):
            self._step = step + 1
            rows = plan[step]
            yield (rows[rows >= 0] if ragged else rows).tolist()

    @property
    def num_samples(self) -> int:
        """Rows of the data set that it was built for."""
        return self._sizes["num_samples"]

    @property
    def sampler(self) -> "PlannedBatchSampler":
        """Itself: where accelerate hands on ``set_epoch`` behind its own shards."""
        return self

    @property
    def batch_sampler(self) -> "PlannedBatchSampler":
        """Itself: where ``transformers.Trainer`` looks for ``set_epoch`` without such shards."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration plays.

        From its start, unless a state of this very epoch has just been loaded: then from there.

        Raises:
            ValueError: a negative epoch.
        """
        if not fits(epoch, int) or epoch < 0:
            raise ValueError(f"epoch must be an integer of at least 0, got {shown(epoch)}")
        if epoch != self.epoch and self._resume:
            logger.warning(
                "The sampler was to go on at batch %d of epoch %d and is set to epoch %d, which "
                "begins anew. Begin with the epoch of the loaded state: "
                "loader.set_epoch(sampler.epoch) on a loader prepared by accelerate.",
                *(self._resume, self.epoch, epoch),
            )
        if epoch != self.epoch or not self._resume:
            self._step = self._resume = 0
        self.epoch = epoch

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """The position, in plain numbers: whoever loads it draws the remaining batches bit-equal.

        Args:
            step: Batches of this epoch that training has used; by default those drawn. Workers of
                a ``DataLoader`` draw ahead, and so does a loader prepared by accelerate, by one.

        Raises:
            ValueError: a step outside the epoch.
        """
        step = self._step if step is None else step
        if not fits(step, int) or not 0 <= step <= len(self):
            raise ValueError(
                f"step must be in 0..{len(self)}, the batches of an epoch, got {shown(step)}"
            )
        finished = step == len(self)
        position = {"epoch": self.epoch + finished, "step": 0 if finished else step}
        return {**position, "seed": self.seed, "sizes": dict(self._sizes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken; the seed is taken from it too.

        The number of ranks may differ, since they share out one and the same batch.

        Raises:
            ValueError: a state of a sampler for other data or batches, none at all, or one beyond
                the epoch.
        """
        if not isinstance(state, Mapping):
            raise TypeError(
                f"got {shown(state)} as a state; it must come from "
                f"{type(self).__name__}.state_dict(): load the sampler's own entry"
            )
        missing = {"epoch", "step", "seed", "sizes"} - set(state)
        if missing:
            raise ValueError(
                f"got a state with {sorted(state)}, which lacks {sorted(missing)}; it must come "
                f"from {type(self).__name__}.state_dict(): load the sampler's own entry"
            )
        theirs, own = state["sizes"], self._sizes
        differing = [name for name in {**theirs, **own} if theirs.get(name) != own.get(name)]
        if differing:
            got, need = (
                ", ".join(f"{name}={sizes.get(name, 'none')}" for name in differing)
                for sizes in (theirs, own)
            )
            raise ValueError(
                f"got a state with {got}, and this {type(self).__name__} has {need}; a position "
                "means the same batches for the same data and sizes only: build the sampler as in "
                "the run that saved it, or begin an epoch anew with set_epoch"
            )
        whole = all(fits(state[name], int) for name in ("epoch", "step", "seed"))
        if not whole or not 0 <= state["step"] < len(self):
            raise ValueError(
                f"got a state at batch {state['step']} of an epoch of {len(self)}; it must come "
                f"from {type(self).__name__}.state_dict(), whose epochs end at batch 0 of the next"
            )
        self.epoch, self.seed = int(state["epoch"]), int(state["seed"])
        self._step = self._resume = int(state["step"])

    def _plan(self) -> Tensor:
        """Row numbers of the epoch, (batches, units, ...), -1 for none."""
        raise NotImplementedError

    def _draw(self, name: str, n: int, k: int, visits: int) -> Tensor:
        """For each visit of this epoch k of n items, passing over all of them; see passes.

        Epochs that need less than half a pass share one, up to eight of them.
        """
        need = visits * k
        share = max(1, min(n // max(need, 1), _SHARE))
        turn, place = divmod(self.epoch, share)
        generator = seeded(self.seed, name, turn)
        if share == 1:
            return passes(n, k, visits, generator)
        return distinct(n, share * need, generator)[place * need :][:need].view(visits, k)


def check_positive(**numbers: int) -> None:
    """Refuse sizes below 1 by their names.

    Raises:
        ValueError: with the name and the number.
    """
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def batches_for(rows: int, per_batch: int, *, drop_last: bool) -> int:
    """Batches that pass over the rows once; the one begun last counts unless it is dropped.

    Example:
        >>> batches_for(10, 4, drop_last=False), batches_for(10, 4, drop_last=True)
        (3, 2)
        >>> batches_for(3, 4, drop_last=True)
        1
    """
    return max(1, rows // per_batch if drop_last else -(-rows // per_batch))
