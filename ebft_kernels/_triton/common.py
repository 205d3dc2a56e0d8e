"""What several kernels share: masks in registers, the order of tiles, and numbers at compile time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expand_words(words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """int32 mask words (ROWS, WORDS) -> bool (ROWS, 32 WORDS), in registers."""
    bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bits, [ROWS, WORDS * 32]) != 0


@triton.jit
def popcount(words):
    """Set bits of each int32 (arithmetic, because the interpreter has no popc)."""
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def grouped_tile(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile (m, n) of a program: GROUP rows of tiles at a time, so that what they read stays in the L2 cache."""
    width = GROUP * tiles_n
    first = (pid // width) * GROUP
    size = min(tiles_m - first, GROUP)
    return first + (pid % width) % size, (pid % width) // size


def cdiv(a: int, b: int) -> int:
    """ceil(a / b)."""
    return -(-a // b)


def words_in(width: int) -> int:
    """32-bit mask words in a row."""
    return cdiv(width, 32)


next_power_of_2 = triton.next_power_of_2
