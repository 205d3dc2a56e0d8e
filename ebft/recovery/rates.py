"""A learning rate that finds itself, by short trials that validation judges.

A trial is a tuning in small: a few steps from the same weights, at a rate that falls to zero. Which rate does best
hardly depends on how many steps it has, but much on the model and on what is tuned (docs/quality.md, "Rates").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FIRST = 0.03  # the rate that is tried first: what a step may move weights by, as a share of their size
FACTOR = 3.0  # between two rates of a first search; its root later
LEAST, MOST = 1e-4, 1.0  # no rate outside of these is tried
COST = 0.15  # share of the tuning's steps that trials may take, with what it costs to judge them
FORWARD_ALONE = 3  # forward passes cost as much as a step
FEWEST = 4  # steps of a trial: fewer are a matter of chance
USUAL = 4  # trials in a first search: the first rate, one to either side, and one further


@dataclass
class Trials:
    """The trials of one tuning.

    Attributes:
        run: (rate, steps) -> the loss on the validation split after so many steps from where the tuning will begin.
        length: steps of each.
        judging: what it costs to judge one, in steps.
        most: what all may cost, in steps; two there are in any case.
    """

    run: Callable[[float, int], float]
    length: int
    judging: float
    most: float
    _losses: dict[float, float] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Callable[[float, int], float], *, steps: int, judging: float, whole: float) -> Trials:
        """Of a tuning of ``steps``, among tunings of ``whole`` steps together that its search serves."""
        affordable = COST * whole / USUAL - judging
        return cls(run, max(1, min(max(FEWEST, int(affordable)), steps // 4)), judging, COST * whole)

    def affordable(self) -> bool:
        """Whether one more is."""
        return len(self._losses) < 2 or self.spent + self.length + self.judging <= self.most

    @property
    def spent(self) -> float:
        """What they have cost so far, in steps."""
        return len(self._losses) * (self.length + self.judging)

    def loss(self, rate: float) -> float:
        """After a trial at this rate; infinity where it diverged, the rate is out of bounds, or there may be none."""
        if not LEAST <= rate <= MOST or (rate not in self._losses and not self.affordable()):
            return math.inf
        if rate not in self._losses:
            loss = self.run(rate, self.length)
            self._losses[rate] = loss if math.isfinite(loss) else math.inf
        return self._losses[rate]

    def climbed(self, first: float, untuned: float, *, down: bool = True) -> float:
        """The best rate on a ladder of factor ``FACTOR``, from ``first`` step by step towards the better side.

        Args:
            untuned: the loss without a trial: where the first is no better than that, higher ones are not tried.
            down: whether lower ones are.
        """
        best = first
        while self.loss(best) < untuned and self.loss(best * FACTOR) < self.loss(best):
            best *= FACTOR
        while down and best <= first and self.loss(best / FACTOR) < self.loss(best):
            best /= FACTOR
        return best

    def beside(self, rate: float, *, above: bool) -> float:
        """This rate, or its neighbour on that side if it does better."""
        neighbour = rate * FACTOR ** (0.5 if above else -0.5)
        return neighbour if self.loss(neighbour) < self.loss(rate) else rate


def found_rate(trials: Trials, untuned: float, steps: int, finished: Sequence[Mapping[str, Any]]) -> float:
    """The rate for a block: found by a whole search in the first one, and by a step aside from the last one's later.

    A later block has trials of its own when all so far, with these, stay below ``COST``; sides take turns.

    Args:
        trials: of this block.
        untuned: its loss on the validation split.
        steps: that it will be tuned for.
        finished: the lines of ``blocks.jsonl`` of the blocks before.
    """
    before = [line for line in finished if line.get("learning_rate")]
    if not before:
        return trials.climbed(FIRST, untuned)
    rate, spent = before[-1]["learning_rate"], sum(line["trial_steps"] for line in before)
    if spent + 2 * (trials.length + trials.judging) > COST * steps * (len(before) + 1):
        return rate
    searches = sum(line["trial_steps"] > 0 for line in before)
    return trials.beside(rate, above=searches % 2 == 0)
