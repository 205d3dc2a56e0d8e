"""Pruning: a criterion turns a weight and its input statistics into a mask; a masker does so for a whole block.

A criterion is a function ``(weight, inputs, pattern) -> mask``: weight float (outputs, inputs), ``InputStatistics``,
``Pattern``; mask bool (outputs, inputs), True = kept. One that changes kept weights gives ``(mask, weight)``; one that
goes by more than squares says so in its attribute ``needs``. Anybody's own can be given to ``ebft.run_ebft``.
"""

from ebft.pruning.allocation import make_allocation
from ebft.pruning.dsnot import dsnot
from ebft.pruning.magnitude import magnitude
from ebft.pruning.masker import CRITERIA, UPDATING, BlockMasks, Criterion, Masker, Surveyor, make_masker
from ebft.pruning.pattern import Pattern, mask_of_best
from ebft.pruning.ria import ria
from ebft.pruning.sparsegpt import SparseGPT
from ebft.pruning.statistics import InputObserver, InputStatistics, Statistics, sum_over_ranks_
from ebft.pruning.structured.scores import make_structured_masker
from ebft.pruning.wanda import wanda

__all__ = [
    "CRITERIA",
    "UPDATING",
    "BlockMasks",
    "Criterion",
    "InputObserver",
    "InputStatistics",
    "Masker",
    "Pattern",
    "SparseGPT",
    "Statistics",
    "Surveyor",
    "dsnot",
    "magnitude",
    "make_allocation",
    "make_masker",
    "make_structured_masker",
    "mask_of_best",
    "ria",
    "sum_over_ranks_",
    "wanda",
]
