"""Magnitude pruning: the smallest absolute weights of a matrix go (N:M: of each group)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebft.config.pattern import Pattern
from ebft.pruning.pattern import mask_of_best
from ebft.pruning.protocol import Criterion
from ebft.registry import register_criterion

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ebft.pruning.statistics import InputStatistics, Statistics
    from ebft.pruning.structured.units import Units


@register_criterion("magnitude")
class Magnitude(Criterion):
    """The largest |W| of the whole matrix are kept; a unit's score in structured pruning is the mean of its |w|."""

    needs = units_need = frozenset()
    scores_units = True

    def mask(self, weight: Tensor, inputs: InputStatistics, pattern: Pattern) -> Tensor:
        """See ``Criterion``; ``inputs`` are not used."""
        return mask_of_best(weight.abs(), pattern, per_row=False)

    def score_units(self, block: nn.Module, units: Units, statistics: Statistics) -> Tensor:
        """See ``Criterion``; ``statistics`` are not used."""
        from ebft.pruning.structured.scores import oriented

        total = oriented(block, units.consumer).abs().sum(0).cpu()[units.columns].sum(1)
        for matrix, rows in units.rows.items():
            total = total + oriented(block, matrix).abs().sum(1).cpu()[rows].sum(1)
        return total / units.parameters
