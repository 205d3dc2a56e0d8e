"""Pruning: a criterion turns a weight and its input statistics into a mask; a masker does so for a whole block.

A criterion is a function ``(weight, inputs, pattern) -> mask``: weight float (outputs, inputs), ``InputStatistics``,
``Pattern``; mask bool (outputs, inputs), True = kept. Anybody's own can be given to ``ebft.run_ebft``.
"""

from ebft.pruning.magnitude import magnitude
from ebft.pruning.masker import CRITERIA, BlockMasks, Criterion, Masker, Surveyor, make_masker
from ebft.pruning.pattern import Pattern, mask_of_best
from ebft.pruning.statistics import InputObserver, InputStatistics, Statistics, sum_over_ranks_
from ebft.pruning.structured import make_structured_masker
from ebft.pruning.wanda import wanda

__all__ = [
    "CRITERIA",
    "BlockMasks",
    "Criterion",
    "InputObserver",
    "InputStatistics",
    "Masker",
    "Pattern",
    "Statistics",
    "Surveyor",
    "magnitude",
    "make_masker",
    "make_structured_masker",
    "mask_of_best",
    "sum_over_ranks_",
    "wanda",
]
