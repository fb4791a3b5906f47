"""Batches whose composition an objective asks for: classes, labels, queries, groups.

Each sampler is a ``batch_sampler`` of a ``DataLoader`` and is built from labels alone, so any
map-style data set will do. Four ways to run one:

* one process: ``DataLoader(data, batch_sampler=sampler)``;
* several, sharing each batch: ``num_replicas=world_size, rank=rank`` here, and a plain
  ``DataLoader``, which must not go through ``Accelerator.prepare``: that would shard it again;
* accelerate: leave ``num_replicas`` at 1 and prepare the loader. By default its rank r draws the
  batches r, r + W, ... of the sampler, whole ones, and an epoch has 1/W of the steps. With
  ``DataLoaderConfiguration(split_batches=True)`` ranks share each batch, cut as they would be here;
  that takes batches of one size, a multiple of W, which :class:`QuerySampler` does not have;
* ``transformers.Trainer``: override ``get_train_dataloader`` to return such a loader, plain with
  ``num_replicas=self.args.world_size, rank=self.args.process_index`` (a resumed run then goes on
  with the right batches), or prepared by ``self.accelerator`` (on several processes a run resumed
  within an epoch skips as many batches, but of epoch 0: Trainer does not reach behind both
  wrappers).

Objectives join the rows of all ranks, so ranks that share a batch compute what one process would.

To resume one's own loop: ``sampler.load_state_dict(state)`` before the loader is iterated, where
``state = sampler.state_dict()``, or ``state_dict(step=...)`` with the batches of the sampler used
in this epoch where workers or accelerate draw ahead. Accelerate calls ``set_epoch`` with a count of
its own, so tell a prepared loader too: ``loader.set_epoch(sampler.epoch)``.
"""

from typing import Any

import torch
from torch import Tensor

from llm_xrisk.data.sampler_base import PlannedBatchSampler, batches_for, check_positive
from llm_xrisk.data.sampler_draws import distinct_of_each, seeded
from llm_xrisk.data.sampler_labels import binary_labels, group_rows, relevance, task_labels
from llm_xrisk.fcco.arguments import checked


