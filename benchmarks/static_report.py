"""What can be known of the Triton kernels without a GPU: every kernel x config x architecture, compiled and read.

    python -m benchmarks.static_report                      # everything, into benchmarks/results/static/
    python -m benchmarks.static_report --default --arch 80 90 --out DIR

What is compiled is what would be launched: the launchers run on tensors without values, and each launch is recorded
in place of being done. A verdict a line; exit status 1 if any fails. Compiled kernels never run here.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.errors import PTXASError

from benchmarks.machine import RESULTS
from ebft_kernels._triton import (
    common,
    configs,
    grad_norm,
    loss,
    masked_adamw,
    masked_dw_adamw,
    masked_linear,
    masks,
    tiles,
)
from ebft_kernels._triton.configs import CAPABILITIES, SHARED_MEMORY, Config
from ebft_kernels.adamw import AdamWStep
from ebft_kernels.testing import ADAMW_LAYOUTS, one_adamw_step

META = torch.device("meta")
STACK_ELSEWHERE = 32  # bytes, in kernels that multiply no matrices: ptxas for sm_100 lays down 8 to 16 here and there
NUMBERS = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
    torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
TENSOR_CORES = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
PIPELINE = re.compile(r"\b(cp\.async\.cg|cp\.async\.ca|cp\.async\.bulk)\b")


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
        dtype: of the operands.
        product: it multiplies matrices, on tensor cores unless in float32.
        wide: its loads can be wide and pipelined.
        config: in place of the table's own.
        precision: of float32 products.
        default: it is among those that `make test` compiles.
    """

    kernel: str
    variant: str
    run: Callable[[], Any]
    dtype: torch.dtype
    product: bool = False
    wide: bool = False
    config: Config | None = None
    precision: str = "ieee"
    default: bool = False


@dataclass(frozen=True)
class Facts:
    """What compiling a case for an architecture showed; sizes in bytes, ``widest_load`` in bits."""

    kernel: str
    variant: str
    arch: int
    config: str
    product: bool
    registers: int
    stack: int
    shared: int
    tensor_cores: str
    pipeline: str
    widest_load: int
    failures: tuple[str, ...]


# --- what may be launched -------------------------------------------------------------------------------------------


def cases(arch: int) -> Iterator[Case]:
    """Everything that may be launched on an architecture."""
    dtypes = [torch.bfloat16, torch.float16, torch.float32] if arch >= 80 else [torch.float16, torch.float32]
    if arch >= 80:  # below, Triton does not use tensor cores, and torch multiplies
        for dtype, precision in [(dtype, "ieee") for dtype in dtypes] + [(torch.float32, "tf32")]:
            for shape, tokens in (("few", 16), ("some", 128), ("many", 8192)):
                yield from product_cases(arch, dtype, precision, shape, tokens)
    for dtype in dtypes if arch < 80 else (torch.bfloat16, torch.float32):
        yield from adamw_cases(dtype)
        yield from other_cases(dtype)


def product_cases(arch: int, dtype: torch.dtype, precision: str, shape: str, tokens: int) -> Iterator[Case]:
    """The products of one shape class: whole tiles, edges, unaligned rows; with a list of tiles; every candidate.

    float16 has bfloat16's configs, so that it is compiled for many tokens alone; candidates for bfloat16 alone.
    """
    kind = precision if dtype == torch.float32 else NUMBERS[dtype]
    if kind in ("ieee", "fp16") and shape != "many":
        return
    sizes = {"": (4096, 4096, tokens)}
    if kind != "fp16":
        sizes[", edges"] = (4000, 11024, tokens - 3)
    if shape == "many":
        sizes[", ragged"] = (4001, 11001, tokens - 3)  # one config for all
    for suffix, (n, k, t) in sizes.items():
        x, dy, weight = (empty(*size, dtype=dtype) for size in ((t, k), (t, n), (n, k)))
        words, bias = empty(n, common.cdiv(k, 32), dtype=torch.int32), empty(n, dtype=dtype)
        forward = partial(masked_linear.masked_linear, x, weight, words, bias, False)
        backward = partial(masked_linear.masked_linear_dx, dy, weight, words, False)
        gradient = partial(masked_linear.masked_linear_dw, dy, x, words)
        runs: list[tuple[str, str, str, Callable[[], Any]]] = [  # kernel, key of its configs, variant, how it is called
            ("product_kernel", "product", "forward", with_lines(forward, False)),
            ("product_kernel", "product", "dx", with_lines(backward, False)),
            ("product_kernel", "", "forward, list of tiles", with_lines(forward, True)),
            ("product_kernel", "", "dx, list of tiles", with_lines(backward, True)),
            ("gradient_kernel", "gradient", "dW", gradient),
        ]
        layouts = [("fp32", "fp32"), ("master", "fp32"), ("stochastic", "bf16")]
        for weights, moments in layouts[:1] if suffix or dtype == torch.float32 else layouts:
            step = partial(gradient_step, dy, x, weights, moments)
            runs.append(("gradient_step_kernel", "gradient step", f"{weights} weights, {moments} moments", step))
        for kernel, key, variant, run in runs:
            case = Case(
                kernel, f"{variant}, {kind}, {shape} tokens{suffix}", run, dtype, product=True, precision=precision,
                wide=suffix != ", ragged", default=(kind, shape, suffix) == ("bf16", "many", ""),
            )  # fmt: skip
            yield case
            for config in configs.candidates(key, shape, arch) if key and (kind, suffix) == ("bf16", "") else []:
                yield replace(case, variant=f"{case.variant}, candidate", config=config, default=False)


