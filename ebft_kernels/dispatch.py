"""Which kernel runs an op: the one file that knows all back ends.

An op has one kernel for each implementation: ``torch`` always, ``native`` (csrc/) and ``triton`` (_triton/) where
they exist. The first that can run on what it is given is taken; the reason is what ``explain`` says. The products of
a masked linear layer are another matter, because torch's are hard to beat: Triton's take their place only where they
were measured to be faster.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ebft_kernels import derivatives  # noqa: F401 - registers them
from ebft_kernels._extension import native_reason
from ebft_kernels._triton import configs
from ebft_kernels.adamw import AdamWStep
from ebft_kernels.ops import LIBRARY, NATIVE, OF_A_STEP, SCHEMAS, TORCH_KERNELS

IMPLEMENTATIONS = ("auto", "triton", "native", "torch")
NATIVE_ON_CUDA = ("compressed_linear", "masked_adamw_step")  # csrc/cuda/
PRODUCTS = ("masked_linear", "masked_linear_dx", "masked_linear_dw")
# What is worth a word where it runs in torch on a GPU.
FUSED = (
    "masked_adamw_step",
    "masked_grad_norm",
    "masked_dw_adamw_step",
    "reconstruction_loss",
    "zero_pruned",
    "zero_pruned_",
)
SPARSE = ("gather_kept", "sparse_linear", "sparse_linear_dx", "sparse_linear_dw")  # of kept weights alone
MULTIPLY = (*PRODUCTS, "masked_dw_adamw_step")
TRITON = {  # op -> file of _triton/ that has its launcher
    "pack_mask": "masks",
    "unpack_mask": "masks",
    "nm_mask": "masks",
    "is_nm": "masks",
    "row_offsets": "masks",
    "zero_pruned": "masks",
    "zero_pruned_": "masks",
    **dict.fromkeys(PRODUCTS, "masked_linear"),
    "reconstruction_loss": "loss",
    "masked_grad_norm": "grad_norm",
    "masked_adamw_step": "masked_adamw",
    "masked_dw_adamw_step": "masked_dw_adamw",
}
SPARSE_MEASURED = Path(__file__).parent / "sparse_measured.json"  # python -m benchmarks.sparse_table --write
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        use_impl._current = self._before


def explain(
    op: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    tokens: int = 8192,
    zeroed: bool = True,
    shape: tuple[int, int] | None = None,
    density: float = 1.0,
) -> Choice:
    """What would run ``op`` (``"masked_linear"``, ``"masked_adamw_step"`` …) on ``device`` now, and why.

    Args:
        dtype: of the op's tensors.
        tokens, zeroed: of a masked linear layer's products: rows of x, and whether the weight is known to hold zeros.
        shape, density: of a ``MaskedLinear``'s weight (N, K) on a CPU, and the share that its mask keeps: whether its
            products skip zeros.

    Raises:
        ValueError: there is no such op.
        RuntimeError: ``use_impl`` forces an implementation that cannot run there.
    """
    if op not in SCHEMAS:
        raise ValueError(f"explain got op {op!r}; expected one of {', '.join(SCHEMAS)}")
    if op in PRODUCTS and torch.device(device).type == "cpu" and zeroed and shape is not None:
        choice = skips_zeros(shape, density, tokens, dtype)
        if choice.fused:
            return Choice(op, choice.impl, choice.reason)
        if use_impl._current == "auto":
            return Choice(op, "torch", choice.reason)
    return _choose(op, torch.device(device), (torch.empty(0, dtype=dtype),), tokens, zeroed)


def skips_zeros(shape: tuple[int, int], density: float, tokens: int, dtype: torch.dtype) -> Choice:
    """Whether a masked layer on a CPU multiplies kept weights alone (``native``) or densely (``torch``): by measured
    times. The weight is ``shape``, and its mask keeps ``density`` of it.
    """
    op = "sparse_linear"
    if use_impl._current in ("torch", "triton"):
        return Choice(op, "torch", f"use_impl({use_impl._current!r}) asks for no sparse product")
    if dtype != torch.float32:
        return Choice(op, "torch", "the sparse product takes float32")
    if (missing := native_reason()) is not None:
        return Choice(op, "torch", missing, fallback=True)
    if use_impl._current == "native":
        return Choice(op, "native", "use_impl('native') asks for it")
    kind = cpu_kind()
    table = sparse_measured().get(kind)
    if table is None:
        return Choice(op, "torch", f"nothing has been measured on {kind} (python -m benchmarks.sparse_table --write)")
    if min(shape) < table["least_side"]:
        return Choice(op, "torch", f"the least that was measured on {kind} is a side of {table['least_side']}")
    least = [(int(count), share) for count, share in table["sparsity"].items() if int(count) <= tokens]
    if not least:
        return Choice(op, "torch", f"for {tokens} tokens the dense product was measured to be faster on {kind}")
    count, share = max(least)
    faster = (
        f"on {kind} products that skip zeros were measured to be faster with {share:.0%} zeros from {count} tokens on"
    )
    given = f"here are {1 - density:.0%} and {tokens}"
    return Choice(op, "native" if 1 - density >= share else "torch", f"{faster}; {given}")


@functools.cache
def sparse_measured() -> dict[str, Any]:
    """What ``python -m benchmarks.sparse_table --write`` measured: ``cpu_kind()`` -> least tokens -> least sparsity."""
    return json.loads(SPARSE_MEASURED.read_text(encoding="utf-8")) if SPARSE_MEASURED.is_file() else {}


def cpu_kind() -> str:
    """The instruction set of torch's products and of ours, on which it depends which are faster."""
    lesser = os.environ.get("EBFT_CPU")
    return torch.backends.cpu.get_cpu_capability() + (f" with EBFT_CPU={lesser}" if lesser else "")


