"""What can be known of the Triton kernels without a GPU: every kernel x config x architecture, compiled and looked into.

    python -m benchmarks.static_report                      # everything, into benchmarks/results/static/
    python -m benchmarks.static_report --default --arch 80 90 --out DIR

What is compiled is what would be launched: the launchers run on tensors without values, and each launch is recorded in place of
being done. A verdict a line; exit status 1 if any fails. Compiled kernels never run here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from ebft_kernels._triton import common, grad_norm, masked_adamw, masked_linear, masks
from ebft_kernels._triton.configs import CAPABILITIES, SHARED_MEMORY, Config
from ebft_kernels.testing import ADAMW_LAYOUTS

META = torch.device("meta")
NUMBERS = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
    torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
TENSOR_CORES = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
PIPELINE = re.compile(r"\b(cp\.async\.cg|cp\.async\.ca|cp\.async\.bulk)\b")
STACK_ALLOWED = 0  # bytes, in kernels that multiply matrices; others may not use any either


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    config: Config
    exact: bool


@dataclass(frozen=True)
class Case:
    """A way to call a launcher.

    Attributes:
        kernel: the kernel's name.
        variant: what distinguishes this case, in words.
        run: calls the launcher on tensors without values.
        product: it multiplies matrices: tensor cores and a software pipeline are expected.
        dtype: of the operands.
    """

    kernel: str
    variant: str
    run: Callable[[], Any]
    product: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Facts:
    """What compiling a case for an architecture showed."""

    kernel: str
    variant: str
    arch: int
    config: str
    registers: int
    stack: int
    shared: int
    tensor_cores: str
    pipeline: str
    widest_load: int
    seconds: float
    failures: tuple[str, ...]


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without values."""
    return torch.empty(shape, dtype=dtype, device=META)


def cases(arch: int) -> Iterator[Case]:
    """Everything that may be launched on an architecture."""
    dtypes = [torch.float16] if arch < 80 else [torch.bfloat16, torch.float16, torch.float32]
    for dtype in dtypes:
        yield from product_cases(dtype)
    for dtype in dtypes:
        yield from adamw_cases(dtype)
    yield from mask_cases(dtypes[0])


def product_cases(dtype: torch.dtype) -> Iterator[Case]:
    """The three products, in each shape class; ragged, and with a list of tiles."""
    name = NUMBERS[dtype]
    for shape, tokens in (("few", 16), ("some", 128), ("many", 8192)):
        for ragged in (False, True):
            n, k = (4000, 11000) if ragged else (4096, 4096)
            t = tokens - 3 if ragged else tokens
            x, dy, weight = (empty(*size, dtype=dtype) for size in ((t, k), (t, n), (n, k)))
            words, bias = empty(n, common.cdiv(k, 32), dtype=torch.int32), empty(n, dtype=dtype)
            what = f"{name}, {shape} tokens" + (", ragged" if ragged else "")
            for skip in (False, True):
                lines = with_lines(skip)
                listed = what + (", list of tiles" if skip else "")
                yield Case(
                    "product_kernel", f"forward, {listed}",
                    lines(lambda x=x, w=weight, m=words, b=bias: masked_linear.masked_linear(x, w, m, b, False)), True, dtype,
                )  # fmt: skip
                yield Case(
                    "product_kernel", f"dx, {listed}",
                    lines(lambda dy=dy, w=weight, m=words: masked_linear.masked_linear_dx(dy, w, m, False)), True, dtype,
                )  # fmt: skip
            yield Case(
                "gradient_kernel", f"dW, {what}",
                lambda dy=dy, x=x, m=words: masked_linear.masked_linear_dw(dy, x, m), True, dtype,
            )  # fmt: skip


def adamw_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Every layout of the states; once more where the rows are no whole mask words."""
    for weights, moments, compact in ADAMW_LAYOUTS:
        if dtype not in {"fp32": [torch.float32], "stochastic": [torch.bfloat16]}.get(weights, [torch.bfloat16, torch.float16]):
            continue
        for width in (4096, 4001):
            what = f"{NUMBERS[dtype]}, {weights} weights, {moments} moments" + ("" if width == 4096 else ", ragged")
            lists = adamw_lists_like(4096, width, dtype, weights, moments, compact)
            numbers = (None, 1e-3, 0.9, 0.95, 1e-8, 0.1, 3, weights == "stochastic", 0, [0], False)
            yield Case(
                "compact_kernel" if compact else "dense_kernel", what,
                lambda lists=lists, numbers=numbers: masked_adamw.masked_adamw_step(*lists, *numbers), False, dtype,
            )  # fmt: skip


def adamw_lists_like(n: int, k: int, dtype: torch.dtype, weights: str, moments: str, compact: bool) -> list[list[Tensor]]:
    """The lists of ``masked_adamw_step`` for one matrix, half of it pruned, without values."""
    shape = (n * k // 2,) if compact else (n, k)
    kinds = {"fp32": (torch.float32,) * 2, "bf16": (torch.bfloat16,) * 2, "int8": (torch.int8, torch.uint8)}[moments]
    m, v = (empty(*shape, dtype=kind) for kind in kinds)
    scales = [empty(common.cdiv(m.numel(), 256) if moments == "int8" else 0, dtype=torch.float32) for _ in range(2)]
    master = empty(*(shape if weights == "master" else (0,)), dtype=torch.float32)
    words = empty(n, common.cdiv(k, 32), dtype=torch.int32)
    offsets = empty(n + 1 if compact else 0, dtype=torch.int64)
    param, grad = empty(n, k, dtype=dtype), empty(n, k, dtype=dtype)
    return [[tensor] for tensor in (param, grad, m, v, *scales, master, words, offsets)]


def mask_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Masks and the gradient norm."""
    mask, scores = empty(4096, 4096, dtype=torch.bool), empty(4096, 4096, dtype=dtype)
    words = empty(4096, 128, dtype=torch.int32)
    runs: dict[str, Callable[[], Any]] = {
        "pack_kernel": lambda: masks.pack_mask(mask),
        "unpack_kernel": lambda: masks.unpack_mask(words, 4096),
        "count_kernel": lambda: masks.row_offsets(words),
        "nm_kernel": lambda: masks.nm_mask(scores, 2, 4),
        "nm_check_kernel": lambda: masks.is_nm(words, 4096, 2, 4),
        "squares_kernel": lambda: grad_norm.masked_grad_norm([scores], [words]),
        "total_kernel": lambda: grad_norm.masked_grad_norm([scores], [words]),
    }
    for kernel, run in runs.items():
        yield Case(kernel, NUMBERS[dtype], run, False, dtype)


