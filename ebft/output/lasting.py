"""Standard output and error that may be closed, full or read by nobody, at any moment, without ending the work."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Lasting(io.TextIOBase):
    """A text stream that loses what it cannot deliver.

    Args:
        stream: what it writes to; None, as Python has it where the descriptor was closed: nothing.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str, /) -> int:
        """All of ``text``, or as much as can be written."""
        with _failing_quietly():
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand on what is buffered."""
        with _failing_quietly():
            if self._stream is not None:
                self._stream.flush()

    def isatty(self) -> bool:
        """Whether it leads to a terminal."""
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        """The descriptor; ``OSError`` where there is none."""
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of what it writes to."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def buffer(self) -> Any:
        """The bytes below it."""
        return getattr(self._stream, "buffer", None)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Let ``sys.stdout`` and ``sys.stderr`` be lasting ones while inside; afterwards the interpreter can flush them.

    Closed descriptors are opened on the null device, so that no file of the work becomes one of them.
    """
    for descriptor in range(3):
        with contextlib.suppress(OSError):
            _open_if_closed(descriptor)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Lasting(before[0]), Lasting(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            if stream is not None:
                _flush_or_drop(stream)


def _open_if_closed(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free


def _flush_or_drop(stream: TextIO) -> None:
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


@contextlib.contextmanager
def _failing_quietly() -> Iterator[None]:
    try:
        yield
    except UnicodeError:
        raise
    except (OSError, ValueError):  # a closed pipe, a full device; a stream that is closed itself
        pass