def _choose(op: str, device: torch.device, args: tuple[Any, ...], tokens: int = 0, zeroed: bool = False) -> Choice:
    forced = use_impl._current
    if forced == "torch":
        return Choice(op, "torch", "use_impl('torch') asks for it")
    dtype = _dtype(args)
    missing = {"triton": _triton_missing(op, device, dtype), "native": _native_missing(op, device, dtype, args)}
    if forced != "auto":
        if missing[forced] is not None:
            raise RuntimeError(f"use_impl({forced!r}) cannot run {op} on {device.type}: {missing[forced]}")
        return Choice(op, forced, f"use_impl({forced!r}) asks for it")
    if op in PRODUCTS and missing["triton"] is None:
        return _faster_product(op, device, dtype, tokens, zeroed and op != "masked_linear_dw")
    # On a GPU native kernels are there for few cases, and at least as fast (docs/kernels.md).
    for impl in ("native", "triton"):
        if missing[impl] is None:
            return Choice(op, impl, f"the fused kernel for {device.type}")
    first = "native" if device.type == "cpu" else "triton"
    return Choice(op, "torch", missing[first] or "", fallback=op in (NATIVE if first == "native" else FUSED))


def _faster_product(op: str, device: torch.device, dtype: torch.dtype, tokens: int, zeroed: bool) -> Choice:
    """cuBLAS on the zeroed weight, the mask multiply and cuBLAS, or the masked Triton product: by measured times."""
    name, shape = torch.cuda.get_device_name(device), configs.shape_class(tokens)
    rival = "cuBLAS on the zeroed weight" if zeroed else "the mask multiply and cuBLAS"
    times = configs.measured().get(name, {}).get("products", {}).get(f"{op}/{shape}/{dtype.itemsize}")
    if times is None:
        return Choice(op, "torch", f"{rival}: nothing has been measured on {name} (python -m benchmarks.tune)")
    ours, theirs = times["triton"], times["zeroed" if zeroed else "multiply"]
    measured = f"for {shape} tokens {name} takes {ours:.3g} ms in Triton and {theirs:.3g} ms with {rival}"
    return Choice(op, "triton" if ours < theirs else "torch", measured)


