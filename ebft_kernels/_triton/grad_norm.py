"""L2 norm over the kept gradient entries of many tensors, as a scalar on the device.

Two stages, each with a fixed order of summation, so that the norm is the same in every run: a program sums the
squares of BLOCK x STEPS consecutive entries of one tensor into a place of its own, then one program adds the places
up. Each gradient is read once, each mask word once: 2 or 4 bytes and an eighth a weight; no masked copy is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ebft_kernels._triton import common
from ebft_kernels._triton.common import cdiv, entry_of, kept_at, number, pointer
from ebft_kernels._triton.configs import Config

SQUARES = Config({"BLOCK": 1024, "STEPS": 8}, 4, 1)
TOTAL = Config({"BLOCK": 1024}, 4, 1)
COLUMNS = 5  # of the table: first program, gradient, words, entries, width


@triton.jit
def squares_kernel(
    table_ptr, sums_ptr,
    COUNT: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr, FLAT: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The sum of squares of BLOCK x STEPS entries."""
    # 1. Which tensor, and where in it.
    pid = tl.program_id(0)
    row_ptr = table_ptr + entry_of(table_ptr, pid, 0, COLUMNS, COUNT) * COLUMNS
    start = (pid - tl.load(row_ptr)) * (BLOCK * STEPS)

    # 2. Pointers.
    grad_ptr, words = pointer(row_ptr, 1, DTYPE, ALIGNED), tl.load(row_ptr + 2)
    numel, width = number(row_ptr, 3, ALIGNED), tl.load(row_ptr + 4)

    # 3. Loop.
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(0, STEPS):
        at = start + step * BLOCK
        offsets = tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + at + offsets, mask=offsets < numel - at, other=0.0).to(tl.float32)
        grad = tl.where(kept_at(words, at, offsets, numel - at, width, FLAT), grad, 0.0)
        total += grad * grad

    # 4. Store.
    tl.store(sums_ptr + pid, tl.sum(total, axis=0))


@triton.jit
def total_kernel(sums_ptr, norm_ptr, count, BLOCK: tl.constexpr):
    """The square root of the sum of all sums."""
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + place, mask=place < count, other=0.0)
    tl.store(norm_ptr, tl.sqrt_rn(tl.sum(total, axis=0)))


def masked_grad_norm(grads: list[Tensor], words: list[Tensor]) -> Tensor:
    """As the op ``masked_grad_norm``."""
    device = grads[0].device
    grads, words = [grad.contiguous() for grad in grads], [mask.contiguous() for mask in words]
    piece = SQUARES.tiles["BLOCK"] * SQUARES.tiles["STEPS"]
    sums = torch.empty(sum(cdiv(grad.numel(), piece) for grad in grads), dtype=torch.float32, device=device)
    done = 0

    def layout(i: int) -> tuple[torch.dtype, bool, bool]:
        grad = grads[i]
        return grad.dtype, common.is_flat(grad, words[i]), common.is_aligned(grad.numel(), grad)

    for (dtype, flat, aligned), alike in common.alike(range(len(grads)), layout):
        rows, programs = [], 0
        for i in alike:
            address = words[i].data_ptr() if words[i].numel() else 0
            rows.append([programs, grads[i].data_ptr(), address, grads[i].numel(), common.width_of(grads[i])])
            programs += cdiv(grads[i].numel(), piece)
        table = common.table_on(device, rows, behind=programs)
        common.launch(
            squares_kernel, programs, (table, sums[done:]), SQUARES, device,
            COUNT=len(table), COLUMNS=COLUMNS, DTYPE=common.NUMBERS[dtype], FLAT=flat, ALIGNED=aligned,
        )  # fmt: skip
        done += programs
    norm = torch.empty((), dtype=torch.float32, device=device)
    common.launch(total_kernel, 1, (sums, norm, done), TOTAL, device)
    return norm
