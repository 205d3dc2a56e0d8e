"""What the native library is built from, for setup.py and the build at first use. Imports torch only when asked."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# No contraction: results are those of the reference, bit for bit. No strict aliasing: floats are also seen as bits.
_ARITHMETIC = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"]
_OPENMP = ["-fopenmp"] if sys.platform == "linux" else []  # at::parallel_for is a plain loop without it
CFLAGS = ["-O3", "-std=c++20", *_OPENMP, *_ARITHMETIC, "-Wall", "-Wextra"]
NVCC_FLAGS = ["-O3", "-std=c++17", "--fmad=false", "-lineinfo"]  # products that may be fused say so themselves


def cpp_sources(folder: Path) -> list[Path]:
    """The C++ files of a csrc folder that make the library on a CPU."""
    return sorted(folder.glob("cpu/*.cpp"))


def cuda_sources(folder: Path) -> list[Path]:
    """What is built besides, where torch has CUDA and the CUDA compiler is here."""
    return [*sorted(folder.glob("cuda/*.cu")), *sorted(folder.glob("cuda/*.cpp"))]


def cuda_compiler() -> str | None:
    """nvcc, if torch has CUDA, the toolkit is here, and it is known for which GPUs: one that is here, or those of
    ``TORCH_CUDA_ARCH_LIST``."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = Path(CUDA_HOME or "/nowhere") / "bin" / "nvcc"
    wanted = torch.cuda.is_available() or "TORCH_CUDA_ARCH_LIST" in os.environ
    return str(nvcc) if wanted and torch.version.cuda and nvcc.is_file() else None


def library_name() -> str:
    """The file name of a library built at install: it fits one version of torch."""
    import torch

    return f"_native-torch{torch.__version__.replace('+', '-')}.so"
