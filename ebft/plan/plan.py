"""A plan: what a run needs, in rows, and how it is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ebft.config import EBFTConfig
from ebft.output.figures import duration


@dataclass(frozen=True)
class Plan:
    """What a run needs, in bytes by row, and whether that can be had.

    Attributes:
        model: its name.
        config: the settings, those that were chosen among them.
        chosen: what was chosen: setting -> value.
        device: rows of the device's memory while a block is tuned.
        stages: the device's memory, in all, in the other stages.
        host: rows of the host's memory. Of a run on a CPU, the device's come on top.
        disk: rows of the output's file system.
        flops: of the walk over the blocks.
        seconds: name of a device -> what that takes there, for the matrix products alone.
        gpu: whether the device is one.
        traffic: lines about what travels between host and device in every step.
        faults: what cannot be had, a sentence each.
    """

    model: str
    config: EBFTConfig
    chosen: dict[str, Any]
    device: dict[str, int]
    stages: dict[str, int]
    host: dict[str, int]
    disk: dict[str, int]
    flops: float
    seconds: dict[str, float]
    gpu: bool
    traffic: list[str]
    faults: list[str]

    @property
    def device_peak(self) -> int:
        """Bytes on the device at most."""
        return max(sum(self.device.values()), *self.stages.values())

    @property
    def host_peak(self) -> int:
        """Bytes on the host at most, on a CPU with what is counted as the device's."""
        return sum(self.host.values()) + (0 if self.gpu else self.device_peak)

    def __str__(self) -> str:
        lines = [f"plan for {self.model}"]
        lines += [f"settings chosen: {flags(self.chosen)}"] if self.chosen else []
        lines.append(f"peak memory, {'GPU' if self.gpu else 'CPU, of the work'}: {gib(self.device_peak)}")
        lines += _table("while a block is tuned", self.device)
        lines += [f"  {name:<44} {gib(size)}" for name, size in self.stages.items()]
        lines.append(f"peak memory, host: {gib(self.host_peak)}{'' if self.gpu else ', the work among it'}")
        lines += [f"    {name:<42} {gib(size)}" for name, size in self.host.items()]
        lines.append(f"disk: {gib(sum(self.disk.values()))}")
        lines += [f"    {name:<42} {gib(size)}" for name, size in self.disk.items()]
        times = ", ".join(f"{duration(seconds)} on {name}" for name, seconds in self.seconds.items())
        lines.append(f"blocks: {self.flops / 1e12:.1f} TFLOP, {times}")
        lines += self.traffic
        lines.append("left out: the time of loading, saving and perplexities; pages that the system keeps of files")
        return "\n".join([*lines, *self.faults])


def flags(settings: dict[str, Any]) -> str:
    """Settings as they are said on the command line."""
    said = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        said.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}")
    return " ".join(said)


def gib(size: int) -> str:
    """A number of bytes for people, in a column."""
    return f"{size / 2**30:9.3f} GiB"


def _table(heading: str, rows: dict[str, int]) -> list[str]:
    return [
        f"  {heading:<44} {gib(sum(rows.values()))}",
        *(f"    {name:<42} {gib(size)}" for name, size in rows.items()),
    ]
