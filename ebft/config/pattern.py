"""What share of a matrix is pruned: of its weights, or N:M."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ebft.errors import EBFTError


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
