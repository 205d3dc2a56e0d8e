"""What the kernels share: masks in registers, the order of tiles, tables of tensors, and the one way to launch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ebft_kernels._triton.configs import Config

# --- in kernels ---------------------------------------------------------------------------------------------------


@triton.jit
def expand_words(words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """int32 mask words (ROWS, WORDS) -> bool (ROWS, 32 WORDS), in registers."""
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bits, [ROWS, WORDS * 32]) != 0


@triton.jit
def expand_words_down(words, WORDS: tl.constexpr, COLUMNS: tl.constexpr):
    """int32 mask words (WORDS, COLUMNS) -> bool (32 WORDS, COLUMNS): each word runs down a column."""
    bits = (words[:, None, :] >> tl.arange(0, 32)[None, :, None]) & 1
    return tl.reshape(bits, [WORDS * 32, COLUMNS]) != 0


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def popcount(words):
    """Set bits of each int32; by arithmetic in the interpreter, which has no instruction for it."""
    if not INTERPRETED:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def grouped_tile(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile (m, n) of a program: GROUP rows of tiles at a time, so that what they read stays in the L2 cache."""
    width = GROUP * tiles_n
    first = (pid // width) * GROUP
    size = min(tiles_m - first, GROUP)
    return first + (pid % width) % size, (pid % width) // size


@triton.jit
def entry_of(table_ptr, pid, FIRST: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr):
    """Which row of a table a program works for: the last whose first program (column FIRST) is not behind ``pid``."""
    firsts = tl.load(table_ptr + tl.arange(0, COUNT) * COLUMNS + FIRST)
    return tl.sum((firsts <= pid).to(tl.int32), axis=0) - 1


@triton.jit
def kept_at(address, start, offsets, left, width, FLAT: tl.constexpr):
    """Which weights are kept at flat places ``start + offsets`` of a parameter with rows of ``width``.

    Args:
        address: of the mask words; 0 where there are none, and everything is kept.
        left: entries of the parameter from ``start`` on.
        FLAT: whole words fill a row, so that a place alone says where its bit is.
    """
    if FLAT:
        word, bit = start // 32 + offsets // 32, offsets % 32
    else:
        columns = width.to(tl.int32)
        column = (start % width).to(tl.int32) + offsets
        row, column = start // width + column // columns, column % columns
        word, bit = row * tl.cdiv(width, 32) + column // 32, column % 32
    masked = offsets < tl.where(address != 0, left, 0)
    words = tl.load(address.to(tl.pointer_type(tl.int32)) + word, mask=masked, other=-1)
    return ((words >> bit) & 1) != 0


@triton.jit
def number(row_ptr, column, ALIGNED: tl.constexpr):
    """A number in a column of a table's row; the caller's word that it is a multiple of 16 if ALIGNED."""
    value = tl.load(row_ptr + column)
    if ALIGNED:
        value = tl.multiple_of(value, 16)
    return value


@triton.jit
def pointer(row_ptr, column, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a column of a table's row, as a pointer; a multiple of 16 bytes if ALIGNED."""
    address = tl.load(row_ptr + column).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def narrowed(values, DTYPE: tl.constexpr):
    """float32 rounded to DTYPE, to nearest even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:  # the interpreter's own conversion cuts off
        bits = values.to(tl.int32, bitcast=True)
        rounded = tl.where(values == values, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return values.to(DTYPE)


# --- around kernels -----------------------------------------------------------------------------------------------


def cdiv(a: int, b: int) -> int:
    """ceil(a / b)."""
    return -(-a // b)


def launch(
    kernel: Any,
    grid: int,
    arguments: Sequence[Any],
    config: Config,
    device: torch.device,
    exact: bool = False,
    **constants: Any,
) -> None:
    """Run ``grid`` programs of ``kernel``; every launch of the package goes through here.

    ``exact``: no multiplication is fused with an addition, so that the kernel rounds where the reference rounds.
    """
    if grid == 0:
        return
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": not exact}
    with torch.cuda.device(device if device.type == "cuda" else -1):  # the current stream of the tensors' own device
        kernel[(grid,)](*arguments, **constants, **config.tiles, **options)


def capability(device: torch.device) -> int:
    """Compute capability, such as 90; that of the safe defaults, 0, where there is no GPU (Triton's interpreter)."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def device_name(device: torch.device) -> str | None:
    """The device's name, by which measured configs are kept."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def table_on(device: torch.device, rows: list[list[int]], behind: int) -> Tensor:
    """int64 numbers (a power of two of rows, columns) in device memory, for ``entry_of``; no host synchronisation.

    Rows that fill up to the power of two hold ``behind``, which is more than any program's number. Tables are kept: a
    loop's tensors lie where they lay in the step before.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _table(device, stream, tuple(map(tuple, rows)), behind)


@functools.lru_cache(maxsize=256)
def _table(device: torch.device, stream: int, rows: tuple[tuple[int, ...], ...], behind: int) -> Tensor:
    """A table, copied in the order of ``stream``, which alone may use it."""
    filled = [*rows, *[(behind,) * len(rows[0])] * (triton.next_power_of_2(len(rows)) - len(rows))]
    table = torch.tensor(filled, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def alike(items: Iterable[Any], key: Callable[[Any], Any]) -> list[tuple[Any, list[Any]]]:
    """The items by ``key``, in the order in which keys first come."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.items())


def width_of(tensor: Tensor) -> int:
    """Weights in a row of a parameter's mask; 1 for a scalar, which has none."""
    return tensor.shape[-1] if tensor.ndim else 1


def is_flat(tensor: Tensor, words: Tensor) -> bool:
    """Whole mask words fill the rows of a parameter, or there is no mask."""
    return words.numel() == 0 or width_of(tensor) % 32 == 0


def is_aligned(size: int, *tensors: Tensor) -> bool:
    """``size`` is a multiple of 16, and all begin at multiples of 16 bytes: loads may be wide then."""
    return size % 16 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


NUMBERS = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
    torch.int8: tl.int8, torch.uint8: tl.uint8,
}  # fmt: skip
