"""RIA (Zhang et al., ICLR 2024): a weight's share of its row and of its column, times its input's norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebft.config.pattern import Pattern
from ebft.pruning.pattern import mask_of_best
from ebft.pruning.protocol import Criterion
from ebft.registry import register_criterion

if TYPE_CHECKING:
    from torch import Tensor

    from ebft.pruning.statistics import InputStatistics

POWER = 0.5  # of the input's norm: the paper's choice


@register_criterion("ria")
class RIA(Criterion):
    """The largest (|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) * ||X_j||_2^0.5 of the whole matrix are kept.

    A share of its row and of its column makes entries of different rows comparable, so that no input or output loses
    all its weights.
    """

    def mask(self, weight: Tensor, inputs: InputStatistics, pattern: Pattern) -> Tensor:
        """See ``Criterion``."""
        import torch

        size, least = weight.abs(), torch.finfo(weight.dtype).tiny
        share = size / size.sum(1, keepdim=True).clamp_min(least) + size / size.sum(0).clamp_min(least)
        return mask_of_best(share * inputs.norm().pow(POWER), pattern, per_row=False)
