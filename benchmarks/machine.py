"""What a result file says of the machine and the versions it was measured with, and where such files lie."""

from __future__ import annotations

import json
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine_info() -> dict[str, Any]:
    """The device by name, cores, and the versions of what does the work."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("ebft", "torch", "triton", "transformers")},
    }


def result_file(name: str) -> Path:
    """``results/<device>/<name>.json``."""
    return RESULTS / re.sub("[^a-z0-9]+", "-", machine_info()["device"].lower()) / f"{name}.json"


def write_result(name: str, content: dict[str, Any], folder: Path | None = None) -> Path:
    """Write ``content`` with the machine's facts to ``result_file(name)``, or into ``folder``; gives the file."""
    file = folder / f"{name}.json" if folder else result_file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": machine_info(), **content}, indent=2) + "\n", encoding="utf-8")
    return file


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0]} {capability}, {len(names)} cores" if names else platform.machine()
