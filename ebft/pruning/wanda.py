"""Wanda (Sun et al., arXiv 2306.11695): |W| times the norm of the input that it multiplies, compared per output row."""

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


@register_criterion("wanda")
class Wanda(Criterion):
    """The largest |W_ij| * ||X_j||_2 of every output row i are kept (N:M: of every group in it).

    A unit's score in structured pruning is the same of whole columns: the mean over its columns j of
    E[x_j^2] ||W_:j||^2.
    """

    scores_units = True

    def mask(self, weight: Tensor, inputs: InputStatistics, pattern: Pattern) -> Tensor:
        """See ``Criterion``."""
        return mask_of_best(weight.abs() * inputs.norm(), pattern, per_row=True)

    def score_units(self, block: nn.Module, units: Units, statistics: Statistics) -> Tensor:
        """See ``Criterion``."""
        from ebft.pruning.structured.scores import by_column

        seen = statistics[units.consumer.name][0]
        return by_column(block, units, seen.squares.double() / max(seen.tokens, 1))
