"""The one error that a user is meant to read."""

from __future__ import annotations


class EBFTError(Exception):
    """Something the user gave cannot be used, or a run cannot go on: one sentence; the command line exits with 2."""


class MemoryRanOut(EBFTError):
    """The memory ran out, and nothing smaller can be tried."""
