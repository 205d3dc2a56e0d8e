"""The one table from (kernel, shape class, compute capability) to tiles, warps and stages.

An entry is either measured (``benchmarks/tune.py`` finds it on a GPU and writes it to ``measured.json``, by device
name) or reasoned: made for an architecture, and shown by ``benchmarks/static_report.py`` to compile without spills,
on tensor cores, pipelined, and within shared memory. Where nothing else fits, a kernel's safe default is taken, which
runs from sm_75 on.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CAPABILITIES = (75, 80, 86, 89, 90, 100)
SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227}  # KiB that one program may use
MEASURED_FILE = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    Attributes:
        tiles: the kernel's tile sizes by name, such as ``{"BI": 128, "BJ": 64, "BT": 128}``.
        warps: warps of a program.
        stages: depth of the software pipeline.
    """

    tiles: dict[str, int] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.tiles.values()))}, {self.warps} warps, {self.stages} stages"


def _product(bi: int, bt: int, bj: int, warps: int, stages: int) -> Config:
    """Of y^T or dx^T: a tile BI x BT, BJ of the sum at a time."""
    return Config({"BI": bi, "BT": bt, "BJ": bj, "GROUP": 8}, warps, stages)


def _gradient(bn: int, bk: int, bt: int, warps: int, stages: int) -> Config:
    """Of dW: a tile BN x BK, BT tokens at a time."""
    return Config({"BN": bn, "BK": bk, "BT": bt, "GROUP": 8}, warps, stages)


# Shape classes of the products, by tokens T: "few" up to 16, "some" up to 128, "many"; and two for all T: "ragged",
# where rows do not begin at multiples of 16 elements, so that nothing can be loaded wide, and "ieee", float32 without
# tensor cores. Kernel -> shape class -> lowest capability -> config for 16-bit operands; the highest capability that
# is not above the device's counts. Products begin at 80: for older ones Triton does not use tensor cores. 0 stands
# for the interpreter.
REASONED: dict[str, dict[str, dict[int, Config]]] = {
    "product": {
        "few": {0: _product(64, 16, 64, 4, 2), 80: _product(64, 16, 128, 4, 4), 86: _product(64, 16, 128, 4, 3),
                100: _product(64, 16, 64, 4, 3)},
        "some": {0: _product(64, 64, 32, 4, 2), 80: _product(64, 64, 64, 4, 3), 100: _product(64, 64, 32, 4, 4)},
        "many": {0: _product(64, 64, 32, 4, 2), 80: _product(128, 128, 64, 8, 3), 86: _product(128, 128, 32, 8, 3),
                 90: _product(128, 128, 64, 8, 3)},
        "ragged": {0: _product(64, 64, 32, 4, 2)},
        "ieee": {0: _product(64, 32, 32, 4, 2), 80: _product(32, 16, 32, 4, 2)},
    },
    "gradient": {
        "few": {0: _gradient(64, 64, 16, 4, 2)},
        "some": {0: _gradient(64, 64, 32, 4, 2), 80: _gradient(128, 64, 32, 4, 3)},
        "many": {0: _gradient(64, 64, 32, 4, 2), 80: _gradient(128, 128, 64, 8, 3), 86: _gradient(128, 128, 32, 8, 3),
                 90: _gradient(128, 128, 64, 8, 3)},
        "ragged": {0: _gradient(64, 64, 32, 4, 2)},
        "ieee": {0: _gradient(64, 64, 16, 4, 2)},
    },
    "gradient step": {
        "few": {0: _gradient(64, 128, 16, 8, 2), 100: _gradient(32, 128, 16, 4, 2)},
        "some": {0: _gradient(64, 128, 32, 8, 2), 80: _gradient(64, 128, 32, 8, 3)},
        "many": {0: _gradient(64, 128, 32, 8, 2), 80: _gradient(128, 128, 64, 8, 3), 86: _gradient(64, 128, 32, 8, 3),
                 90: _gradient(128, 128, 64, 8, 3)},
        "ragged": {0: _gradient(64, 128, 32, 8, 2)},
        "ieee": {0: _gradient(32, 128, 16, 4, 2)},
    },
}  # fmt: skip

