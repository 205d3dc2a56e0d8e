"""The one table from (kernel, shape class, compute capability) to tiles, warps and stages.

An entry is measured (``benchmarks/tune.py`` writes them, with the device) or reasoned (made for an architecture and proven by
``benchmarks/static_report.py`` to compile without spills, on tensor cores, pipelined, within shared memory). Where there is no
entry the safe default of the kernel is taken: it fits every architecture from sm_75 on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CAPABILITIES = (75, 80, 86, 89, 90, 100)
SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227}  # KiB that one block may use


@dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    Attributes:
        tiles: the kernel's tile sizes by name, such as ``{"BT": 128, "BN": 128, "BK": 64}``.
        warps: warps of a program.
        stages: depth of the software pipeline.
    """

    tiles: dict[str, int] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2

    def options(self) -> dict[str, Any]:
        """What a launch takes besides its arguments."""
        return {**self.tiles, "num_warps": self.warps, "num_stages": self.stages}

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.tiles.items())), self.warps, self.stages))


def tiles(bt: int, bn: int, bk: int, warps: int, stages: int) -> Config:
    """A config of the three products."""
    return Config({"BT": bt, "BN": bn, "BK": bk, "GROUP": 8}, warps, stages)
