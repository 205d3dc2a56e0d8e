"""Lists of the tiles of a mask that are not empty, so that kernels visit no other. Made once with the mask, on its device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ebft_kernels._triton.common import cdiv


@dataclass(frozen=True)
class TileList:
    """For every line of tiles, the numbers of those that hold a kept weight.

    Attributes:
        numbers: int32 (lines, tiles in a line); the first ``counts[i]`` of line i are filled, ascending.
        counts: int32 (lines,).
        some_empty: whether any tile is empty: otherwise the list is not worth reading. A sync point when it was made.
    """

    numbers: Tensor
    counts: Tensor
    some_empty: bool

    @classmethod
    def of(cls, words: Tensor, rows: int, columns: int, along: str) -> TileList:
        """The list for tiles of ``rows`` x ``columns`` (a multiple of 32) weights.

        Args:
            words: int32 (N, W).
            along: ``"k"``, a line is a row of tiles (forward); ``"n"``, a line is a column of tiles (input gradient).
        """
        n, w = words.shape
        word_columns = columns // 32
        padded = torch.nn.functional.pad(words, (0, -w % word_columns, 0, -n % rows))
        tiles = padded.view(cdiv(n, rows), rows, cdiv(w, word_columns), word_columns)
        kept = (tiles != 0).any(dim=3).any(dim=1)
        kept = kept if along == "k" else kept.T
        # Kept tiles first, each in its order: a stable sort of what is empty.
        numbers = (~kept).to(torch.int8).argsort(dim=1, stable=True).to(torch.int32)
        counts = kept.sum(dim=1, dtype=torch.int32)
        return cls(numbers.contiguous(), counts, not bool(kept.all()))
