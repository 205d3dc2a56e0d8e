"""Wanda (Sun et al., arXiv 2306.11695): |W| times the norm of the input that it multiplies, compared per output row."""

from __future__ import annotations

from torch import Tensor

from ebft.pruning.pattern import Pattern, mask_of_best
from ebft.pruning.statistics import InputStatistics


def wanda(weight: Tensor, inputs: InputStatistics, pattern: Pattern) -> Tensor:
    """Keep the largest |W_ij| * ||X_j||_2 of every output row i (N:M: of every group in it).

    Args:
        weight: float (outputs, inputs).
        inputs: statistics of what this matrix was multiplied with, (inputs,).

    Returns:
        bool (outputs, inputs), True = kept.
    """
    return mask_of_best(weight.abs() * inputs.norm(), pattern, per_row=True)
