"""RIA (Zhang et al., ICLR 2024): a weight's share of its row and of its column, times its input's norm."""

from __future__ import annotations

import torch
from torch import Tensor

from ebft.pruning.pattern import Pattern, mask_of_best
from ebft.pruning.statistics import InputStatistics

POWER = 0.5  # of the input's norm: the paper's choice


def ria(weight: Tensor, inputs: InputStatistics, pattern: Pattern) -> Tensor:
    """Keep the largest (|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) * ||X_j||_2^0.5 of the whole matrix.

    A share of its row and of its column makes entries of different rows comparable, so that no input or output loses
    all its weights.

    Args:
        weight: float (outputs, inputs).
        inputs: statistics of what this matrix was multiplied with, (inputs,).

    Returns:
        bool (outputs, inputs), True = kept.
    """
    size, least = weight.abs(), torch.finfo(weight.dtype).tiny
    share = size / size.sum(1, keepdim=True).clamp_min(least) + size / size.sum(0).clamp_min(least)
    return mask_of_best(share * inputs.norm().pow(POWER), pattern, per_row=False)