def gradient_step(dy: Tensor, x: Tensor, weights: str, moments: str) -> None:
    """``masked_dw_adamw_step`` on a dense layout; float32 weights beside 16-bit operands are those of autocast."""
    dtype = torch.float32 if weights == "fp32" else x.dtype
    step = adamw_step_like(dy.shape[1], x.shape[1], dtype, weights, moments, compact=False)
    masked_dw_adamw.masked_dw_adamw_step(dy, x, step._replace(grads=[]))


def with_lines(run: Callable[[], Any], skip: bool) -> Callable[[], Any]:
    """Run a launcher as if some tiles of its mask were empty, or none."""
    lines = tiles.TileLines(empty(64, 64, dtype=torch.int32), empty(64, dtype=torch.int32)) if skip else None

    def inside() -> Any:
        with mock.patch.object(tiles, "lines_of", return_value=lines):
            return run()

    return inside


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without values."""
    return torch.empty(shape, dtype=dtype, device=META)


def adamw_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Every layout of the states; once more where the rows are no whole mask words."""
    for weights, moments, compact in ADAMW_LAYOUTS:
        if dtype not in {"fp32": [torch.float32], "stochastic": [torch.bfloat16]}.get(
            weights, [torch.bfloat16, torch.float16]
        ):
            continue
        for width in (4096, 4001):
            what = f"{NUMBERS[dtype]}, {weights} weights, {moments} moments" + ("" if width == 4096 else ", ragged")
            step = adamw_step_like(4096, width, dtype, weights, moments, compact)
            yield Case(
                "compact_kernel" if compact else "dense_kernel", what,
                partial(masked_adamw.masked_adamw_step, step), dtype, default=width == 4096 and moments != "bf16",
            )  # fmt: skip


