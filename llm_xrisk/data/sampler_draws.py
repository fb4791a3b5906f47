"""Drawing without replacement: permutations read in pieces, and a few items of many groups."""

import hashlib

import torch
from torch import Tensor


def seeded(*names: int | str) -> torch.Generator:
    """A generator of its own for what is drawn under these names; torch's global one rests.

    Example:
        >>> torch.equal(passes(9, 3, 2, seeded(7, "a")), passes(9, 3, 2, seeded(7, "a")))
        True
    """
    text = "/".join(map(str, names)).encode()
    # 32 bits, since torch's Mersenne twister looks at no more of its seed
    digest = hashlib.blake2b(text, digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def passes(n: int, k: int, visits: int, generator: torch.Generator) -> Tensor:
    """For each visit k of n items, passing over all items before one returns.

    Permutations follow each other, a new one when the last is used up. Where a visit ends one and
    begins the next, the next is ordered so that no item stands twice in the visit. If k exceeds n,
    a visit has every item k // n times and passes over them for the rest.

    Args:
        n: Number of items, positive.
        k: Items for each visit.
        visits: Number of visits.
        generator: Of the permutations.

    Returns:
        (visits, k) numbers of items; over the visits, how often two items come differs by at most
        one.

    Example:
        >>> drawn = passes(5, 3, 5, seeded(0))
        >>> drawn.flatten().bincount().tolist(), [len(set(row)) for row in drawn.tolist()]
        ([3, 3, 3, 3, 3], [3, 3, 3, 3, 3])
    """
    copies, rest = divmod(k, n)
    if rest == 0:
        return torch.arange(n).repeat(visits, copies)
    pieces = [torch.randperm(n, generator=generator)]
    for done in range(n, visits * rest, n):
        order = torch.randperm(n, generator=generator)
        begun = done % rest
        if begun:
            order = _apart(order, pieces[-1][n - begun :], rest - begun, generator)
        pieces.append(order)
    drawn = torch.cat(pieces)[: visits * rest].view(visits, rest)
    return torch.cat([torch.arange(n).repeat(visits, copies), drawn], dim=1) if copies else drawn


def _apart(order: Tensor, begun: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The permutation ``order``, with none of the items ``begun`` among its first ``count``."""
    taken = torch.zeros(len(order), dtype=torch.bool)
    taken[begun] = True
    held = taken[order]
    free = order[~held]
    # shuffled again, or the items held back would end every pass side by side
    rest = torch.cat([free[count:], order[held]])
    return torch.cat([free[:count], rest[torch.randperm(len(rest), generator=generator)]])


def distinct(n: int, count: int, generator: torch.Generator) -> Tensor:
    """The numbers of ``count`` of n items, none twice, in random order.

    Example:
        >>> sorted(distinct(4, 4, seeded(0)).tolist())
        [0, 1, 2, 3]
    """
    if 16 * count <= n:  # a permutation of everything would cost more than some draws too many
        ordered = torch.randint(n, (2 * count,), generator=generator).sort().values
        drawn = ordered[torch.cat([torch.tensor([True]), ordered[1:] != ordered[:-1]])]
        if len(drawn) >= count:
            return drawn[torch.randperm(len(drawn), generator=generator)[:count]]
    return torch.randperm(n, generator=generator)[:count]


def distinct_of_each(sizes: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Of each group k items, none twice, or all items where it has fewer.

    Args:
        sizes: (G,) items in each group.
        k: Items wanted, positive.
        generator: Of the draw.

    Returns:
        (G, k) numbers of items within their groups, -1 where a group has no more.

    Example:
        >>> drawn = distinct_of_each(torch.tensor([0, 2, 1000]), 3, seeded(0))
        >>> [len(set(row) - {-1}) for row in drawn.tolist()]
        [0, 2, 3]
    """
    drawn = torch.full((len(sizes), k), -1)
    small = sizes <= 2 * k
    if small.any():
        drawn[small] = _by_sorting(sizes[small], k, generator)
    if not small.all():
        drawn[~small] = _by_redrawing(sizes[~small], k, generator)
    return drawn


def _by_sorting(sizes: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Groups of at most 2 k items: the k lowest of random keys."""
    keys = torch.rand(len(sizes), max(int(sizes.max()), k), generator=generator)
    keys[torch.arange(keys.shape[1]) >= sizes[:, None]] = 2.0
    order = keys.argsort(dim=1)[:, :k]
    return order.masked_fill(torch.arange(k) >= sizes[:, None], -1)


def _by_redrawing(sizes: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Groups of more than 2 k items: independent draws, repeated where an item stands already."""

    def draw(bounds: Tensor) -> Tensor:
        # float64, for float32 cannot tell the items of a large group apart
        keys = torch.rand(bounds.shape, generator=generator, dtype=torch.float64)
        return (keys * bounds).long()

    bounds = sizes[:, None].expand(-1, k)
    drawn, open_rows = draw(bounds), torch.arange(len(sizes))
    while len(open_rows):
        ordered, place = drawn[open_rows].sort(dim=1, stable=True)
        repeated = torch.zeros_like(ordered, dtype=torch.bool)
        repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        again = torch.zeros_like(repeated).scatter_(1, place, repeated)
        rows, columns = again.nonzero(as_tuple=True)
        drawn[open_rows[rows], columns] = draw(sizes[open_rows[rows]])
        open_rows = open_rows[again.any(dim=1)]
    return drawn
