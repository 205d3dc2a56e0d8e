"""Small files that are whole or not there, and know when they are not what was written."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from ebft.errors import EBFTError
from ebft.files import read_json

SUMMARY, LINES = "ebft_summary.json", "blocks.jsonl"
WORKING = ".ebft-working"  # is there from a run's first moment to its last, and says what the run was begun with
COMMITS = "commits"  # the folder of records of what is finished
TEMPORARY = ".new"


def finished_folder(output: str) -> Path:
    """The folder of a finished run; ``EBFTError`` if it is none."""
    folder = Path(output).expanduser()
    if not (folder / SUMMARY).is_file() or not (folder / "config.json").is_file():
        raise EBFTError(f"{output} holds no {SUMMARY} and config.json; expected the folder of a finished run")
    return folder


def write_whole(file: Path, content: str) -> None:
    """Write a file so that, whatever happens, it is there as a whole or as it was."""
    temporary = file.with_name(file.name + TEMPORARY)
    temporary.write_text(content, encoding="utf-8")
    sync(temporary)
    temporary.replace(file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Have what was written to a file or folder on the disk, where a loss of power leaves it alone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def sealed(record: dict[str, Any]) -> str:
    """JSON with a checksum of itself."""
    return json.dumps({**record, "sha256": digest_of(record)}) + "\n"


def unsealed(file: Path) -> dict[str, Any] | None:
    """What ``sealed`` made; None if it is not that any more."""
    try:
        record = read_json(file, file.name)
        return record if record.pop("sha256") == digest_of(record) else None
    except (ValueError, AttributeError, KeyError, TypeError):
        return None


def digest_of(content: Any) -> str:
    """SHA-256 of something that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def finite(value: Any) -> Any:
    """Infinity and NaN, which JSON has no words for, as null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
