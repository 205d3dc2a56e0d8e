"""One attack on something, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.attack.arena import Arena


@dataclass(frozen=True)
class Case:
    """One attack.

    Attributes:
        name: what it is, in a few words.
        attempt: makes it, in a folder of its own and with a generator of its own; gives how often it attacked, and
            raises ``Fallen`` if that was not survived.
    """

    name: str
    attempt: Callable[[Arena, Path, Random], int]


@dataclass(frozen=True)
class Outcome:
    """What came of a case: how often it attacked, how often that was survived, and where it was not, how."""

    number: int
    name: str
    tried: int
    survived: int
    fault: str = ""
