"""Triton's survivors-only AdamW kernel with other numbers of mask words and warps: a step of an 11008 x 4096 matrix.

    python -m benchmarks.compact_step          # on a GPU; writes results/<device>/compact_step.json

Each configuration has a process of its own, so that they compile at the same time; a lock lets one at a time be timed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_report import median_ms
from benchmarks.kernel_cases import adamw
from benchmarks.machine import write_result
from ebft_kernels import use_impl
from ebft_kernels._triton.configs import Config

SHAPE = (11008, 4096)
CONFIGS = [(32, 4), (16, 4), (8, 4), (8, 2), (4, 1), (8, 1), (16, 8), (16, 2)]  # words, warps
LAYOUTS = [("stochastic", "int8"), ("master", "fp32")]  # weights, moments
SPARSITIES = (0.5, 0.7)


def main() -> int:
    """Time every configuration; 1 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--one", nargs=5, metavar=("WEIGHTS", "MOMENTS", "WORDS", "WARPS", "LOCK"), help="of them alone"
    )
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("compact_step: there is no GPU here; nothing was measured and nothing was written", file=sys.stderr)
        return 1
    if given.one:
        weights, moments, words, warps, lock = given.one
        print(json.dumps(one(weights, moments, int(words), int(warps), Path(lock))))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "benchmarks.compact_step", "--one"]
        running = [
            subprocess.Popen(
                [*command, *layout, *map(str, config), str(Path(scratch) / "lock")], stdout=subprocess.PIPE, text=True
            )
            for layout in LAYOUTS
            for config in CONFIGS
        ]
        rows = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    for row in rows:
        print(row)
    print("written to", write_result("compact_step", {"shape": SHAPE, "rows": rows}))
    return 0


def one(weights: str, moments: str, words: int, warps: int, lock: Path) -> dict[str, Any]:
    """Milliseconds of a step, by sparsity, once it has given a right result."""
    from ebft_kernels._triton import masked_adamw

    row: dict[str, Any] = {"weights": weights, "moments": moments, "words": words, "warps": warps, "ms": {}}
    for name in ("COMPACT", "COMPACT_CODES"):  # this process does nothing else
        setattr(masked_adamw, name, Config({**getattr(masked_adamw, name).tiles, "WORDS": words}, warps, 1))
    with use_impl("triton"):
        for sparsity in SPARSITIES:
            case = adamw(SHAPE, torch.device("cuda"), weights, moments, True, sparsity)
            case.validate()
            with lock.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                ms = median_ms(case.contenders["ours"], torch.device("cuda"), budget=0.2)
            row["ms"][f"{sparsity:.0%} pruned"] = ms
    return row


if __name__ == "__main__":
    sys.exit(main())