def with_lines(skip: bool) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Run a launcher as if some tiles of its mask were empty, or none."""
    tiles = importlib.import_module("ebft_kernels._triton.tiles")
    numbers = tiles.TileLines(empty(64, 64, dtype=torch.int32), empty(64, dtype=torch.int32)) if skip else None

    def wrap(run: Callable[[], Any]) -> Callable[[], Any]:
        def inside() -> Any:
            with mock.patch.object(tiles, "lines_of", lambda *_: numbers):
                return run()

        return inside

    return wrap


def recorded(case: Case, arch: int) -> list[Launch]:
    """The launches that ``case`` would do on a device of capability ``arch``."""
    launches: list[Launch] = []

    def record(
        kernel: Any, grid: int, arguments: Any, config: Config, device: torch.device, exact: bool = False, **constants: Any
    ) -> None:
        launches.append(Launch(kernel, tuple(arguments), {**constants, **config.tiles}, config, exact))

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(common, "launch", record))
        patches.enter_context(mock.patch.object(common, "capability", lambda device: arch))
        case.run()
    return launches


def compile_for(launch: Launch, arch: int) -> Any:
    """The compiled kernel, specialised as Triton would specialise it at launch."""
    source = importlib.import_module("triton.compiler").ASTSource
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", arch, 32)
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.constants
    for place, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value, free = given[name], not parameter.do_not_specialize
        if name in launch.constants or value is None or (free and isinstance(value, int) and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[(place,)] = f"*{NUMBERS[value.dtype]}", [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if free and value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    options = {
        "num_warps": launch.config.warps, "num_stages": launch.config.stages, "enable_fp_fusion": not launch.exact
    }  # fmt: skip
    return triton.compile(source(launch.kernel, signature, constants, attributes), target=target, options=options)


def facts_of(case: Case, arch: int) -> Facts:
    """Compile the launch that ``case`` is about and look into it."""
    began = time.perf_counter()
    launch = next(launch for launch in recorded(case, arch) if launch.kernel.__name__ == case.kernel)
    compiled = compile_for(launch, arch)
    seconds = time.perf_counter() - began
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        used = subprocess.run([cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{what}:(\d+)", used)[1]) for what in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    shared = compiled.metadata.shared
    cores = sorted(set(TENSOR_CORES.findall(ptx)))
    pipeline = sorted(set(PIPELINE.findall(ptx)))
    loads = [int(count or 1) * int(bits) for count, bits in re.findall(r"ld\.global[.\w]*?(?:\.v(\d))?\.[bfus](\d+)", ptx)]
    failures = []
    if stack > STACK_ALLOWED or local:
        failures.append(f"{stack + local} bytes of stack")
    if shared > SHARED_MEMORY[arch] * 1024:
        failures.append(f"{shared} bytes of shared memory, {SHARED_MEMORY[arch]} KiB are there")
    if case.product and case.dtype != torch.float32 and not cores:
        failures.append("no tensor cores")
    if case.product and arch >= 80 and "ragged" not in case.variant and not pipeline:
        failures.append("not pipelined")
    return Facts(
        case.kernel, case.variant, arch, str(launch.config), registers, stack + local, shared,
        ", ".join(cores), ", ".join(pipeline), max(loads, default=0), round(seconds, 1), tuple(failures),
    )  # fmt: skip


def cuobjdump() -> str:
    """The tool that comes with triton."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def main() -> int:
    """Compile, print a verdict a line, write the tables; 1 if any verdict is bad."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(CAPABILITIES), choices=CAPABILITIES)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    given = parser.parse_args()
    rows = []
    for arch in given.arch:
        for case in cases(arch):
            if given.only not in f"{case.kernel}: {case.variant}":
                continue
            facts = facts_of(case, arch)
            rows.append(facts)
            verdict = "FAIL " + "; ".join(facts.failures) if facts.failures else "ok"
            print(f"sm_{arch} {case.kernel}: {case.variant} [{facts.config}] {facts.registers} registers, {facts.stack} B stack, {facts.shared} B shared, {facts.tensor_cores}, {facts.pipeline}, load {facts.widest_load} {facts.seconds}s: {verdict}", flush=True)
    return int(any(facts.failures for facts in rows))


if __name__ == "__main__":
    sys.exit(main())
