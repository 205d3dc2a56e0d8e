"""FLAP (An et al., arXiv 2312.11983): how much what a head or channel gives fluctuates; its mean goes into a bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebft.pruning.protocol import Criterion
from ebft.registry import register_criterion

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ebft.pruning.statistics import Statistics
    from ebft.pruning.structured.units import Units


@register_criterion("flap")
class Flap(Criterion):
    """Variance of the inputs times the squared norm of the columns that take them up; whole heads and channels only.

    For a unit whose values x_j the columns j of the consumer W (o, down) take up: the mean over j of
    Var[x_j] ||W_:j||^2. The fluctuation is what a constant cannot stand in for; the constant goes into the consumer's
    bias: b += sum over removed j of W_:j E[x_j].
    """

    needs = frozenset({"sums"})
    units_need = frozenset({"squares", "sums"})
    scores_weights, scores_units, fills_biases = False, True, True

    def score_units(self, block: nn.Module, units: Units, statistics: Statistics) -> Tensor:
        """See ``Criterion``."""
        from ebft.pruning.structured.scores import by_column

        seen = statistics[units.consumer.name][0]
        assert seen.sums is not None
        count = max(seen.tokens, 1)
        variance = (seen.squares.double() / count - (seen.sums.double() / count).square()).clamp(min=0)
        return by_column(block, units, variance)