def adamw_step_like(n: int, k: int, dtype: torch.dtype, weights: str, moments: str, compact: bool) -> AdamWStep:
    """A step of one matrix, half of it pruned, without values."""
    shape = (n * k // 2,) if compact else (n, k)
    kinds = {"fp32": (torch.float32,) * 2, "bf16": (torch.bfloat16,) * 2, "int8": (torch.int8, torch.uint8)}[moments]
    m, v = (empty(*shape, dtype=kind) for kind in kinds)
    fields: dict[str, Tensor] = {"words": empty(n, common.cdiv(k, 32), dtype=torch.int32)}
    if compact:
        fields["row_offsets"] = empty(n + 1, dtype=torch.int64)
    if weights == "master":
        fields["masters"] = empty(*shape, dtype=torch.float32)
    if moments == "int8":
        for name in ("exp_avg_scales", "exp_avg_sq_scales"):
            fields[name] = empty(common.cdiv(m.numel(), 256), dtype=torch.float32)
    param, grad = (empty(n, k, dtype=dtype) for _ in range(2))
    return one_adamw_step(param, grad, m, v, stochastic=weights == "stochastic", **fields)


def other_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Masks, the gradient norm and the loss."""
    mask, scores = empty(4096, 4096, dtype=torch.bool), empty(4096, 4096, dtype=dtype)
    words, wide = empty(4096, 128, dtype=torch.int32), empty(4096, 4096, dtype=torch.float32)
    runs: dict[str, Callable[[], Any]] = {
        "pack_kernel": lambda: masks.pack_mask(mask),
        "unpack_kernel": lambda: masks.unpack_mask(words, 4096),
        "zero_kernel": lambda: masks.zero_pruned(scores, words),
        "count_kernel": lambda: masks.row_offsets(words),
        "nm_kernel": lambda: masks.nm_mask(scores, 2, 4),
        "nm_check_kernel": lambda: masks.is_nm(words, 4096, 2, 4),
        "squares_kernel": lambda: grad_norm.masked_grad_norm([scores], [words]),
        "total_kernel": lambda: grad_norm.masked_grad_norm([scores], [words]),
        "loss_kernel": lambda: loss.reconstruction_loss(scores, wide, scores),
        "mean_kernel": lambda: loss.reconstruction_loss(scores, wide, scores),
    }
    for kernel, run in runs.items():
        yield Case(kernel, NUMBERS[dtype], run, dtype, default=dtype == torch.bfloat16)


# --- compiling it ---------------------------------------------------------------------------------------------------


def recorded(case: Case, arch: int) -> list[Launch]:
    """The launches that ``case`` would do on a device of capability ``arch``."""
    launches: list[Launch] = []

    def record(
        kernel: Any,
        grid: int,
        arguments: Any,
        config: Config,
        device: torch.device,
        exact: bool = False,
        **constants: Any,
    ) -> None:
        launches.append(Launch(kernel, tuple(arguments), {**constants, **config.tiles}, config, exact))

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(common, "launch", record))
        patches.enter_context(mock.patch.object(common, "capability", return_value=arch))
        for module in (masked_linear, masked_dw_adamw):
            patches.enter_context(mock.patch.object(module, "precision", return_value=case.precision))
            if case.config is not None:
                patches.enter_context(mock.patch.object(module, "config_of", return_value=case.config))
        case.run()
    return launches


def compile_for(launch: Launch, arch: int) -> Any:
    """The compiled kernel, specialised as Triton would specialise it at launch."""
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
    return triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes), target=GPUTarget("cuda", arch, 32), options=options
    )


def facts_of(case: Case, arch: int) -> Facts:
    """Compile the launch that ``case`` is about and look into it."""
    launch = next(launch for launch in recorded(case, arch) if launch.kernel.__name__ == case.kernel)
    try:
        compiled = compile_for(launch, arch)
    except (triton.CompilationError, PTXASError, RuntimeError) as error:
        reason = f"does not compile: {' '.join(str(error).split())[:200]}"
        return Facts(case.kernel, case.variant, arch, str(launch.config), case.product, 0, 0, 0, "", "", 0, (reason,))
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        used = subprocess.run([cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{what}:(\d+)", used)[1]) for what in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    shared = compiled.metadata.shared
    cores, pipeline = (", ".join(sorted(set(pattern.findall(ptx)))) for pattern in (TENSOR_CORES, PIPELINE))
    loads = re.findall(r"ld\.global[.\w]*?(?:\.v(\d))?\.[bfus](\d+)", ptx)
    checks = {
        f"{stack + local} bytes of stack": stack + local <= (0 if case.product else STACK_ELSEWHERE),
        f"{shared} bytes of shared memory, of {SHARED_MEMORY[arch]} KiB": shared <= SHARED_MEMORY[arch] * 1024,
        "no tensor cores": not case.product
        or (case.dtype == torch.float32 and case.precision == "ieee")
        or bool(cores),
        "not pipelined": not case.wide or arch < 80 or bool(pipeline),
    }
    return Facts(
        case.kernel, case.variant, arch, str(launch.config), case.product,
        registers, stack + local, shared, cores, pipeline,
        max((int(count or 1) * int(bits) for count, bits in loads), default=0),
        tuple(what for what, good in checks.items() if not good),
    )  # fmt: skip


def cuobjdump() -> str:
    """The tool that comes with triton."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def main() -> int:
    """Compile, print a verdict a line, write the tables; 1 if any verdict is bad."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(CAPABILITIES), choices=CAPABILITIES)
    parser.add_argument("--default", action="store_true", help="each kernel's default config alone, on whole tiles")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--out", type=Path, default=RESULTS / "static")
    given = parser.parse_args()
    found: list[Facts] = []
    for arch in given.arch:
        for case in cases(arch):
            if given.only in f"{case.kernel}: {case.variant}" and (case.default or not given.default):
                found.append(facts_of(case, arch))
                print(verdict(found[-1]), flush=True)
        write(found, given.out)
    bad = [facts for facts in found if facts.failures]
    print(f"{len(found)} compiled, {len(bad)} failed; written to {write(found, given.out)}")
    return int(bool(bad) or not found)


def verdict(facts: Facts) -> str:
    """One line."""
    what = f"sm_{facts.arch} {facts.kernel}: {facts.variant} [{facts.config}]"
    return f"{what}: FAIL: {'; '.join(facts.failures)}" if facts.failures else f"{what}: ok"


def write(found: list[Facts], folder: Path) -> Path:
    """One JSON and one Markdown file, named by triton's version; gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = {package: version(package) for package in ("triton", "torch")}
    stem = folder / f"triton-{triton.__version__}"
    content = {"versions": versions, "kernels": [asdict(facts) for facts in found]}
    stem.with_name(stem.name + ".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    columns = (
        "sm",
        "kernel",
        "variant",
        "config",
        "registers",
        "stack",
        "shared",
        "tensor cores",
        "pipeline",
        "verdict",
    )
    lines = [
        f"# Triton kernels, compiled with triton {triton.__version__} and not run",
        "",
        "`python -m benchmarks.static_report`. Stack and shared memory in bytes; a config is tile, warps and stages.",
        "",
        "| " + " | ".join(columns) + " |",
        "| " + " | ".join("---" for _ in columns) + " |",
    ]
    for f in found:
        cells = (f.arch, f.kernel, f.variant, f.config, f.registers, f.stack, f.shared, f.tensor_cores, f.pipeline)
        lines.append("| " + " | ".join(map(str, (*cells, "; ".join(f.failures) or "ok"))) + " |")
    stem.with_name(stem.name + ".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    sys.exit(main())
