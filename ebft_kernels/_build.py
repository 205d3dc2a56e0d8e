"""What the native library is built from: shared by setup.py and the build at first use. Imports torch only when asked."""

from __future__ import annotations

from pathlib import Path

CFLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wall", "-Wextra"]


def cpp_sources(folder: Path) -> list[Path]:
    """The C++ files of a csrc folder that make the library."""
    return sorted(folder.glob("cpu/*.cpp"))


def library_name() -> str:
    """The file name of a library built at install: it fits one version of torch."""
    import torch

    return f"_native-torch{torch.__version__.split('+')[0]}.so"
