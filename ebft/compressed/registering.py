"""After ``import ebft``, transformers loads compressed folders and peft adapts them, whichever is imported first.

Both keep what they know of layers in modules that take seconds to import. A finder at the front of ``sys.meta_path``
waits for such an import (PEP 451), steps aside, and lets ours be entered once the module has run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

# Whose import is waited for -> our module, whose ``register`` then enters what it has.
WAITED_FOR = {
    "transformers.quantizers.auto": "ebft.compressed.quantizer",
    "peft.tuners.lora.model": "ebft.compressed.adapters",
}


def register_when_imported() -> None:
    """Let both know of us: at once where they are imported, or else as soon as they are."""
    for theirs, ours in WAITED_FOR.items():
        if theirs in sys.modules:
            _register(ours)
        elif not any(isinstance(finder, _Waiting) and finder.theirs == theirs for finder in sys.meta_path):
            sys.meta_path.insert(0, _Waiting(theirs, ours))


class _Waiting(MetaPathFinder):
    def __init__(self, theirs: str, ours: str) -> None:
        self.theirs, self.ours = theirs, ours

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.theirs:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            loader, execute = spec.loader, spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(self.ours)

            loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one import
        return spec


def _register(ours: str) -> None:
    import_module(ours).register()
