"""Which kernel runs an op: the one file that knows all back ends.

An op has one kernel for each implementation: ``torch`` always, ``native`` (csrc/) and ``triton`` where they exist. The first
that can run on what it is given is taken; the reason is what ``explain`` says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ebft_kernels._extension import native_reason
from ebft_kernels.ops import LIBRARY, NATIVE, SCHEMAS, TORCH_KERNELS

IMPLEMENTATIONS = ("auto", "triton", "native", "torch")
NATIVE_ON_CUDA = ("compressed_linear", "masked_adamw_step")  # csrc/cuda/
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
    return _choose(op, torch.device(device), (torch.empty(0, dtype=dtype),))


def _choose(op: str, device: torch.device, args: tuple[Any, ...]) -> Choice:
    forced = use_impl._current
    if forced == "torch":
        return Choice(op, "torch", "use_impl('torch') asks for it")
    missing = {"triton": _triton_missing(op, device), "native": _native_missing(op, device, args)}
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


def _native_missing(op: str, device: torch.device, args: tuple[Any, ...]) -> str | None:
    """Why the native library cannot run ``op``; None where it can. Builds the library if it is not there yet."""
    if op not in NATIVE:
        return f"torch's own product is the best there is on {device.type}"
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and op not in NATIVE_ON_CUDA):
        return f"there is no native kernel for {device.type}"
    if any(t.dtype == torch.float64 for t in _tensors(args)):
        return "the native kernels do not take float64"
    if op == "masked_adamw_step" and not all(t.is_contiguous() for t in _tensors(args)):
        return "the native kernel takes contiguous tensors"
    if (reason := native_reason()) is not None or device.type == "cpu":
        return reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"ebft_kernels::{op}.native", "CUDA"):
        return "the native library was built without CUDA"
    dtypes = {t.dtype for t in _tensors(args)}
    if op == "compressed_linear" and torch.int8 in dtypes:
        return "the CUDA kernel takes no 8-bit values"
    if op == "masked_adamw_step" and len(args) > 1:
        moments, row_offsets, stochastic = args[2], args[8], args[16]
        if stochastic or not all(t.numel() for t in row_offsets) or any(t.dtype != torch.float32 for t in moments):
            return "the CUDA kernel takes survivor-only float32 states"
    return None


_announced: set[str] = set()  # reasons for falling back to torch that have been said


def _install(op: str) -> None:
    """Make the chooser the op's kernel on every device."""
    kernels: dict[str, Callable[..., Any]] = {"torch": TORCH_KERNELS[op]}
    if op in NATIVE:
        kernels["native"] = getattr(torch.ops.ebft_kernels, op).native

    def kernel(*args: Any) -> Any:
        choice = _choose(op, next(_tensors(args)).device, args)
        if choice.fallback and use_impl._current == "auto" and choice.reason not in _announced:
            _announced.add(choice.reason)
            _LOG.warning("%s", choice)
        return kernels[choice.impl](*args)

    LIBRARY.impl(op, kernel, "CompositeExplicitAutograd")


def _tensors(args: Any) -> Iterator[Tensor]:
    """All tensors among an op's arguments."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from (item for item in arg if isinstance(item, Tensor))


for _op in SCHEMAS:
    _install(_op)
