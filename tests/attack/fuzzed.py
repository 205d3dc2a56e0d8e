"""Fuzzed kernels and checkpoints: the random tests of native ops and damaged files, with a new seed and more cases."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

from tests.attack.arena import Arena
from tests.attack.case import Case
from tests.attack.victim import Ended, Fallen

_ROOT = Path(__file__).parents[2]
_KERNEL_CASES = 1700  # on each code path
_SECONDS = 900


def cases(rounds: int) -> Iterator[Case]:
    """Files first, which take longest."""
    yield Case("damaged config.json and model.safetensors", partial(_damaged_files, rounds))
    for path in ("best", "avx2", "plain"):
        yield Case(f"native ops, the {path} path", partial(_kernels, path))


def _damaged_files(examples: int, arena: Arena, folder: Path, random: Random) -> int:
    seed = f"--hypothesis-seed={random.randrange(2**31)}"
    said = _pass("-m", "pytest", "-q", "-x", "--hypothesis-show-statistics", seed, "tests/loop/test_damaged.py",
                 EBFT_EXAMPLES=str(examples))  # fmt: skip
    return sum(map(int, re.findall(r"(\d+) passing", said)))


def _kernels(path: str, arena: Arena, folder: Path, random: Random) -> int:
    """Answers are the reference's, outputs are written, and nothing is read that was not given: or it ends at once."""
    last, seed = folder / "last", str(random.randrange(2**31))
    flags = ("--cases", str(_KERNEL_CASES), "--seed", seed, "--last", str(last))
    try:
        _pass("tests/native/hostile.py", *flags, EBFT_CPU=path)
    except Fallen as fallen:
        raise Fallen(f"{fallen}; the last case: {last.read_text() if last.exists() else 'none'}") from None
    return _KERNEL_CASES


def _pass(*arguments: str, **environment: str) -> str:
    """What a Python process says, which ends well."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    if done.returncode:
        raise Fallen(str(Ended(done.returncode, done.stdout + done.stderr)))
    return done.stdout
