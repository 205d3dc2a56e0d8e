"""GPUs that a plan can be made for by name: data-sheet rates, without sparsity, and memory."""

from __future__ import annotations

from dataclasses import dataclass

HERE = "here"  # the machine that the plan is made on, measured


@dataclass(frozen=True)
class Device:
    """A GPU as its maker describes it.

    Attributes:
        rate: FLOP/s of dense 16-bit matrix products with float32 sums.
        memory: bytes.
        dtype: what ``--dtype auto`` computes in there.
    """

    rate: float
    memory: int
    dtype: str = "bfloat16"


# Of the data-sheet rate, over all that is done to a block of LlamaV1-7B's shape: an H200 reached 0.35 with --preset
# paper, 0.44 where it had liger-kernel (0.40 with best, 0.21 with light, which tunes for half of its time only).
SHARE = 0.35

DEVICES = {
    "h200": Device(989e12, 141 * 10**9),
    "h100": Device(989e12, 80 * 2**30),
    "a100": Device(312e12, 80 * 2**30),
    "l4": Device(121e12, 24 * 2**30),
    "rtx4090": Device(165e12, 24 * 2**30),
    "rtx4080": Device(97e12, 16 * 2**30),
    "t4": Device(65e12, 16 * 2**30, dtype="float16"),
}
