"""Masked AdamW in one pass over the bytes that must move, for all parameters of a block in one launch or a few.

    g = grad_scale * gradient      m <- beta1 m + (1 - beta1) g        w <- (1 - lr * decay) w
                                   v <- beta2 v + (1 - beta2) g^2      w <- w - step_size m / (sqrt(v) correction + eps)

Pruned weights and their stored moments become 0. Bytes a weight, beside the mask's eighth: parameter read and
written, gradient read (and written if it is zeroed), each stored state read and written: 28 with float32 everything,
of which compact states move only the kept share. About 20 FLOPs a weight, and 60 integer operations more where
rounding is stochastic.

Many tensors, one launch: a table in device memory has a row a parameter (addresses, sizes, the number of its first
program); a program finds its row by its own number. Parameters that differ in dtype or layout take launches of their
own.

Two kernels. *Dense* states: a program updates BLOCK consecutive weights, whole blocks of 256 8-bit codes among them.

*Compact* states: a program updates BLOCK consecutive *stored* entries and the weights that they belong to, wherever
these are:

    stored      . . . |  begin ........ end  | . . .      entry = kept weights before a place = row offset
    places   1 0 0 1 1 0 [0 1 1 0 0 0 1 0 1 1] 0 1 0              + words before it in the row + lower bits of its word
                       |<----- walked ----->|

It finds the row of entry ``begin`` - 1 by search in the row offsets, the word by counting bits, and walks on from
there, WORDS mask words at a time. A pruned place belongs to the entry that follows it. 8-bit moments need the largest
of their 256 entries before the first code can be written: BLOCK is 256 then, and the stretch is walked twice, the
second time from the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ebft_kernels._triton import common
from ebft_kernels._triton.adamw_math import (
    dequantized,
    new_moments,
    new_weight,
    quantized,
    scale_of,
    size_bits,
    stored_weight,
)
from ebft_kernels._triton.common import cdiv, entry_of, kept_at, narrowed, number, pointer, popcount
from ebft_kernels._triton.configs import Config
from ebft_kernels.adamw import AdamWStep
from ebft_kernels.reference import QUANTIZED_BLOCK

# Columns of the table.
FIRST, PARAM, GRAD, M, V, M_SCALE, V_SCALE, MASTER, WORDS_AT, OFFSETS, NUMEL, STORED, WIDTH, ID = map(
    tl.constexpr, range(14)
)
COLUMNS = tl.constexpr(14)
CODES = tl.constexpr(QUANTIZED_BLOCK)  # 8-bit codes that share a scale

DENSE = Config({"BLOCK": 1024}, 4, 1)
# Of one warp, because a walk is a chain of loads and sums: many short ones at a time (benchmarks/compact_step.py).
COMPACT = Config({"BLOCK": 1024, "WORDS": 4}, 1, 1)
COMPACT_CODES = Config({"BLOCK": QUANTIZED_BLOCK, "WORDS": 4}, 1, 1)

# --- kernels ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed", "step"])
def dense_kernel(
    table_ptr, grad_scale_ptr, decay, beta1, rest1, beta2, rest2, step_size, correction, eps, seed, step,
    COUNT: tl.constexpr, WEIGHT: tl.constexpr, MOMENT1: tl.constexpr, MOMENT2: tl.constexpr, QUANTIZED: tl.constexpr,
    MASTERED: tl.constexpr, STOCHASTIC: tl.constexpr, ZERO_GRADS: tl.constexpr, FLAT: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK consecutive weights of one parameter with dense states."""
    # 1. Which parameter, and where in it.
    pid = tl.program_id(0)
    row_ptr = table_ptr + entry_of(table_ptr, pid, FIRST, COLUMNS, COUNT) * COLUMNS
    start = (pid - tl.load(row_ptr + FIRST)) * BLOCK
    offsets, left = tl.arange(0, BLOCK), number(row_ptr, NUMEL, ALIGNED) - start
    inside = offsets < left

    # 2. Pointers.
    param_ptrs = pointer(row_ptr, PARAM, WEIGHT, ALIGNED) + start + offsets
    grad_ptrs = pointer(row_ptr, GRAD, WEIGHT, ALIGNED) + start + offsets
    m_ptrs = pointer(row_ptr, M, MOMENT1, ALIGNED) + start + offsets
    v_ptrs = pointer(row_ptr, V, MOMENT2, ALIGNED) + start + offsets
    weight_ptrs = pointer(row_ptr, MASTER, tl.float32, ALIGNED) + start + offsets if MASTERED else param_ptrs

    # 3. Update.
    kept = inside & kept_at(tl.load(row_ptr + WORDS_AT), start, offsets, left, tl.load(row_ptr + WIDTH), FLAT)
    grad = tl.where(kept, tl.load(grad_ptrs, mask=inside, other=0.0).to(tl.float32), 0.0)
    if grad_scale_ptr is not None:
        grad *= tl.load(grad_scale_ptr)
    w = tl.load(weight_ptrs, mask=inside, other=0.0).to(tl.float32)
    m, v = tl.load(m_ptrs, mask=inside, other=0), tl.load(v_ptrs, mask=inside, other=0)
    if QUANTIZED:
        scale_at = start // CODES + offsets // CODES
        m_scale = tl.load(pointer(row_ptr, M_SCALE, tl.float32, False) + scale_at, mask=inside, other=0.0)
        v_scale = tl.load(pointer(row_ptr, V_SCALE, tl.float32, False) + scale_at, mask=inside, other=0.0)
        m, v = dequantized(m, m_scale, True), dequantized(v, v_scale, False)
    m, v = new_moments(grad, m.to(tl.float32), v.to(tl.float32), beta1, rest1, beta2, rest2)
    w = tl.where(kept, new_weight(w, m, v, decay, step_size, correction, eps), 0.0)
    m, v = tl.where(kept, m, 0.0), tl.where(kept, v, 0.0)

    # 4. Store.
    if QUANTIZED:
        m, new_m_scale = block_codes(m, True, BLOCK)
        v, new_v_scale = block_codes(v, False, BLOCK)
        block = start // CODES + tl.arange(0, BLOCK // CODES)
        filled = tl.arange(0, BLOCK // CODES) * CODES < left
        tl.store(pointer(row_ptr, M_SCALE, tl.float32, False) + block, new_m_scale, mask=filled)
        tl.store(pointer(row_ptr, V_SCALE, tl.float32, False) + block, new_v_scale, mask=filled)
    tl.store(m_ptrs, narrowed(m, MOMENT1), mask=inside)
    tl.store(v_ptrs, narrowed(v, MOMENT2), mask=inside)
    if MASTERED:
        tl.store(weight_ptrs, w, mask=inside)
    param_id = tl.load(row_ptr + ID)
    tl.store(param_ptrs, stored_weight(w, start + offsets, seed, step, param_id, STOCHASTIC, WEIGHT), mask=inside)
    if ZERO_GRADS:
        tl.store(grad_ptrs, tl.zeros([BLOCK], dtype=WEIGHT), mask=inside)


@triton.jit
def block_codes(values, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Codes (BLOCK,) and scales (BLOCK / 256,) of consecutive stored values."""
    blocks = tl.reshape(values, [BLOCK // CODES, CODES])
    scale, factor = scale_of(tl.max(size_bits(blocks), axis=1), SIGNED)
    return tl.reshape(quantized(blocks, factor[:, None], SIGNED), [BLOCK]), scale


@triton.jit(do_not_specialize=["seed", "step"])
def compact_kernel(
    table_ptr, grad_scale_ptr, decay, beta1, rest1, beta2, rest2, step_size, correction, eps, seed, step,
    COUNT: tl.constexpr, WEIGHT: tl.constexpr, MOMENT1: tl.constexpr, MOMENT2: tl.constexpr, QUANTIZED: tl.constexpr,
    MASTERED: tl.constexpr, STOCHASTIC: tl.constexpr, ZERO_GRADS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """BLOCK consecutive stored entries of one parameter with compact states, and the weights that belong to them."""
    # 1. Which parameter, and which entries: begin <= entry < end. What follows the last belongs to the last program.
    pid = tl.program_id(0)
    row_ptr = table_ptr + entry_of(table_ptr, pid, FIRST, COLUMNS, COUNT) * COLUMNS
    block, stored, width = pid - tl.load(row_ptr + FIRST), tl.load(row_ptr + STORED), number(row_ptr, WIDTH, ALIGNED)
    begin = block * BLOCK
    end = tl.where(begin + BLOCK < stored, begin + BLOCK, stored + 1)
    words_in_row = tl.cdiv(width, 32).to(tl.int32)
    rows = tl.load(row_ptr + NUMEL) // width

    # 2. Pointers, and where entry ``begin`` - 1 is kept.
    words_ptr = pointer(row_ptr, WORDS_AT, tl.int32, False)
    offsets_ptr = pointer(row_ptr, OFFSETS, tl.int64, False)
    param_ptr, grad_ptr = pointer(row_ptr, PARAM, WEIGHT, ALIGNED), pointer(row_ptr, GRAD, WEIGHT, ALIGNED)
    m_ptr, v_ptr = pointer(row_ptr, M, MOMENT1, False) + begin, pointer(row_ptr, V, MOMENT2, False) + begin
    master_ptr = pointer(row_ptr, MASTER, tl.float32, False) + begin
    m_scale_ptr = pointer(row_ptr, M_SCALE, tl.float32, False) + block
    v_scale_ptr = pointer(row_ptr, V_SCALE, tl.float32, False) + block
    first_row = row_holding(offsets_ptr, rows, begin - 1)
    offset = tl.load(offsets_ptr + first_row)
    first_word, before = word_holding(words_ptr + first_row * words_in_row, words_in_row, begin - 1 - offset)
    # From here on, ``begin`` is entry 0.
    first_entry, count = (offset + before - begin).to(tl.int32), (end - begin).to(tl.int32)

    param_id = tl.load(row_ptr + ID)
    m_scale, v_scale, m_factor, v_factor, m_largest, v_largest = 0.0, 0.0, 0.0, 0.0, 0, 0
    if QUANTIZED:
        m_scale = tl.load(m_scale_ptr, mask=stored > 0, other=0.0)
        v_scale = tl.load(v_scale_ptr, mask=stored > 0, other=0.0)

    # 3. Walk: once to update and store; before that, with 8-bit moments, once to find the largest.
    for STORE in tl.static_range(0 if QUANTIZED else 1, 2):
        row, word, entry = first_row, first_word, first_entry
        while (row < rows) & (entry < count):
            columns = word + tl.arange(0, WORDS)
            words = tl.load(words_ptr + row * words_in_row + columns, mask=columns < words_in_row, other=0)
            counts = popcount(words)
            bit = tl.arange(0, 32)[None, :]
            entries = (entry + tl.cumsum(counts, axis=0) - counts)[:, None]
            entries += popcount(words[:, None] & ((1 << bit) - 1))
            column = columns[:, None] * 32 + bit
            mine = (column < width) & (entries >= 0) & (entries < count)
            kept = mine & (((words[:, None] >> bit) & 1) != 0)
            param_ptrs, grad_ptrs = param_ptr + row * width + column, grad_ptr + row * width + column

            grad = tl.load(grad_ptrs, mask=column < width, other=0.0).to(tl.float32)
            if grad_scale_ptr is not None:
                grad *= tl.load(grad_scale_ptr)
            m, v = tl.load(m_ptr + entries, mask=kept, other=0), tl.load(v_ptr + entries, mask=kept, other=0)
            if QUANTIZED:
                m, v = dequantized(m, m_scale, True), dequantized(v, v_scale, False)
            m, v = new_moments(grad, m.to(tl.float32), v.to(tl.float32), beta1, rest1, beta2, rest2)
            if STORE:
                if MASTERED:
                    w = tl.load(master_ptr + entries, mask=kept, other=0.0)
                else:
                    w = tl.load(param_ptrs, mask=column < width, other=0.0).to(tl.float32)
                w = tl.where(kept, new_weight(w, m, v, decay, step_size, correction, eps), 0.0)
                if MASTERED:
                    tl.store(master_ptr + entries, w, mask=kept)
                if QUANTIZED:
                    m, v = quantized(m, m_factor, True), quantized(v, v_factor, False)
                tl.store(m_ptr + entries, narrowed(m, MOMENT1), mask=kept)
                tl.store(v_ptr + entries, narrowed(v, MOMENT2), mask=kept)
                rounded = stored_weight(w, row * width + column, seed, step, param_id, STOCHASTIC, WEIGHT)
                tl.store(param_ptrs, rounded, mask=mine)
                if ZERO_GRADS:
                    tl.store(grad_ptrs, tl.zeros([WORDS, 32], dtype=WEIGHT), mask=mine)
            else:
                m_largest = max(m_largest, tl.max(tl.max(tl.where(kept, size_bits(m), 0), axis=1), axis=0))
                v_largest = max(v_largest, tl.max(tl.max(tl.where(kept, size_bits(v), 0), axis=1), axis=0))

            entry += tl.sum(counts, axis=0)
            word += WORDS
            row, word = tl.where(word < words_in_row, row, row + 1), tl.where(word < words_in_row, word, 0)
        if QUANTIZED and STORE == 0:
            m_scale_new, m_factor = scale_of(m_largest, True)
            v_scale_new, v_factor = scale_of(v_largest, False)
            tl.store(m_scale_ptr, m_scale_new, mask=stored > 0)
            tl.store(v_scale_ptr, v_scale_new, mask=stored > 0)


@triton.jit
def row_holding(offsets_ptr, rows, entry):
    """The last row that begins at or before a stored entry (row 0 for entry -1): 128 rows are probed at a time."""
    row, span = rows * 0, rows
    while span > 1:
        apart = tl.cdiv(span, 128)
        probes = row + apart * tl.arange(0, 128)
        starts = tl.load(offsets_ptr + probes, mask=(probes < rows), other=0x7FFFFFFFFFFFFFFF)
        reached = tl.sum(((starts <= entry) & (probes < row + span)).to(tl.int64), axis=0)
        row += apart * tl.where(reached > 0, reached - 1, 0)
        span = tl.where(apart > 1, apart, 1)
    return row


@triton.jit
def word_holding(words_ptr, words_in_row, entry):
    """The word of a row that keeps its entry number ``entry`` (word 0 for -1), and how many entries come before it."""
    word, before = words_in_row * 0, words_in_row * 0
    if entry >= 0:
        for first in range(0, words_in_row, 256):
            columns = first + tl.arange(0, 256)
            counts = popcount(tl.load(words_ptr + columns, mask=columns < words_in_row, other=0))
            sums = before + tl.cumsum(counts, axis=0)
            passed = (sums <= entry) & (columns < words_in_row)
            word += tl.sum(passed.to(tl.int32), axis=0)
            before += tl.sum(tl.where(passed, counts, 0), axis=0)
    return word, before


# --- launcher -----------------------------------------------------------------------------------------------------


def masked_adamw_step(adamw: AdamWStep) -> None:
    """As the op ``masked_adamw_step``."""
    used, numbers = adamw.each(Tensor.contiguous), hyperparameters(adamw)
    scale = None if used.grad_scale is None else used.grad_scale.float()

    def layout(i: int) -> tuple[Any, ...]:
        param, grad, m, v, _, _, master, words, offsets = (of[i] for of in used.tensors)
        compact = bool(offsets.numel())
        if compact:
            aligned = common.is_aligned(common.width_of(param), param, grad)
        else:
            aligned = common.is_aligned(param.numel(), param, grad, m, v, master)
        return (
            compact, param.dtype, m.dtype, v.dtype, bool(master.numel()), compact or common.is_flat(param, words),
            aligned,
        )  # fmt: skip

    chosen = [i for i, param in enumerate(used.params) if param.numel()]
    for (compact, weight, moment1, moment2, mastered, flat, aligned), alike in common.alike(chosen, layout):
        quantized = moment1 == torch.int8
        config = (COMPACT_CODES if quantized else COMPACT) if compact else DENSE
        block, rows, programs = config.tiles["BLOCK"], [], 0
        for i in alike:
            param, words, stored = used.params[i], used.words[i], used.exp_avgs[i].numel()
            addresses = [of[i].data_ptr() for of in used.written]
            addresses += [words.data_ptr() if words.numel() else 0, used.row_offsets[i].data_ptr()]
            sizes = (param.numel(), stored, common.width_of(param))
            rows.append([programs, *addresses, *sizes, used.param_ids[i]])
            programs += max(1, cdiv(stored, block))
        device = used.params[0].device
        table = common.table_on(device, rows, behind=programs)
        common.launch(
            compact_kernel if compact else dense_kernel, programs,
            (table, scale, *numbers, used.seed, used.step),
            config, device, exact=True, COUNT=len(table), WEIGHT=common.NUMBERS[weight],
            MOMENT1=common.NUMBERS[moment1], MOMENT2=common.NUMBERS[moment2], QUANTIZED=quantized, MASTERED=mastered,
            STOCHASTIC=used.stochastic, ZERO_GRADS=used.zero_grads, ALIGNED=aligned,
            **({} if compact else {"FLAT": flat}),
        )  # fmt: skip
    for given, was_used in zip(adamw.written, used.written, strict=True):
        for tensor, contiguous in zip(given, was_used, strict=True):
            if tensor is not contiguous:
                tensor.copy_(contiguous)


def hyperparameters(adamw: AdamWStep) -> tuple[float, ...]:
    """What a kernel needs of a step's settings, computed in float64 as the reference does."""
    beta1, beta2 = adamw.beta1, adamw.beta2
    step_size, correction = adamw.lr / (1 - beta1**adamw.step), (1 - beta2**adamw.step) ** -0.5
    return 1 - adamw.lr * adamw.weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, step_size, correction, adamw.eps
