"""Masked linear layer, three products with the mask read as bits and expanded in registers.

    forward   y  = x (M * W)^T + b     (T, K) x (N, K)  ->  (T, N)
    input     dx = dy (M * W)          (T, N) x (N, K)  ->  (T, K)
    weight    dW = M * (dy^T x)        (T, N) x (T, K)  ->  (N, K)

T tokens, N outputs, K inputs. 2 T N K FLOPs each. Bytes read and written at least: those of the two operands and the result,
and N K / 8 for the mask, a sixteenth of a 16-bit weight.

The picture of the forward pass, one program a tile of y; the weight is the *A* operand (y^T = W x^T), because on Hopper that
one may come from registers, where the mask has just been applied:

              K                               T
         +---------+                    +----------+
       N | W  (BN x BK), * bits     K   | x^T (BK x BT)         acc (BN x BT), fp32  ->  y^T
         +---------+                    +----------+

Tiles of the weight that are pruned away whole are not visited: a list, made once with the mask, names the tiles of
each row (forward) or column (input gradient) that are not empty, and the loop runs over the list. A branch in the loop
would end its software pipelining.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ebft_kernels._triton.common import cdiv, expand_words, grouped_tile, words_in
from ebft_kernels._triton.configs import Config, config_for
from ebft_kernels._triton.tiles import TileList

# --- kernels ------------------------------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(
    x_ptr, w_ptr, words_ptr, bias_ptr, y_ptr, list_ptr, count_ptr,
    T, N, K, words_stride, list_stride,
    x_stride, w_stride, y_stride,
    HAS_BIAS: tl.constexpr, SKIP: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile (BN, BT) of y^T."""
    # 1. Which tile.
    n_tile, t_tile = grouped_tile(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(T, BT), GROUP)
    n, t = n_tile * BN + tl.arange(0, BN), t_tile * BT + tl.arange(0, BT)
    k, word = tl.arange(0, BK), tl.arange(0, BK // 32)

    # 2. Pointers. Rows beyond the ends read row 0 and are not stored.
    n_safe, t_safe = tl.where(n < N, n, 0), tl.where(t < T, t, 0)
    w_ptrs = w_ptr + n_safe[:, None].to(tl.int64) * w_stride + k[None, :]
    x_ptrs = x_ptr + t_safe[None, :].to(tl.int64) * x_stride + k[:, None]
    word_ptrs = words_ptr + n_safe[:, None].to(tl.int64) * words_stride + word[None, :]

    # 3. Loop over the tiles of this row that are not empty.
    acc = tl.zeros([BN, BT], dtype=tl.float32)
    steps = tl.load(count_ptr + n_tile) if SKIP else tl.cdiv(K, BK)
    for step in range(0, steps):
        k0 = (tl.load(list_ptr + n_tile * list_stride + step) if SKIP else step) * BK
        if EVEN_K:
            w, x, bits = tl.load(w_ptrs + k0), tl.load(x_ptrs + k0), tl.load(word_ptrs + k0 // 32)
        else:
            inside = k0 + k < K
            w = tl.load(w_ptrs + k0, mask=inside[None, :], other=0.0)
            x = tl.load(x_ptrs + k0, mask=inside[:, None], other=0.0)
            bits = tl.load(word_ptrs + k0 // 32, mask=(k0 // 32 + word < words_stride)[None, :], other=0)
        w = tl.where(expand_words(bits, BN, BK // 32), w, 0.0)
        acc = tl.dot(w, x, acc, input_precision=PRECISION)

    # 4. Store.
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n_safe).to(tl.float32)[:, None]
    y_ptrs = y_ptr + t[None, :].to(tl.int64) * y_stride + n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(n < N)[:, None] & (t < T)[None, :])


@triton.jit
def dx_kernel(
    dy_ptr, w_ptr, words_ptr, dx_ptr, list_ptr, count_ptr,
    T, N, K, words_stride, list_stride,
    dy_stride, w_stride, dx_stride,
    SKIP: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile (BT, BK) of dx; the loop runs down the outputs N."""
    # 1. Which tile.
    k_tile, t_tile = grouped_tile(tl.program_id(0), tl.cdiv(K, BK), tl.cdiv(T, BT), GROUP)
    k, t = k_tile * BK + tl.arange(0, BK), t_tile * BT + tl.arange(0, BT)
    n, word = tl.arange(0, BN), k_tile * (BK // 32) + tl.arange(0, BK // 32)

    # 2. Pointers.
    k_safe, t_safe = tl.where(k < K, k, 0), tl.where(t < T, t, 0)
    word_safe = tl.where(word < words_stride, word, 0)
    dy_ptrs = dy_ptr + t_safe[:, None].to(tl.int64) * dy_stride + n[None, :]
    w_ptrs = w_ptr + n[:, None].to(tl.int64) * w_stride + k_safe[None, :]
    word_ptrs = words_ptr + n[:, None].to(tl.int64) * words_stride + word_safe[None, :]

    # 3. Loop over the tiles of this column that are not empty.
    acc = tl.zeros([BT, BK], dtype=tl.float32)
    steps = tl.load(count_ptr + k_tile) if SKIP else tl.cdiv(N, BN)
    for step in range(0, steps):
        n0 = (tl.load(list_ptr + k_tile * list_stride + step) if SKIP else step) * BN
        rows = n0.to(tl.int64)
        if EVEN_N:
            dy, w = tl.load(dy_ptrs + n0), tl.load(w_ptrs + rows * w_stride)
            bits = tl.load(word_ptrs + rows * words_stride)
        else:
            inside = n0 + n < N
            dy = tl.load(dy_ptrs + n0, mask=inside[None, :], other=0.0)
            w = tl.load(w_ptrs + rows * w_stride, mask=inside[:, None], other=0.0)
            bits = tl.load(word_ptrs + rows * words_stride, mask=inside[:, None], other=0)
        w = tl.where(expand_words(bits, BN, BK // 32), w, 0.0)
        acc = tl.dot(dy, w, acc, input_precision=PRECISION)

    # 4. Store.
    dx_ptrs = dx_ptr + t[:, None].to(tl.int64) * dx_stride + k[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=(t < T)[:, None] & (k < K)[None, :])


@triton.jit
def dw_kernel(
    dy_ptr, x_ptr, words_ptr, dw_ptr,
    T, N, K, words_stride,
    dy_stride, x_stride, dw_stride,
    EVEN_T: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile (BN, BK) of dW; the loop runs down the tokens, and the mask is applied at the end."""
    # 1. Which tile.
    n_tile, k_tile = grouped_tile(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(K, BK), GROUP)
    n, k = n_tile * BN + tl.arange(0, BN), k_tile * BK + tl.arange(0, BK)
    t, word = tl.arange(0, BT), k_tile * (BK // 32) + tl.arange(0, BK // 32)

    # 2. Pointers.
    n_safe, k_safe = tl.where(n < N, n, 0), tl.where(k < K, k, 0)
    dy_ptrs = dy_ptr + t[None, :].to(tl.int64) * dy_stride + n_safe[:, None]
    x_ptrs = x_ptr + t[:, None].to(tl.int64) * x_stride + k_safe[None, :]

    # 3. Loop over the tokens; none for a tile that is pruned away whole.
    bits_inside = (n < N)[:, None] & (word < words_stride)[None, :]
    bits = tl.load(words_ptr + n_safe[:, None].to(tl.int64) * words_stride + word[None, :], mask=bits_inside, other=0)
    any_kept = tl.max(tl.max((bits != 0).to(tl.int32), axis=1), axis=0)
    acc = tl.zeros([BN, BK], dtype=tl.float32)
    for t0 in range(0, T * any_kept, BT):
        rows = t0.to(tl.int64)
        if EVEN_T:
            dy, x = tl.load(dy_ptrs + rows * dy_stride), tl.load(x_ptrs + rows * x_stride)
        else:
            inside = t0 + t < T
            dy = tl.load(dy_ptrs + rows * dy_stride, mask=inside[None, :], other=0.0)
            x = tl.load(x_ptrs + rows * x_stride, mask=inside[:, None], other=0.0)
        acc = tl.dot(dy, x, acc, input_precision=PRECISION)

    # 4. Store.
    acc = tl.where(expand_words(bits, BN, BK // 32), acc, 0.0)
    dw_ptrs = dw_ptr + n[:, None].to(tl.int64) * dw_stride + k[None, :]
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])