class DualSampler(PlannedBatchSampler):
    """A fixed number of positives and of negatives in each batch, for one binary label.

    Each class is passed over evenly, in permutations of its own that are drawn anew for each epoch
    and whenever one is used up: within an epoch, how often two rows of a class come differs by at
    most one. An epoch lasts until both classes have been passed over; the smaller one returns.
    A batch asking for more rows of a class than there are has each of them several times, so
    a data set smaller than a batch gives a batch; otherwise no row stands twice in a batch.
    Positives are spread over a batch, so that each rank has its share of them.

    Args:
        labels: (N,) in {0, 1}, {-1, 1} or bool, or a data set that holds them, see
            :func:`~llm_xrisk.data.sampler_labels.read_column`; (N, L) with ``column``.
        batch_size: Rows in a batch, that of all ranks together.
        num_pos: Positives in a batch.
        sampling_rate: In place of ``num_pos``: their share of a batch, in (0, 1), rounded to at
            least one row of either class. 0.5 if neither is given.
        column: Which of L labels, where there are several.
        drop_last: Whether the batch that ends the longer class's pass, and begins its next, is
            left out. All batches are full either way.
        num_replicas: Processes that share each batch.
        rank: Of this process.
        seed: Of every draw; torch's global generator is left alone.

    Raises:
        TypeError: labels of no known kind, or numbers that are none.
        ValueError: other labels, a class without rows, or numbers that make no batch.
        IndexError: no such column.

    Example:
        >>> sampler = DualSampler([0, 0, 1, 0, 0, 0, 1, 0], batch_size=4, num_pos=1)
        >>> len(sampler), [sum(row in (2, 6) for row in batch) for batch in sampler]
        (2, [1, 1])
    """

    @checked
    def __init__(
        self,
        labels: Any,
        *,
        batch_size: int,
        num_pos: int | None = None,
        sampling_rate: float | None = None,
        column: int | None = None,
        drop_last: bool = False,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        num_pos = _positives(batch_size, num_pos, sampling_rate)
        positive = binary_labels(labels, column)
        self._positives = positive.nonzero().flatten()
        self._negatives = (~positive).nonzero().flatten()
        for kind, rows in (("positives", self._positives), ("negatives", self._negatives)):
            if len(rows) == 0:
                raise ValueError(
                    f"got no {kind} among {len(positive)} labels; each batch needs rows of both "
                    "classes: check which label or column is meant"
                )
        per_batch = {"positives": num_pos, "negatives": batch_size - num_pos}
        passes_over = ((self._positives, num_pos), (self._negatives, batch_size - num_pos))
        super().__init__(
            {
                "num_samples": len(positive),
                "num_positives": len(self._positives),
                **{f"{kind}_per_batch": count for kind, count in per_batch.items()},
            },
            num_batches=max(batches_for(len(r), k, drop_last=drop_last) for r, k in passes_over),
            units=batch_size,
            num_replicas=num_replicas,
            rank=rank,
            seed=seed,
        )
        self.drop_last = drop_last
        self.num_pos, self.num_neg = num_pos, batch_size - num_pos
        self.batch_size = self._part.stop - self._part.start

    def _plan(self) -> Tensor:
        size = self.num_pos + self.num_neg
        plan = torch.empty(len(self), size, dtype=torch.long)
        for rows, places, name in (
            (self._positives, _spread(self.num_pos, size), "positives"),
            (self._negatives, ~_spread(self.num_pos, size), "negatives"),
        ):
            plan[:, places] = rows[self._draw(name, len(rows), int(places.sum()), len(self))]
        return plan


class TriSampler(PlannedBatchSampler):
    """Some of L labels in each batch, and for each of these so many positives and negatives.

    Labels are passed over evenly, none stands twice in a batch, and within a label so are its
    positives and its negatives, as in :class:`DualSampler`; epochs that need less than half of a
    label's rows share one pass. Rows carry all their labels: one drawn as another label's negative
    may be this one's positive, and a row can be drawn for two labels of a batch. An epoch draws
    about as many rows as there are.

    Args:
        labels: (N, L) in {0, 1}, {-1, 1} or bool, NaN where a row has no such label (objectives
            refuse NaN: rows drawn for one label are for one objective each then), or a data set
            that holds them.
        tasks_per_batch: Labels drawn for a batch, at most L.
        num_pos: Positives of each label drawn.
        num_neg: Negatives of each label drawn; as many as there are, and again, if there are fewer.
        drop_last: Whether the batch that would draw more rows than there are is left out.
        num_replicas: Processes that share each batch of
            ``tasks_per_batch * (num_pos + num_neg)`` rows.
        rank: Of this process.
        seed: Of every draw; torch's global generator is left alone.

    Raises:
        ValueError: other labels, a label that lacks a class, or numbers that make no batch.

    Example:
        >>> labels = [[0, 1], [1, 0], [0, 1], [1, 0]]
        >>> sampler = TriSampler(labels, tasks_per_batch=1, num_pos=1, num_neg=1)
        >>> len(sampler), sampler.tasks().flatten().sort().values.tolist()
        (2, [0, 1])
    """

    @checked
    def __init__(
        self,
        labels: Any,
        *,
        tasks_per_batch: int,
        num_pos: int,
        num_neg: int,
        drop_last: bool = False,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        check_positive(tasks_per_batch=tasks_per_batch, num_pos=num_pos, num_neg=num_neg)
        self._classes = task_labels(labels)
        self.num_tasks, num_samples = self._classes[0].shape
        if tasks_per_batch > self.num_tasks:
            raise ValueError(
                f"got tasks_per_batch={tasks_per_batch} for {self.num_tasks} labels; no label can "
                f"stand twice in a batch: lower it to at most {self.num_tasks}"
            )
        self.tasks_per_batch, self.num_pos, self.num_neg = tasks_per_batch, num_pos, num_neg
        size = tasks_per_batch * (num_pos + num_neg)
        super().__init__(
            {
                "num_samples": num_samples,
                "num_tasks": self.num_tasks,
                "num_positives": int(self._classes[0].sum()),
                "tasks_per_batch": tasks_per_batch,
                "positives_per_task": num_pos,
                "negatives_per_task": num_neg,
            },
            num_batches=batches_for(num_samples, size, drop_last=drop_last),
            units=size,
            num_replicas=num_replicas,
            rank=rank,
            seed=seed,
        )
        self.drop_last = drop_last
        self.batch_size = self._part.stop - self._part.start

    def tasks(self) -> Tensor:
        """The labels of each batch, (batches, tasks_per_batch), alike on every rank.

        Of the epoch begun last, or chosen with ``set_epoch``.
        """
        return self._draw("tasks", self.num_tasks, self.tasks_per_batch, len(self))

    def _plan(self) -> Tensor:
        tasks = self.tasks().flatten()
        visits = -(-len(tasks) // self.num_tasks)  # of a label, at most
        first = _spread(self.num_pos, self.num_pos + self.num_neg)
        plan = torch.empty(len(tasks), len(first), dtype=torch.long)
        places, counts = group_rows(tasks)
        for place in places.split(counts.tolist()):
            task = int(tasks[place[0]])
            for name, rows, columns in zip("pn", self._classes, (first, ~first), strict=True):
                found = rows[task].nonzero().flatten()
                k = int(columns.sum())
                drawn = found[self._draw(f"{name}{task}", len(found), k, visits)]
                plan[place[:, None], columns.nonzero().flatten()] = drawn[: len(place)]
        return plan.view(len(self), -1)


class QuerySampler(PlannedBatchSampler):
    """Some queries in each batch, and for each some relevant and some other rows.

    Queries are passed over evenly and an epoch has each at least once; those without any relevant
    row are left out, since no ranking measure is defined for them. Every visit draws the rows of a
    query anew, none twice, and all of them where a query has fewer than asked for, so
    batches differ in size. If there are fewer queries than a batch holds, it holds them all.

    Args:
        labels: (N,) grades; rows above zero are relevant.
        queries: (N,) integers or text that name each row's query.
        queries_per_batch: Queries in a batch, that of all ranks together.
        num_pos: Relevant rows of each query.
        num_neg: Other rows of each query.
        drop_last: Whether the batch that ends the pass over queries, and begins the next, is left
            out.
        num_replicas: Processes that share each batch; a query goes to one of them.
        rank: Of this process.
        seed: Of every draw; torch's global generator is left alone.

    Raises:
        ValueError: labels or queries of other shapes or kinds, no relevant row at all, or numbers
            that make no batch.

    Example:
        >>> grades, queries = [2, 0, 0, 1, 0], ["a", "a", "a", "b", "b"]
        >>> sampler = QuerySampler(grades, queries, queries_per_batch=1, num_pos=1, num_neg=2)
        >>> sorted(sorted(batch) for batch in sampler)
        [[0, 1, 2], [3, 4]]
    """

    @checked
    def __init__(
        self,
        labels: Any,
        queries: Any,
        *,
        queries_per_batch: int,
        num_pos: int,
        num_neg: int,
        drop_last: bool = False,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        check_positive(queries_per_batch=queries_per_batch, num_pos=num_pos, num_neg=num_neg)
        order, sizes = group_rows(queries, name="queries")
        relevant = relevance(labels, len(order))[order]
        query = torch.repeat_interleave(sizes)
        has_relevant = torch.bincount(query[relevant], minlength=len(sizes)) > 0
        if not has_relevant.any():
            raise ValueError(
                f"got no label above zero among {len(order)}; a query needs a relevant row to be "
                "ranked: check which column holds the grades"
            )
        kept = has_relevant[query]
        self._rows, self._counts = [], []
        for kind in (relevant, ~relevant):
            self._rows.append(order[kind & kept])
            counts = torch.bincount(query[kind & kept], minlength=len(sizes))
            self._counts.append(counts[has_relevant])
        self.num_queries = int(has_relevant.sum())
        self.queries_per_batch = min(queries_per_batch, self.num_queries)
        self.num_pos, self.num_neg = num_pos, num_neg
        super().__init__(
            {
                "num_samples": len(order),
                "num_queries": self.num_queries,
                "num_relevant": len(self._rows[0]),
                "queries_per_batch": self.queries_per_batch,
                "relevant_per_query": num_pos,
                "others_per_query": num_neg,
            },
            num_batches=batches_for(self.num_queries, self.queries_per_batch, drop_last=drop_last),
            units=self.queries_per_batch,
            num_replicas=num_replicas,
            rank=rank,
            seed=seed,
        )
        self.drop_last = drop_last

    def _plan(self) -> Tensor:
        queries = self._draw("queries", self.num_queries, self.queries_per_batch, len(self))
        parts = []
        for rows, counts, k in zip(
            self._rows, self._counts, (self.num_pos, self.num_neg), strict=True
        ):
            visited = queries.flatten()
            generator = seeded(self.seed, "items", len(parts), self.epoch)
            drawn = distinct_of_each(counts[visited], k, generator)
            starts = (counts.cumsum(0) - counts)[visited, None]
            padded = torch.cat([rows, rows.new_tensor([-1])])
            parts.append(padded[torch.where(drawn < 0, len(rows), starts + drawn)])
        return torch.cat(parts, dim=1).view(len(self), self.queries_per_batch, -1)


class GroupSampler(PlannedBatchSampler):
    """Some groups in each batch, and the same number of rows of each, for objectives over groups.

    Groups are passed over evenly, whatever their size, and none stands twice in a batch; within a
    group so are its rows, as in :class:`DualSampler`, and epochs that need less than half of them
    share one pass. A group smaller than ``items_per_group`` has each of its rows several times.
    An epoch draws about as many rows as there are.

    Args:
        groups: (N,) integers or text that name each row's group.
        groups_per_batch: Groups in a batch.
        items_per_group: Rows of each.
        drop_last: Whether the batch that would draw more rows than there are is left out.
        num_replicas: Processes that share each batch of ``groups_per_batch * items_per_group``.
        rank: Of this process.
        seed: Of every draw; torch's global generator is left alone.

    Raises:
        ValueError: groups of another shape or kind, fewer groups than a batch holds, or numbers
            that make no batch.

    Example:
        >>> sampler = GroupSampler([0, 0, 0, 0, 0, 1], groups_per_batch=2, items_per_group=2)
        >>> [sorted(batch).count(5) for batch in sampler]
        [2, 2]
    """

    @checked
    def __init__(
        self,
        groups: Any,
        *,
        groups_per_batch: int,
        items_per_group: int,
        drop_last: bool = False,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        check_positive(groups_per_batch=groups_per_batch, items_per_group=items_per_group)
        rows, sizes = group_rows(groups)
        self._rows, self._ends = rows, sizes.cumsum(0).tolist()
        self.num_groups = len(sizes)
        if groups_per_batch > self.num_groups:
            raise ValueError(
                f"got groups_per_batch={groups_per_batch} for {self.num_groups} groups; no group "
                f"can stand twice in a batch: lower it to at most {self.num_groups}"
            )
        self.groups_per_batch, self.items_per_group = groups_per_batch, items_per_group
        size = groups_per_batch * items_per_group
        super().__init__(
            {
                "num_samples": len(rows),
                "num_groups": self.num_groups,
                "groups_per_batch": groups_per_batch,
                "items_per_group": items_per_group,
            },
            num_batches=batches_for(len(rows), size, drop_last=drop_last),
            units=size,
            num_replicas=num_replicas,
            rank=rank,
            seed=seed,
        )
        self.drop_last = drop_last
        self.batch_size = self._part.stop - self._part.start

    def _plan(self) -> Tensor:
        groups = self._draw("groups", self.num_groups, self.groups_per_batch, len(self)).flatten()
        visits = -(-len(groups) // self.num_groups)  # of a group, at most
        plan = torch.empty(len(groups), self.items_per_group, dtype=torch.long)
        places, counts = group_rows(groups)
        for place in places.split(counts.tolist()):
            group = int(groups[place[0]])
            rows = self._rows[self._ends[group - 1] if group else 0 : self._ends[group]]
            drawn = self._draw(f"group{group}", len(rows), self.items_per_group, visits)
            plan[place] = rows[drawn[: len(place)]]
        return plan.view(len(self), -1)


def _positives(batch_size: int, num_pos: int | None, sampling_rate: float | None) -> int:
    """Positives in a batch, from whichever of the two was given."""
    if batch_size < 2:
        raise ValueError(
            f"batch_size must be at least 2, for a positive and a negative, got {batch_size}"
        )
    if num_pos is not None and sampling_rate is not None:
        raise ValueError(
            f"got num_pos={num_pos} and sampling_rate={sampling_rate}; they say the same thing: "
            "pass one of them"
        )
    if num_pos is None:
        rate = 0.5 if sampling_rate is None else sampling_rate
        if not 0 < rate < 1:
            raise ValueError(f"sampling_rate must be in (0, 1), got {sampling_rate}")
        num_pos = min(max(round(rate * batch_size), 1), batch_size - 1)
    if not 1 <= num_pos < batch_size:
        raise ValueError(
            f"num_pos must be in 1..batch_size-1, got num_pos={num_pos} of batch_size={batch_size}"
        )
    return num_pos


def _spread(count: int, size: int) -> Tensor:
    """``count`` places of ``size``, as even as they go: any stretch has its share, +-1."""
    reached = torch.arange(size + 1) * count // size
    return reached[1:] > reached[:-1]
