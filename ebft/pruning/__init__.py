"""Pruning: a criterion turns a weight and what is known of its inputs into a mask; a masker does so for a whole block.

A criterion is a class in a file of its own (``protocol.py``); importing this package registers ours. Anybody's own, a
class or a plain function ``(weight, inputs, pattern) -> mask``, can be given to ``ebft.run_ebft``.
"""

from ebft.config.pattern import Pattern
from ebft.pruning import dsnot, magnitude, ria, sparsegpt, structured, wanda
from ebft.pruning.pattern import mask_of_best
from ebft.pruning.protocol import Criterion, Refinement

__all__ = [
    "Criterion",
    "Pattern",
    "Refinement",
    "dsnot",
    "magnitude",
    "mask_of_best",
    "ria",
    "sparsegpt",
    "structured",
    "wanda",
]
