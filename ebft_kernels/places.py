"""``Places``: where a mask keeps weights, laid out for products that skip the rest (docs/layouts.md)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ebft_kernels.mask import PackedMask
from ebft_kernels.sparse_reference import SPARSE_CHUNK

_OPS = torch.ops.ebft_kernels
MOST = 2**31 - 1  # kept weights that 32-bit offsets can count


class Walk(NamedTuple):
    """The kept places of a matrix, row by row: ``sparse_reference.check_walk``.

    Attributes:
        columns: int16 (kept,), of each place its column from the beginning of its chunk of 128.
        offsets: int32 (rows * chunks + 1), where the places of a row in a chunk begin.
    """

    columns: Tensor
    offsets: Tensor


class Places(NamedTuple):
    """The kept places of a weight (N, K), along its rows and along its columns; made once for a mask.

    Attributes:
        words: of the mask that they belong to.
        row_offsets: int64 (N + 1), kept weights before each row.
        walk: through (N, K), in the order of the kept values.
        back: through the transposed weight (K, N).
    """

    words: Tensor
    row_offsets: Tensor
    walk: Walk
    back: Walk

    @classmethod
    def of(cls, mask: PackedMask) -> Places:
        """Of a mask (N, K) on the CPU, N at least 1.

        Raises:
            ValueError: it keeps more than 2^31 - 1 weights.
        """
        kept, offsets = mask.dense(), mask.row_offsets()
        if int(offsets[-1]) > MOST:
            raise ValueError(f"Places.of got a mask that keeps {int(offsets[-1])} weights; expected at most {MOST}")
        return cls(mask.words.clone(), offsets, _walk(kept), _walk(kept.T.contiguous()))

    def belong_to(self, words: Tensor) -> bool:
        """Whether they are those of a mask of these words, as they stand now."""
        return torch.equal(self.words, words)

    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(t.nbytes for t in (self.words, self.row_offsets, *self.walk, *self.back))


def _walk(kept: Tensor) -> Walk:
    chunks = -(-kept.shape[1] // SPARSE_CHUNK)
    padded = F.pad(kept, (0, chunks * SPARSE_CHUNK - kept.shape[1])).view(-1, SPARSE_CHUNK)
    offsets = F.pad(padded.sum(-1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    columns = padded.flatten().nonzero().flatten() % SPARSE_CHUNK
    return Walk(columns.to(torch.int16), offsets)
