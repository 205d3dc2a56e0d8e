"""The mask that a score for each weight makes of a pattern."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebft.config.pattern import Pattern

if TYPE_CHECKING:
    from torch import Tensor


def mask_of_best(scores: Tensor, pattern: Pattern, *, per_row: bool) -> Tensor:
    """True where a weight is kept: the highest ``scores`` of each group, of each row or of the whole matrix.

    Args:
        scores: (outputs, inputs), higher is more worth keeping.
        pattern: N:M works within groups along the inputs, transposable within square tiles, where the sum of what is
            kept is as large as can be (M > 4: nearly); a share works per row or per matrix.
        per_row: compare within a row (Wanda) and not over the whole matrix (magnitude).

    Returns:
        bool (outputs, inputs); exactly ``round((1 - sparsity) * count)`` are kept wherever scores are compared, of
        equal ones those further left.
    """
    from ebft.pruning.transposable import transposable_mask
    from ebft_kernels import PackedMask

    if pattern.transposable:
        return transposable_mask(scores, pattern.keep, pattern.group)
    if pattern.group:
        return PackedMask.from_scores(scores, pattern.keep, pattern.group).dense()
    compared = scores if per_row else scores.reshape(1, -1)
    kept = round(compared.shape[1] * (1 - pattern.sparsity))
    return PackedMask.from_topk(compared, kept).dense().reshape(scores.shape)
