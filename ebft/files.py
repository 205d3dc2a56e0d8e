"""Files that somebody else made: only ordinary ones are opened, and none of them leads out of its model's folder."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from ebft.errors import EBFTError

_AT_ONCE = 2**24  # bytes of a file that a thread makes a checksum of
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_READ_FROM = (".", "additional_chat_templates")  # of a model's folder, what transformers opens files in
_BLOB = re.compile(r".*(/models--[^/]+/blobs/[^/]+|/blobs/[0-9a-f]{2}/[0-9a-f]{64})")  # of a hub cache


def ordinary(path: Path, what: str) -> Path:
    """``path``, once it is known that opening it neither waits for a writer nor reads a device.

    Args:
        what: how the error calls it.

    Raises:
        EBFTError: it is something else than a file.
        OSError: it is not there.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise EBFTError(f"{what} is {kind}; expected a file")
    return path


def check_model_folder(folder: Path) -> None:
    """``EBFTError`` if a folder holds a pipe, a device or a socket, or a file that is a link to somewhere else.

    What transformers reads it also saves again, so that a link could publish a private file. Links into the blobs of a
    hub cache, of which its snapshots are made, are the exception.
    """
    home = folder.resolve()
    for entry in (entry for place in _READ_FROM for entry in sorted((folder / place).glob("*"))):
        if entry.is_dir() or not entry.exists():  # a dangling link is a file that is not there
            continue
        ordinary(entry, f"model {folder}: {entry.name}")
        target = entry.resolve()
        in_cache = _BLOB.fullmatch(str(target)) is not None
        if not target.is_relative_to(home) and not in_cache:
            raise EBFTError(f"model {folder}: {entry.name} is a link out of the folder, to {target}; expected a file")


def check_name(name: object, where: str) -> str:
    """``name``, which ``where`` gives, if it names a file beside it; ``EBFTError`` if it could lead elsewhere."""
    if not isinstance(name, str) or name in ("", "..") or PurePosixPath(name).name != name or set(name) & set("\\:\0"):
        raise EBFTError(f"{where} names the file {name!r}; expected the name of a file in the same folder")
    return name


def read_json(file: Path, what: str) -> Any:
    """What a file of JSON holds.

    Args:
        what: how the error calls it.

    Raises:
        EBFTError: it is something else than a file.
        OSError: it cannot be read.
        ValueError: it holds no JSON.
    """
    return parse_json(ordinary(file, what).read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """What JSON says; ``ValueError`` if it says nothing, or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def indexed_files(index: Path) -> dict[str, str]:
    """Name of a tensor -> name of its file, as the index of a checkpoint in several files says.

    Raises:
        EBFTError: it is no index, or names a file outside of its folder.
    """
    try:
        listed = read_json(index, str(index))["weight_map"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EBFTError(f"{index} is no index of shards: {type(error).__name__} {error}") from None
    if not listed:
        raise EBFTError(f"{index} is no index of shards: it lists no tensors")
    return {str(tensor): check_name(name, str(index)) for tensor, name in listed}


def checksum(files: Path | Iterable[Path], on_part: Callable[[float], object] = lambda share: None) -> str:
    """XXH3 (128 bits) over those of every 16 MiB of the files one after another, which several threads make.

    It finds any accident, and is no proof against somebody who means to deceive. ``on_part`` is told the share done.
    """

    def part(place: tuple[Path, int]) -> bytes:
        with place[0].open("rb") as opened:
            opened.seek(place[1])
            return xxhash.xxh3_128_digest(opened.read(_AT_ONCE))

    files = [files] if isinstance(files, Path) else list(files)
    sizes = [file.stat().st_size for file in files]
    places = [(file, start) for file, size in zip(files, sizes, strict=True) for start in range(0, size, _AT_ONCE)]
    digest = xxhash.xxh3_128(repr(sizes).encode())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for done, known in enumerate(threads.map(part, places), start=1):
            digest.update(known)
            on_part(done / len(places))
    return digest.hexdigest()
