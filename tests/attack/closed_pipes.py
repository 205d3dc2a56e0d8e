"""Pipes that nobody reads, and standard streams that are closed or full: the work is done all the same."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

from tests.attack.arena import Arena, differences
from tests.attack.case import Case
from tests.attack.victim import PATIENCE, Ended, Fallen

_KIND = "wanda, ebft"
_REDIRECTIONS = (
    ">&-",
    "2>&-",
    "<&- >&- 2>&-",
    ">/dev/full",
    "2>/dev/full",
    ">/dev/full 2>&1",
    "2>&1 | head -n 1",
    "2>&1 >/dev/null | true",
)


def cases(rounds: int) -> Iterator[Case]:
    """Runs whose output must be whole, and commands whose answer is what they print."""
    for how in _REDIRECTIONS:
        yield Case(f"run {how}", partial(_run, how))
    for how in (">/dev/full", "| head -n 1", "| true"):
        yield Case(f"audit {how}", partial(_says, "audit", how))
        yield Case(f"run --plan {how}", partial(_says, "run --plan", how))


def _run(how: str, arena: Arena, folder: Path, random: Random) -> int:
    ended = _in_a_shell(["-m", "ebft.run", *arena.flags(_KIND)], how, folder)
    if ended.code:
        raise Fallen(f"the run ended with {ended}")
    if changed := differences(folder, arena.whole(_KIND)):
        raise Fallen(f"these files are not those of a run with open pipes: {', '.join(changed)}")
    return 1


def _says(command: str, how: str, arena: Arena, folder: Path, random: Random) -> int:
    """What a command prints is all it gives: it may end with a sentence where that cannot be written."""
    flags = [str(arena.earlier)] if command == "audit" else [*arena.flags(_KIND), "--plan", "rtx4090"]
    ended = _in_a_shell(["-m", f"ebft.{command.split()[0]}", *flags], how, folder)
    if ended.code not in (0, 2) or "Traceback" in ended.said or "Exception ignored" in ended.said:
        raise Fallen(f"it ended with {ended}")
    return 1


def _in_a_shell(arguments: list[str], how: str, folder: Path) -> Ended:
    """A process of its own, as a user starts it: the interpreter's own end is part of what is attacked."""
    line = f"{shlex.join([sys.executable, *arguments])} {how}\nexit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=3 * PATIENCE)
    code = done.returncode if done.returncode <= 128 else 128 - done.returncode  # as a signal's number
    return Ended(code, done.stdout + done.stderr)
