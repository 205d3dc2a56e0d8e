"""Where epochs are spent: in every block as many, or more of them where the error is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ebft.recovery.ebft import EBFT

MOST = 2  # times --epochs that a block may take


def epochs_for(own: EBFT.Settings, finished: Sequence[Mapping[str, Any]], relative_error: float) -> int:
    """How many epochs a block may take, a function of what is known before it is tuned.

    With ``--epochs-where error`` a block whose pruning has done more harm than that of the blocks before did in the
    mean may take, beside its own, the epochs that they have saved by ending early; all together never take more than
    ``epochs`` a block.

    Args:
        finished: the lines of ``blocks.jsonl`` of the blocks before.
        relative_error: of the pruned block.
    """
    if own.epochs_where == "all" or not finished:
        return own.epochs
    usual = sum(line["relative_error_before"] for line in finished) / len(finished)
    saved = own.epochs * len(finished) - sum(line["epochs"] for line in finished)
    return min(own.epochs + saved, MOST * own.epochs) if relative_error > usual else own.epochs
