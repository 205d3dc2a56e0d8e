"""How much memory a run takes at most: on the device a block at a time, on the host all of it."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path
from threading import Event, Thread

import torch

_STATUS = Path("/proc/self/status")
_EVERY = 0.05  # seconds; that many looks a second cost a thousandth of a processor


def begin_peak_memory(device: torch.device) -> None:
    """What ``peak_memory`` gives on a GPU is from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak since ``begin_peak_memory`` on a GPU; on a CPU, the process's peak resident size."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_resident()


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
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None
