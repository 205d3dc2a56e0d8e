"""RMSNorm, rotary embedding and SwiGLU of a block from liger-kernel (``pip install ebft[liger]``), on a GPU.

Between the products of a block, plain torch runs many small kernels. liger-kernel has these fused, and nothing of it
is rewritten here: in a block of a known family its functions take the places of the block's own;
parameters and all else stay.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")  # whose norm, rotary embedding and MLP are Llama's
ROTARY = "apply_rotary_pos_emb"


def liger_missing() -> str | None:
    """Why there is no liger-kernel; None where there is."""
    return None if find_spec("liger_kernel") else "liger-kernel is not installed (pip install ebft[liger])"


def fuse_(block: nn.Module) -> tuple[str, ...]:
    """Let liger-kernel run what it can of ``block``, in place; gives the names of that, none in other families.

    Modules become of a class of their own. (A forward on the instance would be a cycle, and the block's weights would
    stay in memory after it is done, until Python looks for cycles.)
    """
    liger = import_module("liger_kernel.transformers.functional")
    fused = set()
    for module in block.modules():
        own = type(module)
        family = next((family for family in FAMILIES if own.__name__.startswith(family)), None)
        kind = own.__name__.removeprefix(family or "")
        if family is None:
            continue
        if kind == "RMSNorm":
            module.__class__ = _norm(own, liger.liger_rms_norm)
            fused.add("RMSNorm")
        elif kind == "MLP" and "SiLU" in type(module.act_fn).__name__:
            module.__class__ = _swiglu(own, liger.liger_swiglu)
            fused.add("SwiGLU")
        elif kind == "Attention":
            module.__class__ = _with_rotary(own, liger.liger_rope)
            fused.add("rotary embedding")
    return tuple(sorted(fused))


def _subclass(own: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    return type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__})


def _norm(own: type[nn.Module], rms_norm: Callable[..., Tensor]) -> type[nn.Module]:
    def forward(norm: Any, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, norm.weight, norm.variance_epsilon, in_place=False)

    return _subclass(own, forward)


def _swiglu(own: type[nn.Module], swiglu: Callable[[Tensor, Tensor], Tensor]) -> type[nn.Module]:
    def forward(mlp: Any, hidden: Tensor) -> Tensor:
        return mlp.down_proj(swiglu(mlp.gate_proj(hidden), mlp.up_proj(hidden)))

    return _subclass(own, forward)


def _with_rotary(own: type[nn.Module], rope: Callable[..., tuple[Tensor, Tensor]]) -> type[nn.Module]:
    """The attention's own forward, with ``rope`` in the place of the function that its model file calls."""
    file = sys.modules[own.__module__]

    @wraps(own.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        files = getattr(file, ROTARY)
        setattr(file, ROTARY, _rotary(rope))
        try:
            return own.forward(*args, **kwargs)
        finally:
            setattr(file, ROTARY, files)

    return _subclass(own, forward)


def _rotary(rope: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        return rope(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    return rotate
