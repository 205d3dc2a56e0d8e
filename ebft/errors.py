"""The one error that a user is meant to read, and what others say, for its sentence."""

from __future__ import annotations


class EBFTError(Exception):
    """Something the user gave cannot be used, or a run cannot go on: one sentence; the command line exits with 2."""


class MemoryRanOut(EBFTError):
    """The memory ran out, and nothing smaller can be tried."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or all of it where that line only leads to the next."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return on_one_line(error) if first.rstrip().endswith(":") else first


def on_one_line(error: BaseException) -> str:
    """All that an error says."""
    return " ".join(str(error).split()) or type(error).__name__