# What ``benchmarks/tune.py`` tries beside the table's own entries, and on which architectures: those for which
# ``benchmarks/static_report.py`` finds nothing against it.
ALL, HOPPER, BIG = (80, 86, 89, 90, 100), (90, 100), (80, 90, 100)
CANDIDATES: dict[str, dict[str, list[tuple[tuple[int, ...], Config]]]] = {
    "product": {
        "few": [(ALL, _product(32, 16, 128, 4, 3)), (ALL, _product(64, 16, 64, 2, 4))],
        "some": [
            (ALL, _product(128, 64, 32, 8, 4)),
            (ALL, _product(64, 128, 32, 4, 4)),
            (ALL, _product(64, 64, 32, 4, 4)),
        ],
        "many": [
            (ALL, _product(128, 64, 32, 8, 4)),
            (ALL, _product(128, 128, 32, 8, 4)),
            (ALL, _product(128, 128, 32, 4, 3)),
            (HOPPER, _product(128, 256, 64, 8, 3)),
            (HOPPER, _product(128, 128, 64, 8, 4)),
        ],
    },
    "gradient": {
        "few": [(BIG, _gradient(64, 128, 16, 4, 2))],
        "some": [(ALL, _gradient(64, 128, 32, 4, 3)), (ALL, _gradient(128, 128, 32, 8, 3))],
        "many": [
            (ALL, _gradient(128, 128, 32, 8, 4)),
            (ALL, _gradient(128, 128, 32, 4, 3)),
            (ALL, _gradient(128, 64, 64, 4, 3)),
            (HOPPER, _gradient(128, 256, 64, 8, 3)),
            (HOPPER, _gradient(128, 128, 64, 8, 4)),
        ],
    },
    "gradient step": {
        "few": [],
        "some": [(BIG, _gradient(128, 128, 32, 8, 3))],
        "many": [
            (ALL, _gradient(64, 128, 32, 8, 4)),
            (BIG, _gradient(128, 128, 32, 8, 4)),
            (HOPPER, _gradient(128, 128, 64, 8, 4)),
        ],
    },
}


def candidates(kernel: str, shape: str, capability: int) -> list[Config]:
    """The configs that are worth trying on an architecture, the table's own aside."""
    return [config for capabilities, config in CANDIDATES[kernel][shape] if capability in capabilities]


def shape_class(tokens: int) -> str:
    """The class of a product over so many tokens."""
    return "few" if tokens <= 16 else "some" if tokens <= 128 else "many"


def config_for(kernel: str, shape: str, capability: int, itemsize: int = 2, device_name: str | None = None) -> Config:
    """The config of ``kernel`` (a key of ``REASONED``) for a shape class, on a device.

    Args:
        itemsize: bytes of an operand's element; 4 halves what the loop of a product loads at a time.
        device_name: as ``torch.cuda.get_device_name`` has it, for entries measured on that very device.
    """
    measured_here = measured().get(device_name or "", {}).get("configs", {}).get(f"{kernel}/{shape}/{itemsize}")
    if measured_here is not None:
        return Config(**measured_here)
    by_capability = REASONED[kernel][shape]
    config = by_capability[max(known for known in by_capability if known <= capability)]
    if itemsize == 4 and shape != "ieee":
        loop, least = ("BJ", 32) if kernel == "product" else ("BT", 16)
        return Config({**config.tiles, loop: max(least, config.tiles[loop] // 2)}, config.warps, config.stages)
    return config


@functools.cache
def measured() -> dict[str, Any]:
    """What has been measured: device name -> {"configs": ..., "masked_linear": ...}; empty where nothing has."""
    return json.loads(MEASURED_FILE.read_text(encoding="utf-8")) if MEASURED_FILE.is_file() else {}
