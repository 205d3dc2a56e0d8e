"""Search for the fastest config of every Triton product on this GPU, and for where Triton beats cuBLAS; the table learns of both.

    python -m benchmarks.tune --minutes 20          # on a GPU; writes ebft_kernels/_triton/measured.json

For each shape class and dtype the table's own config and its candidates are timed on one shape, medians with the second-level cache
flushed, right results only. Then each product is timed against cuBLAS on the zeroed weight and against the mask multiply; the
dispatcher takes Triton where it won (``ebft_kernels.explain`` says so). What is known of other GPUs stays in the file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_report import median_ms
from benchmarks.kernel_cases import mask_of, randn
from ebft_kernels import PackedMask, explain, ops
from ebft_kernels._triton import configs
from ebft_kernels._triton.configs import Config

TOKENS = {"many": 8192, "some": 128, "few": 16}
Operands = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Tune and write; 1 where there is no GPU that Triton runs on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=configs.MEASURED_FILE)
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=4096)
    given = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tune: there is no GPU here; nothing was measured and nothing was written", file=sys.stderr)
        return 1
    device, until = torch.device("cuda"), time.perf_counter() + 60 * given.minutes
    tune(device, (given.outputs, given.inputs), TOKENS, until, given.out)
    return 0


def tune(device: torch.device, shape: tuple[int, int], tokens: dict[str, int], until: float, out: Path) -> dict[str, Any]:
    """Measure until ``until`` (of ``time.perf_counter``), writing ``out`` after each shape class; gives this device's entry."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    known = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    entry = known.setdefault(name, {"configs": {}, "products": {}})
    for dtype in (torch.bfloat16, torch.float16):
        if explain("masked_linear", device, dtype).fallback:
            continue
        for shape_class, count in tokens.items():
            if time.perf_counter() > until:
                return entry
            given = operands(device, dtype, shape, count)
            for kernel, runs in kernels(given).items():
                best = fastest(kernel, shape_class, runs, device)
                entry["configs"][f"{kernel}/{shape_class}/{dtype.itemsize}"] = asdict(best)
            for op, (ours, multiply, zeroed) in products(given).items():
                with chosen(entry, device, shape_class, dtype):
                    times = {"triton": ours, "multiply": multiply, "zeroed": zeroed}
                    entry["products"][f"{op}/{shape_class}/{dtype.itemsize}"] = {
                        what: median_ms(run, device) for what, run in times.items()
                    }
            out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return entry
