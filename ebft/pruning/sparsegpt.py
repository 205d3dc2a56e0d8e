"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): columns are pruned left to right, those to come make up.

With inputs X (rows: tokens) and the Hessian H = X'X / tokens + damping, pruning w_j of a row costs least where those
columns F that come after it take over its part (optimal brain surgeon, restricted to F = {j, j + 1, ...}):

    w_F <- w_F - w_j / [H_F^-1]_jj * [H_F^-1]_:j          at a cost of  w_j^2 / [H_F^-1]_jj  (over 2)

Row j of the upper Cholesky factor U of H^-1 holds all of it: U_jj^2 = [H_F^-1]_jj and
U_jF / U_jj = [H_F^-1]_jF / [H_F^-1]_jj. So one factorization serves all rows and all columns. Masks are chosen for a
block of columns at a time (N:M: a group), by the lowest w^2 / U_jj^2, after what the columns before have changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ebft.config.fields import check_fields, setting
from ebft.config.pattern import Pattern
from ebft.errors import EBFTError
from ebft.pruning.pattern import mask_of_best
from ebft.pruning.protocol import Criterion
from ebft.registry import register_criterion

if TYPE_CHECKING:
    from torch import Tensor

    from ebft.config import EBFTConfig
    from ebft.model.matrices import Matrix
    from ebft.pruning.statistics import InputStatistics

    Choice = Callable[[Tensor, int, int], Tensor]  # scores of columns [start, stop), start, stop -> bool, True = kept

COLUMNS = 128  # in a block: the paper's choice
MOST_DAMPING = 10.0
SQUARE_MATRICES = 5  # inputs x inputs, beside the Gram matrix: Hessian, damped, inverse, two factors
SWEPT_BYTES = 14  # a weight: the weights left, those given back, the scores of a block of columns


