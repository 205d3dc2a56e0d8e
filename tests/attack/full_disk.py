"""Full disks: a run that finds no room says so in one sentence, and goes on to the same bits when there is some."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

from tests.attack.arena import KINDS, Arena, command, differences
from tests.attack.case import Case
from tests.attack.victim import Ended, Fallen, finish

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS, _NEW_USERS, _REMOUNT = 0x20000, 0x10000000, 0x20
_ROOM = 2**28
_NO_DISK = 77  # the exit code that says that no file system may be mounted here


def cases(rounds: int) -> Iterator[Case]:
    """Every kind of run on a small file system, and with a limit on a file's size, in turn."""
    for number in range(rounds):
        kind = list(KINDS)[number % len(KINDS)]
        small_files = bool(number // len(KINDS) % 2)
        how = _with_small_files if small_files else _on_a_small_disk
        yield Case(f"{kind}, {'small files' if small_files else 'a small disk'}", partial(how, kind))


def _on_a_small_disk(kind: str, arena: Arena, folder: Path, random: Random) -> int:
    """On a tmpfs of its own, which any user may mount in a namespace of its own on most Linux systems."""
    size = 4096 * random.randrange(1, 1 + _bytes(arena.whole(kind)) // 4096)
    ended = finish(partial(_fill, kind, arena, folder, size), folder)
    if ended.code == _NO_DISK:
        return _with_small_files(kind, arena, folder, random)
    if ended.code:
        raise Fallen(f"{size} bytes of disk: {ended.said.strip()[-600:]}")
    return 1


def _fill(kind: str, arena: Arena, folder: Path, size: int) -> int:
    disk = folder / "disk"
    disk.mkdir()
    user, group = os.getuid(), os.getgid()
    if _LIBC.unshare(_NEW_MOUNTS | _NEW_USERS):
        return _NO_DISK
    for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(line)
    if _LIBC.mount(b"tmpfs", bytes(disk), b"tmpfs", 0, f"size={size}".encode()):
        return _NO_DISK
    ended = finish(command(arena.flags(kind)), disk, said=folder / "said of the run")
    _refused_for_want_of_room(ended, "No space left on device")
    if _LIBC.mount(b"tmpfs", bytes(disk), b"tmpfs", _REMOUNT, f"size={_ROOM}".encode()):
        raise OSError(ctypes.get_errno(), "the file system does not grow")
    _goes_on(finish(command(arena.flags(kind)), disk), arena, disk, kind)
    return 0


def _with_small_files(kind: str, arena: Arena, folder: Path, random: Random) -> int:
    """Where no file may grow beyond a limit, which takes no rights at all."""
    limit = random.randrange(64, max(file.stat().st_size for file in arena.whole(kind).glob("out/*.safetensors")))
    _refused_for_want_of_room(finish(command(arena.flags(kind)), folder, largest=limit), "File too large")
    _goes_on(finish(command(arena.flags(kind)), folder), arena, folder, kind)
    return 1


def _refused_for_want_of_room(ended: Ended, reason: str) -> None:
    if reason not in ended.sentence():
        raise Fallen(f"expected a sentence with {reason!r}, and got {ended}")


def _goes_on(ended: Ended, arena: Arena, folder: Path, kind: str) -> None:
    if ended.code:
        raise Fallen(f"with room again, it ended with {ended}")
    if changed := differences(folder, arena.whole(kind)):
        raise Fallen(f"with room again, these files are not those of an undisturbed run: {', '.join(changed)}")


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("out*/**/*") if file.is_file())
