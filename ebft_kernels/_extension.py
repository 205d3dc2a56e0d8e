"""The native library of csrc/: found, or built just in time; and the reason where there is none.

It comes from one of three places: built at install (``pip install --no-build-isolation .`` with torch at hand), built
at first use where there is a compiler (cached for this torch, this CPU and these sources; ``EBFT_CACHE`` moves the
cache), or nowhere, and then everything runs without it. ``EBFT_NATIVE=0`` turns it off.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ebft_kernels._build import CFLAGS, NVCC_FLAGS, cpp_sources, cuda_compiler, cuda_sources, library_name

_PACKAGE = Path(__file__).parent


@functools.cache
def native_reason() -> str | None:
    """None where the native library is loaded (this loads or builds it); otherwise why it is not."""
    if os.environ.get("EBFT_NATIVE", "1") == "0":
        return "EBFT_NATIVE=0 turns the native library off"
    installed = _PACKAGE / library_name()
    if installed.is_file():
        return _load(installed)
    folder = next((f for f in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc") if cpp_sources(f)), None)
    if folder is None:
        return "the native library was not built at install, and its sources are not here"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"the native library is not built, and there is no compiler ({compiler}) to build it"
    return _build(folder, compiler)


def _load(library: Path) -> str | None:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the native library {library} cannot be loaded: {' '.join(str(error).split())[:200]}"
    return None


def _build(folder: Path, compiler: str) -> str | None:
    """Build in the cache, or take what is there."""
    cache = _cache_folder(folder, compiler)
    library = cache / "ebft_kernels_native.so"
    if library.is_file():
        return _load(library)
    print(f"ebft_kernels: building the native kernels, once (about a minute) into {cache}", file=sys.stderr, flush=True)
    began = time.perf_counter()
    work = (
        cache / f"build-{os.getpid()}"
    )  # every process in a folder of its own; the last to finish replaces the others'
    try:
        try:
            _compile(folder, work, library.stem, cuda=cuda_compiler() is not None)
        except RuntimeError:
            if cuda_compiler() is None:
                raise
            print("ebft_kernels: the CUDA part does not build; building without it", file=sys.stderr, flush=True)
            _compile(folder, work, library.stem, cuda=False)
        (work / library.name).replace(library)
    except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        log = cache / "build.log"
        with contextlib.suppress(OSError):
            log.write_text(f"{compiler}\n{error}\n", encoding="utf-8")
        return f"the native library could not be built with {compiler}; the log is {log}"
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"ebft_kernels: built in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return None


def _compile(folder: Path, work: Path, name: str, *, cuda: bool) -> None:
    """Build ``name``.so in the folder ``work``, and load it from there."""
    from torch.utils import cpp_extension  # imports setuptools: only when there is something to build

    work.mkdir(parents=True, exist_ok=True)
    with _tools_on_path(), _quiet(cpp_extension.__name__):  # its warnings on a broken compiler are tracebacks
        cpp_extension.load(
            name,
            [str(file) for file in (*cpp_sources(folder), *(cuda_sources(folder) if cuda else ()))],
            extra_cflags=CFLAGS,
            extra_cuda_cflags=NVCC_FLAGS,
            extra_include_paths=[str(folder)],
            build_directory=str(work),
            is_python_module=False,
            with_cuda=cuda,
        )


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Errors alone from a logger."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _tools_on_path() -> Iterator[None]:
    """ninja comes as a package: it lies beside this Python, which need not be on the PATH."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join(filter(None, (str(Path(sys.executable).parent), before)))
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _cache_folder(folder: Path, compiler: str) -> Path:
    base = (
        os.environ.get("EBFT_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ebft_kernels"
    )
    fingerprint = hashlib.sha256(f"{compiler} {CFLAGS} {_cpu()} {cuda_compiler()} {NVCC_FLAGS}".encode())
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".cpp", ".cu", ".cuh", ".h")):
        fingerprint.update(file.name.encode() + file.read_bytes())
    return Path(base) / f"torch{torch.__version__}-{platform.machine()}-{fingerprint.hexdigest()[:16]}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), platform.processor())
