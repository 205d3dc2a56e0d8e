"""Magnitude pruning: the smallest absolute weights of a matrix go (N:M: of each group)."""

from __future__ import annotations

from torch import Tensor

from ebft.pruning.pattern import Pattern, mask_of_best
from ebft.pruning.statistics import InputStatistics


def magnitude(weight: Tensor, inputs: InputStatistics, pattern: Pattern) -> Tensor:
    """Keep the largest |W| of the whole matrix; ``inputs`` is not used.

    Args:
        weight: float (outputs, inputs).

    Returns:
        bool (outputs, inputs), True = kept.
    """
    return mask_of_best(weight.abs(), pattern, per_row=False)
