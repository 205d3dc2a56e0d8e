"""Layers whose weight other modules read, as Mamba's scan does with ``self.dt_proj.weight``: they have to keep one.

The code of the model's own classes is read, not run: what is only done on a GPU, or with a cache, counts too.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

_AT_BIRTH = ("__init__", "_init_weights", "reset_parameters")


def read_by_others(model: nn.Module) -> set[str]:
    """Names of the modules of ``model`` whose ``.weight`` is read by the code of another one."""
    modules = dict(model.named_modules())
    reads = {kind: _reads(kind) for kind in set(map(type, modules.values()))}
    found: set[str] = set()
    for place, module in modules.items():
        inside = f"{place}." if place else ""
        for read in reads[type(module)]:
            found |= {name for name in modules if name.startswith(inside) and f".{name}".endswith(f".{read}")}
    return found


def _reads(kind: type[nn.Module]) -> set[str]:
    """``b`` and ``c.d`` for a class in whose methods ``self.b.weight`` and ``block.c.d.weight`` stand."""
    found: set[str] = set()
    for base in kind.__mro__:
        if not issubclass(base, nn.Module) or base.__module__.startswith("torch."):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # made while running: it has no file
            continue
        for method in ast.walk(tree):
            if isinstance(method, ast.FunctionDef) and method.name not in _AT_BIRTH:
                found.update(_of(method))
    return found


def _of(method: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr == "weight":
            path, owner = [], node.value
            while isinstance(owner, ast.Attribute):
                path.append(owner.attr)
                owner = owner.value
            if path:
                yield ".".join(reversed(path))
