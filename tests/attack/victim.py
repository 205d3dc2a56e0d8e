"""Processes to attack: forked from one that has imported everything, so that each begins at once."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

PATIENCE = 60.0  # seconds after which a process that should have ended hangs
_POLL = 0.005


class Fallen(Exception):
    """An attack was not survived; the message says how."""


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code; a signal's number is negative.
        said: its standard output and standard error.
    """

    code: int
    said: str

    def sentence(self) -> str:
        """The one sentence that it failed with, and exit code 2; ``Fallen`` for any other end."""
        lines = self.said.strip().splitlines() or [""]
        sentences = [line for line in lines if line.startswith("ebft: ")]
        if self.code != 2 or sentences != lines[-1:] or "Traceback" in self.said:
            raise Fallen(f"expected exit code 2 and one sentence at the end, and got {self}")
        return sentences[0]

    def __str__(self) -> str:
        return f"exit code {self.code} and {' / '.join(self.said.strip().splitlines()[-3:])[-400:]!r}"


def start(
    work: Callable[[], int], folder: Path, said: Path, memory: int | None = None, largest: int | None = None
) -> int:
    """Begin ``work`` in a child whose exit code it gives; returns the child's process id.

    Args:
        folder: where it works.
        said: the file for its standard output and standard error.
        memory: bytes of address space that it may take beside those it begins with.
        largest: bytes that a file of its own may have.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(folder)
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if memory is not None:
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))
        if largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        torch.set_num_threads(1)
        code = work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float) -> int | None:
    """The exit code of a child that ends within ``seconds``; None if it does not, and it is then killed."""
    until = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            return None if code == -signal.SIGKILL else code  # it may end just before
        time.sleep(_POLL)


def finish(
    work: Callable[[], int],
    folder: Path,
    said: Path | None = None,
    patience: float = PATIENCE,
    **limits: int | None,
) -> Ended:
    """How ``work`` ends when nobody disturbs it; ``Fallen`` if it hangs."""
    said = said or folder / "said"
    code = wait(start(work, folder, said, **limits), patience)
    text = said.read_text(encoding="utf-8", errors="replace")
    if code is None:
        raise Fallen(f"still at work after {patience:.0f} s: {text[-200:]!r}")
    return Ended(code, text)
