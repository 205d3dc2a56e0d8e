"""Which kernel runs an op: the one file that knows all back ends.

An op has one kernel for each implementation (``torch`` always; ``native`` and ``triton`` where they exist). The first
that can run on the tensors' device is taken; the reason is what ``explain`` says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from ebft_kernels.ops import LIBRARY, SCHEMAS, TORCH_KERNELS

IMPLEMENTATIONS = ("auto", "triton", "native", "torch")
_LOG = logging.getLogger("ebft_kernels")


@dataclass(frozen=True)
class Choice:
    """What runs an op on a device, and why.

    Attributes:
        op: the op's name.
        impl: ``torch``, ``native`` or ``triton``.
        reason: a sentence's worth of why this one and no other.
    """

    op: str
    impl: str
    reason: str

    @property
    def fused(self) -> bool:
        """Mask and arithmetic run in one kernel (``native`` or ``triton``)."""
        return self.impl != "torch"

    def __str__(self) -> str:
        return f"{self.op} runs in {self.impl}: {self.reason}"


class use_impl:
    """Choose the implementation of every op: ``"auto"`` (the best there is), ``"triton"``, ``"native"`` or ``"torch"``.

    ``use_impl("torch")`` lasts until the next call; ``with use_impl("torch"):`` lasts until the block ends. One that
    cannot run raises ``RuntimeError`` with the reason where an op is called: a forced choice never falls back.
    """

    _current = "auto"

    def __init__(self, impl: str) -> None:
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"use_impl got {impl!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
        self._before, use_impl._current = use_impl._current, impl

    def __enter__(self) -> use_impl:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        use_impl._current = self._before


def explain(op: str, device: torch.device | str = "cpu") -> Choice:
    """What would run ``op`` (``"masked_linear"``, ``"masked_adamw_step"`` …) on ``device`` now, and why.

    Raises:
        ValueError: there is no such op.
        RuntimeError: ``use_impl`` forces an implementation that cannot run there.
    """
    if op not in SCHEMAS:
        raise ValueError(f"explain got op {op!r}; expected one of {', '.join(SCHEMAS)}")
    device, forced = torch.device(device), use_impl._current
    if forced == "torch":
        return Choice(op, "torch", "use_impl('torch') asks for it")
    missing = f"there is no fused kernel for {device.type} in this version"
    if forced != "auto":
        raise RuntimeError(f"use_impl({forced!r}) cannot run {op} on {device.type}: {missing}")
    return Choice(op, "torch", missing)


_announced: set[str] = set()  # device types whose fallback to torch has been said


def _install(op: str) -> None:
    """Make the chooser the op's kernel on every device."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        device = _device_of(args)
        choice = explain(op, device)
        if not choice.fused and use_impl._current == "auto" and device.type not in _announced:
            _announced.add(device.type)
            _LOG.warning("%s", choice)
        return _KERNELS[choice.impl][op](*args, **kwargs)

    LIBRARY.impl(op, kernel, "CompositeExplicitAutograd")


def _device_of(args: tuple[Any, ...]) -> torch.device:
    first = args[0]
    return first.device if isinstance(first, torch.Tensor) else first[0].device


_KERNELS: dict[str, dict[str, Callable[..., Any]]] = {"torch": TORCH_KERNELS}

for _op in SCHEMAS:
    _install(_op)
