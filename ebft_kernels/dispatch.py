"""Which kernel runs an op: the one file that knows all back ends.

An op has one kernel for each implementation: ``torch`` always, ``native`` (csrc/) and ``triton`` where they exist. The first
that can run on what it is given is taken; the reason is what ``explain`` says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ebft_kernels._extension import native_reason
from ebft_kernels.ops import LIBRARY, NATIVE, SCHEMAS, TORCH_KERNELS

IMPLEMENTATIONS = ("auto", "triton", "native", "torch")
_LOG = logging.getLogger("ebft_kernels")


@dataclass(frozen=True)
class Choice:
    """What runs an op, and why.

    Attributes:
        op: the op's name.
        impl: ``torch``, ``native`` or ``triton``.
        reason: why this one and no other.
        fallback: a fused kernel exists for this op, but not here.
    """

    op: str
    impl: str
    reason: str
    fallback: bool = False

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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        use_impl._current = self._before


def explain(op: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Choice:
    """What would run ``op`` (``"masked_linear"``, ``"masked_adamw_step"`` …) on ``device`` now, and why.

    Raises:
        ValueError: there is no such op.
        RuntimeError: ``use_impl`` forces an implementation that cannot run there.
    """
    if op not in SCHEMAS:
        raise ValueError(f"explain got op {op!r}; expected one of {', '.join(SCHEMAS)}")
    return _choose(op, torch.device(device), dtype)


def _choose(op: str, device: torch.device, dtype: torch.dtype) -> Choice:
    forced = use_impl._current
    if forced == "torch":
        return Choice(op, "torch", "use_impl('torch') asks for it")
    missing = {"triton": _triton_missing(op, device), "native": _native_missing(op, device, dtype)}
    if forced != "auto":
        if missing[forced] is not None:
            raise RuntimeError(f"use_impl({forced!r}) cannot run {op} on {device.type}: {missing[forced]}")
        return Choice(op, forced, f"use_impl({forced!r}) asks for it")
    for impl, why in missing.items():
        if why is None:
            return Choice(op, impl, f"the fused kernel for {device.type}")
    return Choice(op, "torch", missing["native" if device.type == "cpu" else "triton"] or "", fallback=op in NATIVE)


def _triton_missing(op: str, device: torch.device) -> str | None:
    """Why Triton cannot run ``op``; None where it can."""
    return f"there is no Triton kernel for {device.type} in this version"


def _native_missing(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the native library cannot run ``op``; None where it can. Builds the library if it is not there yet."""
    if op not in NATIVE:
        return f"torch's own product is the best there is on {device.type}"
    if device.type != "cpu":
        return f"there is no native kernel for {device.type} in this version"
    if dtype == torch.float64:
        return "the native kernels do not take float64"
    return native_reason()


_announced: set[str] = set()  # device types whose fallback to torch has been said


def _install(op: str) -> None:
    """Make the chooser the op's kernel on every device."""
    kernels: dict[str, Callable[..., Any]] = {"torch": TORCH_KERNELS[op]}
    if op in NATIVE:
        kernels["native"] = getattr(torch.ops.ebft_kernels, op).native

    def kernel(*args: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        choice = _choose(op, first.device, first.dtype)
        if choice.fallback and use_impl._current == "auto" and first.device.type not in _announced:
            _announced.add(first.device.type)
            _LOG.warning("%s", choice)
        return kernels[choice.impl](*args)

    LIBRARY.impl(op, kernel, "CompositeExplicitAutograd")


for _op in SCHEMAS:
    _install(_op)
