"""Importing torch and transformers, which takes seconds, in somewhat less of them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console


@contextmanager
def importing(*, quiet: bool = False) -> Iterator[None]:
    """Around imports of thousands of modules: hardly anything of these is garbage, which Python looks for every time.

    Nor is it looked for among them later on. docs/measured.md has what that takes. A terminal shows what is going on
    for as long as it lasts, unless ``quiet``.
    """
    console = Console(stderr=True, quiet=quiet)
    first = "torch" not in sys.modules and gc.isenabled()
    if first:
        gc.disable()
    try:
        with console.status("importing torch and transformers") if first and console.is_terminal else nullcontext():
            yield
    finally:
        if first:
            gc.enable()
            gc.freeze()
