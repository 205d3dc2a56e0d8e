"""How much memory a run takes at most: on the device a block at a time, on the host all of it."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path
from threading import Event, Thread

import torch

_STATUS, _MEMINFO, _CGROUP = Path("/proc/self/status"), Path("/proc/meminfo"), Path("/sys/fs/cgroup")
_EVERY = 0.05  # seconds; that many looks a second cost a thousandth of a processor


def begin_peak_memory(device: torch.device) -> None:
    """What ``peak_memory`` gives on a GPU is from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak since ``begin_peak_memory`` on a GPU; on a CPU, the process's peak resident size."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_resident()


def memory_in_use(device: torch.device) -> int:
    """Bytes that this process has now: of the GPU's memory, or resident on the host."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    return _in_status("VmRSS") or _peak_resident()


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a GPU, or on the host within its cgroup (elsewhere than on Linux: half of all)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _number(_MEMINFO, r"MemAvailable:\s+(\d+) kB", 1024)
    limit, used = (_number(_CGROUP / name, r"(\d+)\n") for name in ("memory.max", "memory.current"))
    if free is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return free if limit is None or used is None else max(0, min(free, limit - used))


class HostMemory:
    """The most that this process has of the host's memory, of which the anonymous part is looked at while inside."""

    def __init__(self) -> None:
        self._anonymous = _in_status("RssAnon")
        self._left, self._looking = Event(), Thread(target=self._look, daemon=True)

    def __enter__(self) -> HostMemory:
        if self._anonymous is not None:
            self._looking.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def peak(self) -> dict[str, int | None]:
        """``resident_bytes``, with pages of mapped files, and ``anonymous_bytes`` (None where there is no Linux)."""
        return {"resident_bytes": _peak_resident(), "anonymous_bytes": self._anonymous}

    def _look(self) -> None:
        while not self._left.wait(_EVERY):
            self._anonymous = max(self._anonymous or 0, _in_status("RssAnon") or 0)


def _peak_resident() -> int:
    """Of this process since it was started, and not, as getrusage has it on Linux, of what it was forked from."""
    peak = _in_status("VmHWM")
    if peak is not None:
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _in_status(name: str) -> int | None:
    """Bytes that Linux counts under ``name``; None where there is no Linux."""
    return _number(_STATUS, rf"{name}:\s+(\d+) kB", 1024)


def _number(file: Path, pattern: str, unit: int = 1) -> int | None:
    """The number that a line of ``file`` says, times ``unit``; None where there is no such file or line."""
    try:
        found = re.search(rf"^{pattern}", file.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return unit * int(found[1]) if found else None
