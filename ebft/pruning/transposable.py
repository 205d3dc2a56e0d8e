"""Transposable N:M: N of every M along rows *and* along columns, so that a weight and its transpose are both N:M.

A matrix is cut into M x M tiles, and in each the N M entries are kept that have the largest sum of scores with N in
every row and every column: a b-matching. For M up to 4 that is the best of all such patterns (90 for 2:4). Larger
tiles are

1. priced: v_j, u_i by turns are set to what lies between the N-th and the next of a column's (row's) scores less the
   other's price: coordinate descent on the dual of the linear program, whose optimum is the best tile's sum;
2. filled greedily, the largest score less its prices first; a row and a column left short are completed by the exchange
   that costs least;
3. improved: two kept entries move along their rows into each other's columns as long as that adds to the sum.

All tiles at once, on the device.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations, product

import torch
from torch import Tensor

ENUMERATED = 4  # the largest M whose patterns are tried one by one
ROUNDS = 12  # of prices
ENTRIES_AT_ONCE = 2**23  # of the largest tensor at hand, in whole tiles


def transposable_mask(scores: Tensor, keep: int, group: int) -> Tensor:
    """The mask with the largest sum of ``scores`` (exactly for M up to 4), N:M along rows and columns.

    Args:
        scores: float (outputs, inputs), finite; M divides both.
        keep: N.
        group: M.

    Returns:
        bool (outputs, inputs), True = kept.
    """
    rows, columns = scores.shape
    tiles = scores.reshape(rows // group, group, columns // group, group).transpose(1, 2).reshape(-1, group, group)
    best = _best_pattern if group <= ENUMERATED else _near_best
    largest = len(_patterns(keep, group)) if group <= ENUMERATED else group**3
    masks = [best(part, keep) for part in tiles.split(max(1, ENTRIES_AT_ONCE // largest))]
    mask = torch.cat(masks).reshape(rows // group, columns // group, group, group)
    return mask.transpose(1, 2).reshape(rows, columns)


@cache
def _patterns(keep: int, group: int) -> Tensor:
    """All patterns with ``keep`` in every row and column of a tile: bool (patterns, M, M)."""
    lines = [[float(j in kept) for j in range(group)] for kept in combinations(range(group), keep)]
    tiles = torch.tensor(list(product(lines, repeat=group)))
    return tiles[(tiles.sum(1) == keep).all(1)].bool()


def _best_pattern(tiles: Tensor, keep: int) -> Tensor:
    patterns = _patterns(keep, tiles.shape[1]).to(tiles.device)
    sums = tiles.flatten(1) @ patterns.flatten(1).T.to(tiles.dtype)
    return patterns[sums.argmax(1)]


def _near_best(tiles: Tensor, keep: int) -> Tensor:
    kept = _filled(tiles - _prices(tiles, keep), keep)
    _complete_(kept, tiles, keep)
    _exchange_(kept, tiles)
    return kept


def _prices(tiles: Tensor, keep: int) -> Tensor:
    """u_i + v_j for every entry."""
    along_rows, along_columns = torch.zeros_like(tiles[:, :, :1]), torch.zeros_like(tiles[:, :1])
    for _ in range(ROUNDS):
        along_columns = _between(tiles - along_rows, keep, 1)
        along_rows = _between(tiles - along_columns, keep, 2)
    return along_rows + along_columns


def _between(values: Tensor, keep: int, dim: int) -> Tensor:
    """Halfway between the ``keep``-th largest and the next."""
    top = values.topk(keep + 1, dim=dim).values
    return top.narrow(dim, keep - 1, 2).mean(dim, keepdim=True)


def _filled(worth: Tensor, keep: int) -> Tensor:
    """Entries by descending worth, where their row and their column have room: bool, like ``worth``."""
    count, size = worth.shape[:2]
    kept = torch.zeros_like(worth, dtype=torch.bool).flatten(1)
    room_of_rows, room_of_columns = (torch.full((count, size), keep, device=worth.device) for _ in range(2))
    for places in worth.flatten(1).argsort(1, descending=True).unbind(1):
        row, column = (places // size).unsqueeze(1), (places % size).unsqueeze(1)
        taken = (room_of_rows.gather(1, row) > 0) & (room_of_columns.gather(1, column) > 0)
        kept.scatter_(1, places.unsqueeze(1), taken)
        room_of_rows.scatter_add_(1, row, -taken.long())
        room_of_columns.scatter_add_(1, column, -taken.long())
    return kept.reshape(worth.shape)


def _complete_(kept: Tensor, scores: Tensor, keep: int) -> None:
    """Give every row and column its ``keep``.

    For a short row i and a short column j that is (i, j) itself, or (r, c) goes and (i, c) and (r, j) come.
    """
    while True:
        short = (kept.sum(2) < keep).any(1).nonzero().flatten()  # a sync point
        if not len(short):
            return
        now, worth, place = kept[short], scores[short], torch.arange(len(short), device=kept.device)
        i, j = (now.sum(2) < keep).long().argmax(1), (now.sum(1) < keep).long().argmax(1)
        row_i, column_j = now[place, i], now[place, :, j]
        gain = worth[place, i].unsqueeze(1) + worth[place, :, j].unsqueeze(2) - worth
        gain = gain.masked_fill(~now | row_i.unsqueeze(1) | column_j.unsqueeze(2), -torch.inf)
        best = gain.flatten(1).argmax(1)
        r, c = best // kept.shape[2], best % kept.shape[2]
        direct = ~now[place, i, j]
        now[place, r, c] &= direct
        now[place, i, c] |= ~direct
        now[place, r, j] |= ~direct
        now[place, i, j] |= direct
        kept[short] = now


def _exchange_(kept: Tensor, scores: Tensor) -> None:
    """Where two rows had better hold each other's column: swap, the best pair of a tile at a time."""
    size = scores.shape[1]
    least = 1e-6 * scores.abs().amax((1, 2))
    tiles = torch.arange(len(scores), device=scores.device)
    while True:
        here, worth = kept[tiles], scores[tiles]
        # what it gives a row to move its entry in column c to column d, and the best row for that: (tiles, c, d)
        move = worth.masked_fill(here, -torch.inf).unsqueeze(2) - worth.masked_fill(~here, torch.inf).unsqueeze(3)
        given, row = move.max(1)
        gain, pair = (given + given.mT).flatten(1).max(1)
        going = gain > least[tiles]
        tiles, row, pair = tiles[going], row[going], pair[going]  # a sync point
        if not len(tiles):
            return
        c, d = pair // size, pair % size
        place = torch.arange(len(tiles), device=scores.device)
        first, second = row[place, c, d], row[place, d, c]
        kept[tiles, first, c], kept[tiles, first, d] = False, True
        kept[tiles, second, d], kept[tiles, second, c] = False, True
