"""Lists of the tiles of a mask that are not empty, so that kernels visit no other; made once, on its device."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ebft_kernels._triton.common import cdiv


@dataclass(frozen=True)
class TileLines:
    """For every line of tiles, the numbers of those that hold a kept weight.

    Attributes:
        numbers: int32 (lines, tiles in a line); the first ``counts[i]`` of line i count, ascending.
        counts: int32 (lines,).
    """

    numbers: Tensor
    counts: Tensor


@dataclass
class _Known:
    """What is known of some words, as they were at a version."""

    version: int
    lines: dict[tuple[int, int, str], TileLines | None] = field(default_factory=dict)
    seen: set[tuple[int, int, str]] = field(default_factory=set)


_known = WeakTensorKeyDictionary()


def lines_of(words: Tensor, rows: int, columns: int, direction: str) -> TileLines | None:
    """The list for tiles of ``rows`` x ``columns`` weights; None if no tile is empty, and for words seen the first
    time.

    Making it is a sync point, once for a mask and a tile size; a mask that is used only once is not worth it.

    Args:
        words: int32 (N, W).
        columns: a multiple of 32.
        direction: ``"along"``, a line is a row of tiles (forward); ``"down"``, a column of them (input gradient).
    """
    if words.is_inference():  # no version, so a change would not be noticed
        return None
    known = _known.get(words)
    if known is None or known.version != words._version:
        known = _known[words] = _Known(words._version)
    key = (rows, columns, direction)
    if key not in known.lines and key in known.seen:
        known.lines[key] = _lines(words, *key)
    known.seen.add(key)
    return known.lines.get(key)


def _lines(words: Tensor, rows: int, columns: int, direction: str) -> TileLines | None:
    n, w = words.shape
    width = columns // 32
    padded = torch.nn.functional.pad(words, (0, -w % width, 0, -n % rows))
    kept = (padded.view(cdiv(n, rows), rows, cdiv(w, width), width) != 0).any(dim=3).any(dim=1)
    kept = kept if direction == "along" else kept.T
    if kept.all():  # sync point
        return None
    # Kept tiles first, each in its order: a stable sort of what is empty.
    numbers = (~kept).to(torch.int8).argsort(dim=1, stable=True).to(torch.int32)
    return TileLines(numbers.contiguous(), kept.sum(dim=1, dtype=torch.int32))
