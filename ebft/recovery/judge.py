"""A block before and after a recovery: what every recovery reports, measured in one place."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from ebft.recovery.samples import Errors, Split, samples_of_all
from ebft.recovery.task import BlockResult, BlockTask

if TYPE_CHECKING:
    import torch

    from ebft.config import Recover
    from ebft.distributed import Ranks


class Judge:
    """Measures a task's block now, and again when ``result`` is asked for.

    Args:
        settings: those of all recoveries: the validation split, and how much goes through the block at once.

    Attributes:
        errors: of the block on any samples, through ``forward``.
        before, held_out_before: on the probe, and on the validation split; None where there is none.
    """

    def __init__(self, task: BlockTask, settings: Recover, device: torch.device, ranks: Ranks) -> None:
        split = Split.of(samples_of_all(task.inputs, ranks), settings.holdout, ranks)
        self.errors = Errors(task.inputs, task.targets, split, device, ranks, settings.at_once)
        self._through, self._began = partial(task.forward, task.block), time.perf_counter()
        self.before, self.held_out_before = self._measured()

    def _measured(self) -> tuple[float, float | None]:
        split = self.errors.split
        held_out = self.errors.of(self._through, split.held_out) if len(split.held_out) else None
        return self.errors.of(self._through, split.probe), held_out

    def result(self, **said: Any) -> BlockResult:
        """What has become of the block; ``said``: what else there is to say of it."""
        seconds = time.perf_counter() - self._began
        after, held_out_after = self._measured()
        about: dict[str, Any] = {"losses": [], "gradient_norms": [], "notes": [], "seconds": seconds, **said}
        return BlockResult(
            error_before=self.before,
            error_after=after,
            branch_energy=self.errors.branch_energy(),
            held_out_before=self.held_out_before,
            held_out_after=held_out_after,
            **about,
        )
