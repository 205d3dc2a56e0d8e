"""Activations that are made again in the backward pass, in place of being kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(function: Callable[..., Any], *args: Any, random: bool = False, **kwargs: Any) -> Any:
    """``function``, whose activations are made again in the backward pass; ``random``: with the same random numbers."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=random, **kwargs)


@contextlib.contextmanager
def recomputed(modules: Sequence[nn.Module], *, random: bool = False) -> Iterator[None]:
    """Recompute each of ``modules`` on its own while inside."""
    with contextlib.ExitStack() as undone_after:
        for module in modules:
            undone_after.enter_context(forward_replaced(module, partial(recompute, module.forward, random=random)))
        yield


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module`` does ``forward`` while inside."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
