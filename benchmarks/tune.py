"""Search for the fastest config of every Triton product on this GPU, and for where Triton beats cuBLAS.

    python -m benchmarks.tune --minutes 20          # on a GPU; writes ebft_kernels/_triton/measured.json

For each shape class the table's own config and its candidates are timed on one shape: medians, the second-level cache
flushed, right results only. Then each product is timed against cuBLAS on the zeroed weight and against the mask
multiply; the dispatcher takes Triton where it won (``ebft_kernels.explain`` says so). What the file knows of other
GPUs stays.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_report import median_ms
from benchmarks.kernel_cases import mask_of, randn
from ebft_kernels import PackedMask
from ebft_kernels._triton import common, configs, masked_dw_adamw, masked_linear
from ebft_kernels._triton.configs import Config
from ebft_kernels.ops import TORCH_KERNELS
from ebft_kernels.testing import one_adamw_step

TOKENS = {"many": 8192, "some": 128, "few": 16}
MODULES = {"product": masked_linear, "gradient": masked_linear, "gradient step": masked_dw_adamw}


@dataclass(frozen=True)
class Operands:
    """Of one layer; ``zeroed`` is ``weight`` with zeros where pruned."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    zeroed: Tensor
    words: Tensor


def main(argv: list[str] | None = None) -> int:
    """Tune and write; 1 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=configs.MEASURED_FILE)
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=4096)
    given = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tune: there is no GPU here; nothing was measured and nothing was written", file=sys.stderr)
        return 1
    until = time.perf_counter() + 60 * given.minutes
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    tune(torch.device("cuda"), dtype, (given.outputs, given.inputs), TOKENS, given.out, until)
    return 0


def tune(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], tokens: dict[str, int], out: Path, until: float
) -> dict[str, Any]:
    """Measure until ``until`` (``time.perf_counter``), writing ``out`` after each class; gives this device's entry."""
    known = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    entry: dict[str, Any] = known.setdefault(common.device_name(device) or "cpu", {"configs": {}, "products": {}})
    for name, count in tokens.items():
        if time.perf_counter() > until:
            break
        given = make_operands(device, dtype, shape, count)
        best = {kernel: fastest(kernel, name, given, device) for kernel in MODULES}
        for kernel, config in best.items():
            entry["configs"][f"{kernel}/{name}/{dtype.itemsize}"] = asdict(config)
        for op, (kernel, run) in products(given).items():
            row = {"triton": median_ms(with_config(kernel, best[kernel], run), device)}
            row |= {what: median_ms(rival, device) for what, rival in rivals(op, given).items()}
            entry["products"][f"{op}/{name}/{dtype.itemsize}"] = row
            print(f"{op}, {name} tokens: {row}", flush=True)
        out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return entry


def make_operands(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], tokens: int) -> Operands:
    """Half of the weight is pruned at random, so that no tile is empty."""
    mask = mask_of(shape, 0.5, device)
    weight = randn(*shape, device=device, dtype=dtype)
    x, dy = (randn(tokens, size, device=device, dtype=dtype, seed=size) for size in reversed(shape))
    return Operands(x, dy, weight, weight * mask, PackedMask.from_dense(mask).words)


def products(given: Operands) -> dict[str, tuple[str, Callable[[], Tensor]]]:
    """Op -> the kernel that runs it, and how."""
    x, dy, weight, words = given.x, given.dy, given.weight, given.words
    return {
        "masked_linear": ("product", lambda: masked_linear.masked_linear(x, weight, words, None, False)),
        "masked_linear_dx": ("product", lambda: masked_linear.masked_linear_dx(dy, weight, words, False)),
        "masked_linear_dw": ("gradient", lambda: masked_linear.masked_linear_dw(dy, x, words)),
    }


def rivals(op: str, given: Operands) -> dict[str, Callable[[], Tensor]]:
    """What runs in torch's products: the mask multiplied in, and no mask at all."""
    torchs = TORCH_KERNELS[op]
    if op == "masked_linear_dw":
        multiplied = {"multiply": lambda: torchs(given.dy, given.x, given.words)}
        return {**multiplied, "zeroed": lambda: given.dy.T @ given.x}
    first, rest = (given.x, (None,)) if op == "masked_linear" else (given.dy, ())
    return {
        "multiply": lambda: torchs(first, given.weight, given.words, *rest, False),
        "zeroed": lambda: torchs(first, given.zeroed, given.words, *rest, True),
    }


def with_config(kernel: str, config: Config, run: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` with a config in place of the table's."""

    def inside() -> Any:
        with mock.patch.object(MODULES[kernel], "config_of", return_value=config):
            return run()

    return inside


def fastest(kernel: str, shape_class: str, given: Operands, device: torch.device) -> Config:
    """The config with the smallest sum of medians over what the kernel does."""
    capability = common.capability(device)
    tried = [configs.config_for(kernel, shape_class, capability), *configs.candidates(kernel, shape_class, capability)]
    times = {}
    for number, config in enumerate(tried):
        times[number] = sum(median_ms(with_config(kernel, config, run), device) for run in runs_of(kernel, given))
        print(f"{kernel}, {shape_class} tokens [{config}]: {times[number]:.3f} ms", flush=True)
    return tried[min(times, key=lambda number: times[number])]


def runs_of(kernel: str, given: Operands) -> list[Callable[[], Any]]:
    """What a kernel is timed on; each has given a right result before."""
    if kernel == "gradient step":
        return [gradient_step(given)]
    found = []
    for op, (used, run) in products(given).items():
        if used == kernel:
            zeroed = rivals(op, given)["zeroed"]().double()
            truth = zeroed * PackedMask(given.words, given.weight.shape).dense() if op == "masked_linear_dw" else zeroed
            error = float((run().double() - truth).abs().max())
            assert error <= 0.02 * float(truth.abs().max()), f"{op} errs by {error}"
            found.append(run)
    return found


def gradient_step(given: Operands) -> Callable[[], None]:
    """A step with float32 moments and masters."""
    weight = given.zeroed.clone()
    m, v = (torch.zeros(weight.shape, device=weight.device) for _ in range(2))
    step = one_adamw_step(weight, None, m, v, masters=weight.float(), words=given.words, lr=1e-4, step=1)
    return lambda: masked_dw_adamw.masked_dw_adamw_step(given.dy, given.x, step)


if __name__ == "__main__":
    sys.exit(main())
