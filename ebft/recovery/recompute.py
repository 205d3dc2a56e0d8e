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
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = partial(recompute, module.forward, random=random)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward
