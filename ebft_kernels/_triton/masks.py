"""Masks on the device: pack, unpack, count, select N of M and check it, with no host synchronisation.

All of these are bound by memory: a bool or a score is read (or a bool written) once, a word is an eighth of a bool
mask. A tile is (words, 32): each row of it is what one word holds. ``topk_mask`` stays with torch, whose ``kthvalue``
is a radix select already.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ebft_kernels._triton import common
from ebft_kernels._triton.common import cdiv, kept_at, popcount
from ebft_kernels._triton.configs import Config

WORD = 32
TILE = Config({"WORDS": 32}, 4, 1)  # 1024 weights a program

# --- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def place_of(pid, words_in_row, WORDS: tl.constexpr):
    """Word numbers (WORDS,), and the rows (WORDS, 1) and columns (WORDS, 32) of their weights, for a program."""
    word = pid.to(tl.int64) * WORDS + tl.arange(0, WORDS)
    column = (word % words_in_row)[:, None] * 32 + tl.arange(0, 32)[None, :]
    return word, (word // words_in_row)[:, None], column


@triton.jit
def packed(bits):
    """bool (WORDS, 32) -> int32 (WORDS,)."""
    return tl.sum(bits.to(tl.uint32) << tl.arange(0, 32)[None, :].to(tl.uint32), axis=1).to(tl.int32, bitcast=True)


@triton.jit
def pack_kernel(mask_ptr, words_ptr, count, words_in_row, width, stride_row, stride_column, WORDS: tl.constexpr):
    """``count`` words from a bool mask (rows, width)."""
    word, row, column = place_of(tl.program_id(0), words_in_row, WORDS)
    inside = (word < count)[:, None] & (column < width)
    bits = tl.load(mask_ptr + row * stride_row + column * stride_column, mask=inside, other=0) != 0
    tl.store(words_ptr + word, packed(bits), mask=word < count)


@triton.jit
def unpack_kernel(words_ptr, mask_ptr, count, words_in_row, width, WORDS: tl.constexpr):
    """A bool mask (rows, width) from ``count`` words."""
    word, row, column = place_of(tl.program_id(0), words_in_row, WORDS)
    words = tl.load(words_ptr + word, mask=word < count, other=0)
    bits = (words[:, None] >> tl.arange(0, 32)[None, :]) & 1
    inside = (word < count)[:, None] & (column < width)
    tl.store(mask_ptr + row * width + column, bits.to(tl.int8), mask=inside)


@triton.jit
def zero_kernel(
    tensor_ptr, words_ptr, out_ptr, numel, width, FLAT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """BLOCK weights, with zeros where pruned."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    left = numel - start
    kept = kept_at(words_ptr.to(tl.int64), start, offsets, left, tl.cast(width, tl.int64), FLAT)
    values = tl.load(tensor_ptr + start + offsets, mask=offsets < left, other=0.0)
    tl.store(out_ptr + start + offsets, tl.where(kept, values, 0.0).to(values.dtype), mask=offsets < left)


