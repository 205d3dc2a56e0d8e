"""Importing torch and transformers, which takes seconds, in somewhat less of them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Around imports of thousands of modules: hardly anything of these is garbage, which Python looks for every time.

    Nor is it looked for among them later on. docs/measured.md has what that takes.
    """
    first = "torch" not in sys.modules and gc.isenabled()
    if first:
        gc.disable()
    try:
        yield
    finally:
        if first:
            gc.enable()
            gc.freeze()
