"""After ``import ebft``, transformers loads compressed folders, whichever of the two is imported first.

transformers keeps its quantizers in a table, in a module that takes seconds to import. A finder at the front of
``sys.meta_path`` waits for that import (PEP 451), steps aside, and lets ours be entered once the module has run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

QUANTIZERS = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Enter our quantizer into transformers' table: at once if that is imported, or else as soon as it is."""
    if QUANTIZERS in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            loader, execute = spec.loader, spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register()

            loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one import
        return spec


def _register() -> None:
    from ebft.compressed.quantizer import register

    register()