@triton.jit
def zero_in_place_kernel(tensor_ptr, words_ptr, numel, width, FLAT: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros over what stands in the pruned places of BLOCK weights, seen as integers."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    left = numel - start
    kept = kept_at(words_ptr.to(tl.int64), start, offsets, left, tl.cast(width, tl.int64), FLAT)
    bits = tl.load(tensor_ptr + start + offsets, mask=(offsets < left), other=0)
    filled = (offsets < left) & (bits != 0) & (kept == 0)
    tl.store(tensor_ptr + start + offsets, tl.zeros_like(bits), mask=filled)


@triton.jit
def count_kernel(words_ptr, counts_ptr, words_in_row, WORDS: tl.constexpr):
    """How many bits are set in one row."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([WORDS], dtype=tl.int32)
    for first in range(0, words_in_row, WORDS):
        word = first + tl.arange(0, WORDS)
        total += popcount(tl.load(words_ptr + row * words_in_row + word, mask=word < words_in_row, other=0))
    tl.store(counts_ptr + row, tl.sum(total, axis=0).to(tl.int64))


@triton.jit
def ordered(scores):
    """int32 in the order of float scores: NaN highest, -0 equal to +0."""
    scores = scores.to(tl.float32)
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    return tl.where(scores != scores, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def nm_kernel(
    scores_ptr, words_ptr, count, words_in_row, width, stride_row, stride_column,
    N: tl.constexpr, M: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Keep a weight of which fewer than N in its group of M are higher, or equal and further left."""
    word, row, column = place_of(tl.program_id(0), words_in_row, WORDS)
    inside = (word < count)[:, None] & (column < width)
    row_ptr = scores_ptr + row * stride_row
    mine = ordered(tl.load(row_ptr + column * stride_column, mask=inside, other=0.0))
    first = column // M * M
    before = tl.zeros([WORDS, 32], dtype=tl.int32)
    for place in range(0, M):  # the group's scores are in the first-level cache by now
        other = ordered(tl.load(row_ptr + (first + place) * stride_column, mask=inside, other=0.0))
        before += ((other > mine) | ((other == mine) & (first + place < column))).to(tl.int32)
    tl.store(words_ptr + word, packed(inside & (before < N)), mask=word < count)


@triton.jit
def nm_check_kernel(
    words_ptr, too_full_ptr, groups, groups_in_row, words_in_row, N: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr
):
    """Whether any of BLOCK groups keeps more than N."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < groups
    row_ptr = words_ptr + group // groups_in_row * words_in_row
    first = group % groups_in_row * M
    kept = tl.zeros([BLOCK], dtype=tl.int32)
    for place in range(0, M):
        column = first + place
        words = tl.load(row_ptr + column // 32, mask=inside, other=0)
        kept += (words >> (column % 32).to(tl.int32)) & 1
    tl.store(too_full_ptr + tl.program_id(0), tl.max((kept > N).to(tl.int8), axis=0))


# --- launchers ----------------------------------------------------------------------------------------------------


def pack_mask(mask: Tensor) -> Tensor:
    """As the op ``pack_mask``."""
    return _words_from(pack_kernel, mask)


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """As the op ``nm_mask``."""
    return _words_from(nm_kernel, scores, N=n, M=m)


def _words_from(kernel: Any, given: Tensor, **constants: Any) -> Tensor:
    """Launch a kernel that makes words from a tensor (..., K) of any strides."""
    width = given.shape[-1]
    rows, in_row = given.reshape(-1, width), cdiv(width, WORD)
    words = given.new_empty((*given.shape[:-1], in_row), dtype=torch.int32)
    arguments = (rows, words, words.numel(), in_row, width, *rows.stride())
    grid = cdiv(words.numel(), TILE.tiles["WORDS"])
    common.launch(kernel, grid, arguments, TILE, given.device, **constants)
    return words


def unpack_mask(words: Tensor, width: int) -> Tensor:
    """As the op ``unpack_mask``."""
    words = words.contiguous()
    mask = words.new_empty((*words.shape[:-1], width), dtype=torch.bool)
    arguments = (words, mask.view(torch.int8), words.numel(), words.shape[-1], width)
    common.launch(unpack_kernel, cdiv(words.numel(), TILE.tiles["WORDS"]), arguments, TILE, words.device)
    return mask


def zero_pruned(tensor: Tensor, words: Tensor) -> Tensor:
    """As the op ``zero_pruned``."""
    tensor, words = tensor.contiguous(), words.contiguous()
    out = torch.empty_like(tensor)
    config = Config({"BLOCK": 1024}, 4, 1)
    grid = cdiv(tensor.numel(), config.tiles["BLOCK"])
    arguments = (tensor, words, out, tensor.numel(), tensor.shape[-1])
    common.launch(zero_kernel, grid, arguments, config, tensor.device, FLAT=common.is_flat(tensor, words))
    return out


def zero_pruned_(tensor: Tensor, words: Tensor) -> None:
    """As the op ``zero_pruned_``."""
    if not tensor.is_contiguous():
        tensor.copy_(zero_pruned(tensor, words))
        return
    words = words.contiguous()
    bits = tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)
    config = Config({"BLOCK": 1024}, 4, 1)
    grid = cdiv(tensor.numel(), config.tiles["BLOCK"])
    arguments = (bits, words, tensor.numel(), tensor.shape[-1])
    common.launch(zero_in_place_kernel, grid, arguments, config, tensor.device, FLAT=common.is_flat(tensor, words))


def row_offsets(words: Tensor) -> Tensor:
    """As the op ``row_offsets``: counts of rows from a kernel, their running sum from torch's scan."""
    words = words.contiguous()
    offsets = words.new_zeros(words.shape[:-1].numel() + 1, dtype=torch.int64)
    config = Config({"WORDS": 128}, 4, 1)
    common.launch(count_kernel, len(offsets) - 1, (words, offsets[1:], words.shape[-1]), config, words.device)
    return offsets.cumsum_(0)


def is_nm(words: Tensor, width: int, n: int, m: int) -> Tensor:
    """As the op ``is_nm``."""
    words, in_row = words.contiguous(), width // m
    config = Config({"BLOCK": 1024}, 4, 1)
    groups = words.shape[:-1].numel() * in_row
    grid = cdiv(groups, config.tiles["BLOCK"])
    too_full = words.new_empty(grid, dtype=torch.int8)
    arguments = (words, too_full, groups, in_row, words.shape[-1])
    common.launch(nm_check_kernel, grid, arguments, config, words.device, N=n, M=m)
    return (too_full == 0).all()