def _triton_missing(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton cannot run ``op``; None where it can."""
    if op not in TRITON:
        return f"there is no Triton kernel for {op}"
    if dtype == torch.float64:
        return "the Triton kernels do not take float64"
    if device.type not in ("cuda", "cpu"):
        return f"there is no Triton kernel for {device.type}"
    if device.type == "cpu":
        if use_impl._current != "triton" or os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton kernels need a GPU (TRITON_INTERPRET=1 runs them on a CPU, to test them)"
        if op in MULTIPLY and dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 wrongly"
        return _triton_absent()
    return _triton_absent() or _too_old(device, op, dtype)


@functools.cache
def _triton_absent() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


@functools.cache
def _too_old(device: torch.device, op: str, dtype: torch.dtype) -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU here"
    capability = torch.cuda.get_device_capability(device)
    if op in MULTIPLY and capability < (8, 0):
        return "Triton's products use tensor cores from compute capability 8.0 on"
    least = (8, 0) if dtype == torch.bfloat16 else (7, 5)
    given = f"{dtype} on compute capability {capability[0]}.{capability[1]}"
    return None if capability >= least else f"the Triton kernels do not run {given}; they need {least[0]}.{least[1]}"


def _native_missing(op: str, device: torch.device, dtype: torch.dtype, args: tuple[Any, ...]) -> str | None:
    """Why the native library cannot run ``op``; None where it can. Builds the library if it is not there yet."""
    if op in PRODUCTS:
        return f"torch's own product is the best there is on {device.type}"
    if op not in NATIVE:
        return f"there is no native kernel for {op}"
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and op not in NATIVE_ON_CUDA):
        return f"there is no native kernel for {device.type}"
    if dtype == torch.float64:
        return "the native kernels do not take float64"
    if op in SPARSE and any(t.is_floating_point() and t.dtype != torch.float32 for t in _tensors(args)):
        return "the native kernel takes float32"
    if op in ("masked_adamw_step", "zero_pruned_", "gather_kept") and not all(
        t.is_contiguous() for t in _tensors(args)
    ):
        return "the native kernel takes contiguous tensors"
    if (reason := native_reason()) is not None or device.type == "cpu":
        return reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"ebft_kernels::{op}.native", "CUDA"):
        return "the native library was built without CUDA"
    dtypes = {t.dtype for t in _tensors(args)}
    if op == "compressed_linear" and torch.int8 in dtypes:
        return "the CUDA kernel takes no 8-bit values"
    if op == "masked_adamw_step" and len(args) > 1:
        adamw = AdamWStep(*args)
        compact = all(offsets.numel() for offsets in adamw.row_offsets)
        if adamw.stochastic or not compact or any(m.dtype != torch.float32 for m in adamw.exp_avgs):
            return "the CUDA kernel takes survivor-only float32 states"
    return None


_announced: set[str] = set()  # reasons for falling back to torch that have been said


def _install(op: str) -> None:
    """Make the chooser the op's kernel on every device."""
    kernels: dict[str, Callable[..., Any]] = {"torch": _from_arguments(op, TORCH_KERNELS[op])}
    overloads = getattr(torch.ops.ebft_kernels, op)
    if op in NATIVE:
        kernels["native"] = overloads.native
    written = [
        n for n, arg in enumerate(overloads.default._schema.arguments) if arg.alias_info and arg.alias_info.is_write
    ]

    def kernel(*args: Any) -> Any:
        first = next(_tensors(args), None)
        if first is None:  # lists of none
            if written:
                return None
            raise ValueError(f"{op} got no tensors; expected at least one")
        if written and first.is_neg():
            raise ValueError(f"{op} got a negated view; expected a tensor of its own numbers")
        tokens = first.shape[:-1].numel() if op in PRODUCTS else 0
        zeroed = op in ("masked_linear", "masked_linear_dx") and bool(args[-1])
        choice = _choose(op, first.device, args, tokens, zeroed)
        if choice.fallback and use_impl._current == "auto" and choice.reason not in _announced:
            _announced.add(choice.reason)
            _LOG.warning("%s", choice)
        if choice.impl == "triton" and "triton" not in kernels:  # triton is imported when it is first wanted
            launchers = importlib.import_module(f"ebft_kernels._triton.{TRITON[op]}")
            kernels["triton"] = _from_arguments(op, getattr(launchers, op))
        result = kernels[choice.impl](*args)
        if choice.fused and written:  # torch's own operations count themselves; writing through a pointer does not
            changed = _tensors([args[n] for n in written])
            torch.autograd.graph.increment_version([tensor for tensor in changed if not tensor.is_inference()])
        return result

    LIBRARY.impl(op, kernel, "CompositeExplicitAutograd")


def _from_arguments(op: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel written in Python, as the op calls it: with the fields of a step, not the object."""
    if op not in OF_A_STEP:
        return kernel
    count = len(AdamWStep._fields)
    return lambda *args: kernel(*args[:-count], AdamWStep(*args[-count:]))


def _tensors(args: Any) -> Iterator[Tensor]:
    """All tensors among an op's arguments."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from (item for item in arg if isinstance(item, Tensor))


def _dtype(args: Any) -> torch.dtype:
    """float64 where any of an op's tensors is that (a scalar does not count), otherwise the first one's."""
    tensors = list(_tensors(args))
    double = any(tensor.dtype == torch.float64 for tensor in tensors if tensor.ndim)
    return torch.float64 if double else tensors[0].dtype


for _op in SCHEMAS:
    _install(_op)
