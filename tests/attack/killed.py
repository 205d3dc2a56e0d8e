"""kill -9 at random moments: whatever is left, the same command goes on with it to the same bits."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

from tests.attack.arena import KINDS, Arena, command, differences
from tests.attack.case import Case
from tests.attack.victim import Ended, Fallen, finish, start, wait

_IN_A_ROW = 4  # kills of one run, at most


def cases(rounds: int) -> Iterator[Case]:
    """Every kind of run in turn; every second time round over an earlier output."""
    kinds = list(KINDS)
    for number in range(rounds):
        kind, over_earlier = kinds[number % len(kinds)], bool(number // len(kinds) % 2)
        yield Case(f"{kind}{', over an earlier output' if over_earlier else ''}", partial(_attempt, kind, over_earlier))


def _attempt(kind: str, over_earlier: bool, arena: Arena, folder: Path, random: Random) -> int:
    if over_earlier:
        shutil.copytree(arena.earlier, folder / "out")
    run, kills = command(arena.flags(kind)), 0
    while kills < _IN_A_ROW:
        code = wait(start(run, folder, folder / "said"), random.uniform(0, arena.seconds[kind]))
        if code is not None:
            break
        kills += 1
        if over_earlier and not _whole_output_is_there(arena, folder, kind):
            raise Fallen(f"after {kills} kills neither the earlier output nor the new one is there as a whole")
    ended = Ended(code, (folder / "said").read_text()) if code else finish(run, folder)
    if ended.code:
        raise Fallen(f"resumed after {kills} kills, it ended with {ended}")
    if changed := differences(folder, arena.whole(kind)):
        raise Fallen(f"after {kills} kills these files are not those of an undisturbed run: {', '.join(changed)}")
    if litter := {path.name for path in folder.iterdir()} - {"out", "out.schedule", "said"}:
        raise Fallen(f"after {kills} kills there is litter: {', '.join(sorted(litter))}")
    return kills


def _whole_output_is_there(arena: Arena, folder: Path, kind: str) -> bool:
    """A run that is killed in the very moment of replacing has the earlier output set aside in its own folder."""
    out = folder / "out"
    there = _weights(out if out.exists() else folder / "out.partial" / ".replaced")
    return there in (_weights(arena.earlier), _weights(arena.whole(kind) / "out"))


def _weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