@register_criterion("sparsegpt")
class SparseGPT(Criterion):
    """Optimal brain surgeon column by column: the mask, and the weights that make up for what it prunes."""

    needs = frozenset({"gram"})
    updates_weights = True

    @dataclass(frozen=True)
    class Settings:
        """Of SparseGPT."""

        sparsegpt_damping: float = setting(
            0.01,
            "what SparseGPT adds to its Hessian's diagonal, as a share of the mean; ten times as much where it has no "
            "Cholesky factor so",
            at_least=0,
        )
        act_order: bool = setting(
            False,
            "SparseGPT prunes inputs of large activations first, while most others can still make up for it (without "
            "--pattern, whose groups are consecutive inputs)",
        )

        def __post_init__(self) -> None:
            check_fields(self)

    @classmethod
    def check(cls, config: EBFTConfig) -> None:
        """See ``Criterion``."""
        super().check(config)
        if config.prune.pattern and config.of_method(cls.Settings).act_order:
            raise EBFTError(
                f"--act-order takes inputs out of the order that the groups of --pattern {config.prune.pattern} have; "
                "expected one of the two"
            )

    def mask(self, weight: Tensor, inputs: InputStatistics, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """Prune a weight (outputs, inputs) to exactly ``round((1 - sparsity) * count)`` kept entries, or to N:M.

        Every block of columns keeps the same share, as in the paper; in ``act_order``, where blocks differ in what they
        are worth, what the best of the whole matrix by the scores beforehand would keep there.

        Returns:
            the mask, bool (outputs, inputs), True = kept; and the weight to go with it, zero where pruned.
        """
        left, factor, order = self._begun(weight, inputs)
        if pattern.transposable:  # tiles span columns, so that the whole mask comes first
            chosen = mask_of_best(_scores(left, factor.diagonal()), pattern, per_row=True)
            mask = _sweep_(left, factor, lambda _, start, stop: chosen[:, start:stop], COLUMNS, COLUMNS)
        elif pattern.group:
            width = pattern.group * max(1, COLUMNS // pattern.group)
            best_of_groups = partial(mask_of_best, pattern=pattern, per_row=True)
            mask = _sweep_(left, factor, lambda scores, *_: best_of_groups(scores), width, pattern.group)
        else:
            mask = _sweep_(left, factor, self._shares(left, factor, pattern), COLUMNS, COLUMNS)
        return _in_place_of(order, mask), _in_place_of(order, left)

    def _shares(self, left: Tensor, factor: Tensor, pattern: Pattern) -> Choice:
        """Chooses so many of every block of columns that the whole matrix keeps exactly the share."""
        import torch

        from ebft_kernels import PackedMask

        ends = torch.arange(left.shape[1] + 1, dtype=torch.float64)
        kept_before = (ends * len(left) * (1 - pattern.sparsity)).round()  # so that rounding evens out over the blocks
        if self.settings.act_order:
            best = mask_of_best(_scores(left, factor.diagonal()), pattern, per_row=False)
            kept_before[1:] = best.sum(0).cumsum(0)

        def choose(scores: Tensor, start: int, stop: int) -> Tensor:
            kept = int(kept_before[stop] - kept_before[start])
            return PackedMask.from_topk(scores.reshape(1, -1), kept).dense().reshape(scores.shape)

        return choose

    def update(self, weight: Tensor, mask: Tensor, inputs: InputStatistics) -> Tensor:
        """What is left of ``weight`` (outputs, inputs) by a given ``mask``, made up for what that prunes."""
        left, factor, order = self._begun(weight, inputs)
        given = mask[:, order]
        _sweep_(left, factor, lambda _, start, stop: given[:, start:stop], COLUMNS, COLUMNS)
        return _in_place_of(order, left)

    def working_bytes(self, matrix: Matrix) -> int:
        """See ``Criterion``."""
        swept = 4 * SQUARE_MATRICES * matrix.inputs**2 + SWEPT_BYTES * matrix.outputs * matrix.inputs
        return max(super().working_bytes(matrix), swept)

    def _begun(self, weight: Tensor, inputs: InputStatistics) -> tuple[Tensor, Tensor, Tensor]:
        """The weight, zero where an input is always 0, and U, with their columns in order; and that order."""
        import torch

        assert inputs.gram is not None
        hessian = (inputs.gram / max(inputs.tokens, 1)).to(weight.dtype)
        size = hessian.diagonal()
        order = (
            size.argsort(descending=True, stable=True)
            if self.settings.act_order
            else torch.arange(len(size)).to(size.device)
        )
        hessian = hessian[order][:, order]
        return (
            torch.where(hessian.diagonal() == 0, 0, weight[:, order]),
            _factor(hessian, self.settings.sparsegpt_damping),
            order,
        )


def _sweep_(left: Tensor, factor: Tensor, choose: Choice, width: int, choice: int) -> Tensor:
    """Prune ``left`` (outputs, inputs) in place, in blocks of ``width`` columns; gives the mask.

    Args:
        factor: U, (inputs, inputs).
        choice: columns whose mask is chosen at a time, a divisor of ``width``.
    """
    import torch

    mask = torch.empty_like(left, dtype=torch.bool)
    for start in range(0, left.shape[1], width):
        stop = min(start + width, left.shape[1])
        block, within = left[:, start:stop], factor[start:stop, start:stop]
        errors, diagonal = torch.empty_like(block), within.diagonal()
        for j in range(stop - start):
            if j % choice == 0:
                end = min(j + choice, stop - start)
                scores = _scores(block[:, j:end], diagonal[j:end])
                mask[:, start + j : start + end] = choose(scores, start + j, start + end)
            errors[:, j] = torch.where(mask[:, start + j], 0, block[:, j]) / diagonal[j]
            block[:, j:].addr_(errors[:, j], within[j, j:], alpha=-1)
        left[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    left.masked_fill_(~mask, 0.0)
    return mask


def _scores(weight: Tensor, diagonal: Tensor) -> Tensor:
    """What it costs to prune each entry on its own (twice that): w^2 / U_jj^2."""
    return (weight / diagonal).square()


def _in_place_of(order: Tensor, columns: Tensor) -> Tensor:
    """``columns``, which are in ``order``, where they belong."""
    placed = columns.new_empty(columns.shape)
    placed[:, order] = columns
    return placed


def _factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse; an input that is always 0 stands alone in it."""
    import torch

    mean, dead = hessian.diagonal().mean(), hessian.diagonal() == 0
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean).masked_fill_(dead, 1.0)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(torch.isfinite(upper.diagonal()).all()):
                return upper
        damping = max(10 * damping, 1e-6)
        if damping > MOST_DAMPING:
            raise EBFTError(
                f"SparseGPT's Hessian has no Cholesky factor with a damping of {damping / 10:g} of its mean diagonal "
                f"{float(mean):g}; expected finite inputs"
            )
