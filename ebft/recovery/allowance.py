"""The time that a recovery may take."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from ebft.distributed import Ranks

_MANY = 10_000


@dataclass
class Allowance:
    """So many seconds from now on; of several ranks their mean counts, so that all do the same.

    Attributes:
        seconds: None for as long as it takes.
        device: whose work is waited for before the time is read.
    """

    seconds: float | None
    device: torch.device
    ranks: Ranks
    _began: float = field(default_factory=lambda: time.perf_counter())

    def taken(self) -> float:
        """Seconds since it was made, on this rank."""
        return time.perf_counter() - self._began

    def passed(self) -> float:
        """The share of it that is over; 0 without a limit. A sync point with one."""
        if self.seconds is None:
            return 0.0
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        taken = torch.tensor(self.taken(), dtype=torch.float64)
        self.ranks.add_([taken])
        return float(taken) / self.ranks.count / max(self.seconds, 1e-9)

    def left(self) -> float | None:
        """Seconds, the same on all ranks; None without a limit. A sync point with one."""
        return None if self.seconds is None else self.seconds * (1 - self.passed())

    def as_steps(self, since: float) -> tuple[int, int]:
        """Where in the time after the share ``since`` this is, as a step of many. A sync point."""
        return min(_MANY, int(_MANY * (self.passed() - since) / max(1 - since, 1e-9))), _MANY
