"""What is kept of the weights that a block has between epochs, and when it is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from ebft.recovery.ebft.objective import Measured
from ebft_kernels import PackedMask


class Best:
    """The weights with the least loss so far, on the host, and their masks.

    Args:
        masks: those in force, which may be changed.
    """

    def __init__(self, block: nn.Module, masks: dict[str, PackedMask]) -> None:
        self._tuned = [parameter for parameter in block.parameters() if parameter.requires_grad]
        self._kept = [torch.empty_like(p, device="cpu", pin_memory=p.is_cuda, requires_grad=False) for p in self._tuned]
        self._loss, self._masks, self._kept_masks = math.inf, masks, dict(masks)

    @torch.no_grad()
    def see(self, loss: float) -> bool:
        """Keep the weights as they are now if ``loss``, which is theirs, is the least (the first are kept anyway)."""
        if least := loss <= self._loss or math.isinf(self._loss):
            self._loss, self._kept_masks = loss, dict(self._masks)
            for kept, parameter in zip(self._kept, self._tuned, strict=True):
                kept.copy_(parameter, non_blocking=True)
        return least

    @torch.no_grad()
    def restore(self) -> None:
        """Bring them back."""
        self._masks.update(self._kept_masks)
        for kept, parameter in zip(self._kept, self._tuned, strict=True):
            parameter.copy_(kept)


class Watch(Protocol):
    """Looks at a block after every epoch: is it done, and which weights are kept?

    Attributes:
        held_out_before, held_out_after: as in ``BlockResult``.
        untuned: the loss that it goes by, before the first epoch.
    """

    held_out_before: float | None
    untuned: float

    @property
    def held_out_after(self) -> float | None:
        """See above."""

    def done(self, now: Measured) -> bool:
        """After an epoch, which this is measured on the probe after: whether more epochs are of no use."""

    def end(self, now: Measured) -> tuple[list[str], float]:
        """After the last one: notes, and the error on the probe of the weights kept, which the block then has."""


class Probe:
    """No samples are held out: the last weights are kept, but where tuning diverged."""

    held_out_before: float | None = None
    held_out_after: float | None = None

    def __init__(self, best: Best, before: Measured) -> None:
        self.untuned = before.loss
        self._best, self._before, self._least, self._epochs = best, before, before, 0
        best.see(before.loss)

    def done(self, now: Measured) -> bool:
        """See ``Watch``."""
        self._epochs += 1
        if self._best.see(now.loss):
            self._least = now
        return False

    def end(self, now: Measured) -> tuple[list[str], float]:
        """See ``Watch``."""
        if now.loss <= self._before.loss:
            return [], now.error
        self._best.restore()
        what = _what(now)
        note = (
            f"tuning diverged: the {what} was {self._before.loss:.3g} before it and {now.loss:.3g} after epoch "
            f"{self._epochs}; the best weights seen, of {what} {self._least.loss:.3g}, were kept"
        )
        return [note], self._least.error


class HeldOut:
    """Samples are held out: the weights that do best on them are kept, and no more than ``patience`` epochs follow.

    Args:
        before: on the probe, before the first epoch.
        judge: measures the block as it is on the held-out samples.
    """

    def __init__(self, best: Best, before: Measured, judge: Callable[[], Measured], patience: int) -> None:
        self._judge, self._patience = judge, patience
        self._last = self._least = judge()
        self.held_out_before: float | None = self._last.error
        self.untuned = self._last.loss
        self._best, self._kept, self._epochs, self._best_epoch = best, before, 0, 0
        best.see(self._last.loss)

    @property
    def held_out_after(self) -> float | None:
        """See ``Watch``."""
        return self._least.error

    def done(self, now: Measured) -> bool:
        """See ``Watch``."""
        self._epochs += 1
        self._last = self._judge()
        if self._last.loss < self._least.loss:
            self._least, self._kept, self._best_epoch = self._last, now, self._epochs
            self._best.see(self._last.loss)
        return self._epochs - self._best_epoch >= self._patience

    def end(self, now: Measured) -> tuple[list[str], float]:
        """See ``Watch``."""
        if self._best_epoch == self._epochs:
            return [], now.error
        what = _what(now)
        kept = f"the weights of epoch {self._best_epoch} were kept" if self._best_epoch else "no epoch's were kept"
        rise = f"the error of a held-out token rose from {self._least.loss:.3g} to {self._last.loss:.3g} of its size"
        said = f"the calibration {what} went from {self._kept.loss:.3g} to {now.loss:.3g}, and {rise}"
        over_fitting = "over-fitting: " if now.loss < self._kept.loss else ""
        self._best.restore()
        return [f"{over_fitting}{said} in epoch {self._epochs}; {kept}"], self._kept.error


def _what(measured: Measured) -> str:
    """What a block is judged by, in a word: the loss, where that is something else than the error."""
    return "error" if measured.loss == measured.error or math.isnan(measured.loss) else "loss"
