"""``--time``: how long each part of a run may take, so that the whole takes what was asked for.

What a run must do is measured as it goes on: the perplexity of the dense model says what the other ones will take, and
the blocks that are finished say what one costs beside its tuning. What is left is for recovery, and is divided anew
before every block.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ebft.pipeline.context import RunContext

WALK = 0.3  # of the time for recovery, where one of the whole model follows
SPARE = 0.03  # of all: for what nobody can foresee
WRITTEN = 100e6  # bytes a second of the saved model, on a slow disk
PAGE = 3.0  # seconds for the report


@dataclass
class Pace:
    """Of one run; without ``--time`` it limits nothing.

    Attributes:
        context: the run.
        measuring: seconds that one perplexity of all texts takes.
        began: seconds into the run, when the walk began.
    """

    context: RunContext
    measuring: float = 0.0
    began: float = 0.0

    def begin_walk(self, measuring: float) -> None:
        """The dense model has been measured, which took so long; and say what is planned."""
        self.measuring, self.began = measuring, self.context.clock.total()
        limit, said_as = self.context.config.runtime.seconds, self.context.config.runtime.time
        if limit is None:
            return
        recovering = self._end - self.began
        if recovering <= 0:
            self.context.reporter.say(
                f"--time {said_as} leaves nothing for recovery: loading, measuring and saving "
                f"take about {self.began + limit - self._end:.0f} s"
            )
        walk = recovering * self._walk_share
        said = {"blocks": walk, "whole model": recovering - walk, "measuring and saving": limit - self._end}
        parts = ", ".join(f"{max(0, seconds):.0f} s {what}" for what, seconds in said.items() if seconds)
        self.context.reporter.say(f"--time {said_as}: {self.began:.0f} s so far, then {parts}")

    def of_block(self, finished: Iterable[Mapping[str, Any]], blocks: int) -> float | None:
        """Seconds for the recovery of the next of ``blocks``, of which those are finished; the same on all ranks."""
        if self.context.config.runtime.seconds is None:
            return None
        lines = list(finished)

        def seconds() -> float:
            end = self.began + (self._end - self.began) * self._walk_share
            each = max(0.0, end - self.context.clock.total()) / max(1, blocks - len(lines))
            beside = [line["seconds"] - line["tuning_seconds"] for line in lines]
            return max(0.0, each - statistics.median(beside)) if beside else each / 2

        return self.context.sharing.first(seconds)

    def of_whole(self, left: int) -> float | None:
        """Seconds for the next recovery of the whole model, of ``left`` that are to come; the same on all ranks."""
        if self.context.config.runtime.seconds is None:
            return None
        return self.context.ranks.first(lambda: max(0.0, self._end - self.context.clock.total()) / left)

    @property
    def _walk_share(self) -> float:
        return WALK if self.context.whole_model and self.context.recovery else float(self.context.recovery is not None)

    @property
    def _end(self) -> float:
        """Seconds into the run, when recovery has to be over."""
        limit = self.context.config.runtime.seconds or 0.0
        weights = sum(p.numel() * p.itemsize for p in self.context.decoder.model.parameters())
        measurements = 1 + (self.context.clock.laps.get("pruned_perplexity") is None)
        return limit * (1 - SPARE) - measurements * self.measuring - weights / WRITTEN - PAGE
