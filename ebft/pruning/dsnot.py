"""DSnoT (Zhang et al., arXiv 2310.08915): kept and pruned weights of a row change places, and no weight changes.

What pruning takes from an output is, on average over the calibration tokens, the sum of w_j E[x_j] over the pruned
weights of its row: the error. In each cycle one weight grows back, the one that takes most off the error for how much
its input varies (w_j E[x_j] / Var[x_j], of the error's sign), and one is pruned in its place, the one with the smallest
|w_j| ||x_j|| (Wanda's score) among those whose loss takes something off the error too (w_j E[x_j] of the other sign).
A row is done when its error is small, when there is no such pair, or when no pair makes the error smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ebft.config.fields import check_fields, setting
from ebft.pruning.protocol import Refinement
from ebft.registry import register_refinement

if TYPE_CHECKING:
    from torch import Tensor

    from ebft.config.pattern import Pattern
    from ebft.model.matrices import Matrix
    from ebft.pruning.statistics import InputStatistics

SWAPPED_BYTES = 31  # a weight of the matrix at hand, while it works


@register_refinement("dsnot")
class DSnoT(Refinement):
    """Kept and pruned weights of a row change places, so that the mean output stays what it was; no weight changes."""

    needs = frozenset({"squares", "sums"})
    title = "DSnoT"

    @dataclass(frozen=True)
    class Settings:
        """Of DSnoT."""

        dsnot_threshold: float = setting(
            0.1, "mean error of an output at which its row is done, in the output's unit", at_least=0
        )
        dsnot_cycles: int = setting(50, "swaps in a row at most", at_least=1)

        def __post_init__(self) -> None:
            check_fields(self)

    def refine(self, weight: Tensor, mask: Tensor, inputs: InputStatistics, pattern: Pattern) -> Tensor:
        """See ``Refinement``."""
        import torch

        with torch.no_grad():
            threshold, cycles = self.settings.dsnot_threshold, self.settings.dsnot_cycles
            return dsnot(weight, mask, inputs, pattern, threshold=threshold, cycles=cycles)

    def working_bytes(self, matrix: Matrix) -> int:
        """See ``Refinement``."""
        return SWAPPED_BYTES * matrix.outputs * matrix.inputs


def dsnot(
    weight: Tensor, mask: Tensor, inputs: InputStatistics, pattern: Pattern, *, threshold: float, cycles: int
) -> Tensor:
    """A better mask than ``mask``, with as many kept in every row; all rows at once.

    Args:
        weight: the dense weight, float (outputs, inputs).
        mask: bool (outputs, inputs), True = kept.
        inputs: statistics with sums.
        pattern: with N:M, weights change places within a group alone.
        threshold: |error| at which a row is done, in the outputs' unit.
        cycles: swaps of a row at most.

    Returns:
        bool (outputs, inputs). No row's |error| is larger than it was.
    """
    import torch

    assert inputs.sums is not None
    tokens, mask = max(inputs.tokens, 1), mask.clone()
    mean = inputs.sums / tokens
    variance = (inputs.squares / tokens - mean.square()).clamp_min(torch.finfo(torch.float32).tiny)
    width = pattern.group or weight.shape[1]
    rows = torch.arange(len(weight), device=weight.device)  # those that are not done
    for _ in range(cycles):
        kept, w = mask[rows], weight[rows]
        part = w * mean
        error = part.masked_fill(kept, 0).sum(1, keepdim=True)
        gain = part * error.sign()  # what growing a weight takes off |error|, and pruning it adds
        worth = (gain / variance).masked_fill(kept | (gain <= 0), -torch.inf)
        cost = (w.abs() * inputs.norm()).masked_fill(~kept | (gain >= 0), torch.inf)
        least, cheapest = cost.unflatten(1, (-1, width)).min(2)  # of each group: (rows, groups)
        worth.unflatten(1, (-1, width)).masked_fill_(least.isinf().unsqueeze(2), -torch.inf)
        best, grown = worth.max(1)
        group = grown // width
        pruned = group * width + cheapest.gather(1, group.unsqueeze(1)).squeeze(1)
        change = gain.gather(1, pruned.unsqueeze(1)) - gain.gather(1, grown.unsqueeze(1))  # both make |error| less
        size = error.abs()
        going = ((size >= threshold) & ((size + change).abs() < size)).squeeze(1) & (best > -torch.inf)
        rows, grown, pruned = rows[going], grown[going], pruned[going]  # a sync point
        if not len(rows):
            break
        mask[rows, grown], mask[rows, pruned] = True, False
    return mask
