"""What share of a matrix is pruned, and the mask that a score for each weight makes of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from ebft.errors import EBFTError
from ebft.pruning.transposable import transposable_mask
from ebft_kernels import PackedMask


@dataclass(frozen=True)
class Pattern:
    """Either ``sparsity`` (pruned share of a matrix) or N:M (``keep`` of every ``group`` consecutive inputs).

    ``transposable``: N:M of every ``group`` consecutive outputs too.
    """

    sparsity: float
    keep: int = 0
    group: int = 0
    transposable: bool = False

    @classmethod
    def parse(cls, text: str, *, transposable: bool = False) -> Pattern:
        """``"2:4"`` as a pattern; ``EBFTError`` for anything that is not N:M with 0 < N < M."""
        match = re.fullmatch(r"(\d+):(\d+)", text.strip())
        if not match or not 0 < int(match[1]) < int(match[2]):
            raise EBFTError(
                f"--pattern is {text!r}; expected N:M, N kept of every M inputs, with 0 < N < M, such as 2:4"
            )
        keep, group = int(match[1]), int(match[2])
        return cls(1 - keep / group, keep, group, transposable)

    def check_shape(self, name: str, outputs: int, inputs: int) -> None:
        """``EBFTError`` if the matrix ``name`` of that size cannot be cut into groups."""
        sides = {"inputs": inputs} | ({"outputs": outputs} if self.transposable else {})
        for side, size in sides.items():
            if self.group and size % self.group:
                raise EBFTError(f"--pattern {self}: {name} has {size} {side}, which {self.group} does not divide")

    def __str__(self) -> str:
        groups = f"{self.keep}:{self.group}{' transposable' if self.transposable else ''}"
        return groups if self.group else f"{self.sparsity:.0%}"


def is_far(asked: float, got: float) -> bool:
    """Whether a pruned share misses what was asked for by more than a tenth of it, or of what was to be kept."""
    return abs(got - asked) > 0.1 * min(asked, 1 - asked)


def mask_of_best(scores: Tensor, pattern: Pattern, *, per_row: bool) -> Tensor:
    """True where a weight is kept: the highest ``scores`` of each group, of each row or of the whole matrix.

    Args:
        scores: (outputs, inputs), higher is more worth keeping.
        pattern: N:M works within groups along the inputs, transposable within square tiles, where the sum of what is
            kept is as large as can be (M > 4: nearly); a share works per row or per matrix.
        per_row: compare within a row (Wanda) and not over the whole matrix (magnitude).

    Returns:
        bool (outputs, inputs); exactly ``round((1 - sparsity) * count)`` are kept wherever scores are compared, of
        equal ones those further left.
    """
    if pattern.transposable:
        return transposable_mask(scores, pattern.keep, pattern.group)
    if pattern.group:
        return PackedMask.from_scores(scores, pattern.keep, pattern.group).dense()
    compared = scores if per_row else scores.reshape(1, -1)
    kept = round(compared.shape[1] * (1 - pattern.sparsity))
    return PackedMask.from_topk(compared, kept).dense().reshape(scores.shape)
