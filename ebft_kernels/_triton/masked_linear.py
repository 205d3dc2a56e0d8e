"""Masked linear layer: three products, with the mask read as bits and expanded in registers.

    forward   y  = x (M * W)^T + b     (T, K) and (N, K)  ->  (T, N)
    input     dx = dy (M * W)          (T, N) and (N, K)  ->  (T, K)
    weight    dW = M * (dy^T x)        (T, N) and (T, K)  ->  (N, K)

T tokens, N outputs, K inputs; 2 T N K FLOPs each. Least bytes: both operands and the result, and N K / 8 for the
mask, which is a sixteenth of a 16-bit weight.

Forward and input gradient are one kernel, because transposed they are one product: out^T = A in^T, where A is M * W
or its transpose. The weight is the left operand on purpose: on Hopper (wgmma) the left one may come from registers,
where the mask has just been applied, while the right one has to lie in shared memory.

              J                                T
         +--------------+                +--------------+
       I | A  (BI x BJ) | * bits       J | in^T (BJ x BT)|        acc (BI x BT), float32  ->  out^T
         +--------------+                +--------------+

    forward:  I = N, J = K, a mask word runs along J        input gradient:  I = K, J = N, a mask word runs along I

Tiles of the weight that are pruned away whole are not visited: a list made once with the mask (``tiles.py``) names,
for each line of tiles, those that are not empty, and the loop runs over the list. A branch in the loop would end its
pipelining.

dW is summed over tokens without a mask, which is applied once to the finished tile; a tile without a kept weight runs
no loop.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ebft_kernels._triton import common, tiles
from ebft_kernels._triton.common import cdiv, expand_words, expand_words_down, grouped_tile
from ebft_kernels._triton.configs import Config, config_for, shape_class

# --- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def product_kernel(
    w_ptr, words_ptr, in_ptr, bias_ptr, out_ptr, numbers_ptr, counts_ptr,
    I, J, T, w_stride_i, w_stride_j, words_stride, in_stride_t, in_stride_j, list_stride,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, SKIP: tl.constexpr, EVEN_I: tl.constexpr, EVEN_J: tl.constexpr,
    PRECISION: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile (BI, BT) of out^T = A in^T; A is the masked weight, or its transpose (TRANSPOSED)."""
    # 1. Which tile.
    i_tile, t_tile = grouped_tile(tl.program_id(0), tl.cdiv(I, BI), tl.cdiv(T, BT), GROUP)
    i, t, j = i_tile * BI + tl.arange(0, BI), t_tile * BT + tl.arange(0, BT), tl.arange(0, BJ)

    # 2. Pointers. Tokens beyond the end read token 0 and are not stored.
    t_safe = tl.where(t < T, t, 0)
    w_ptrs = w_ptr + i[:, None].to(tl.int64) * w_stride_i + j[None, :].to(tl.int64) * w_stride_j
    in_ptrs = in_ptr + t_safe[None, :].to(tl.int64) * in_stride_t + j[:, None].to(tl.int64) * in_stride_j
    if TRANSPOSED:
        word_i = i_tile * (BI // 32) + tl.arange(0, BI // 32)
        word_ptrs = words_ptr + j[None, :].to(tl.int64) * words_stride + word_i[:, None]
    else:
        word_j = tl.arange(0, BJ // 32)
        word_ptrs = words_ptr + i[:, None].to(tl.int64) * words_stride + word_j[None, :]

    # 3. Loop over the tiles of this line that are not empty.
    acc = tl.zeros([BI, BT], dtype=tl.float32)
    steps = tl.load(counts_ptr + i_tile) if SKIP else tl.cdiv(J, BJ)
    for step in range(0, steps):
        j0 = (tl.load(numbers_ptr + i_tile * list_stride + step) if SKIP else step) * BJ
        w_at, in_at = w_ptrs + tl.cast(j0, tl.int64) * w_stride_j, in_ptrs + tl.cast(j0, tl.int64) * in_stride_j
        words_at = word_ptrs + (tl.cast(j0, tl.int64) * words_stride if TRANSPOSED else j0 // 32)
        j_inside = j0 + j < J
        if EVEN_I and EVEN_J:
            w, words = tl.load(w_at), tl.load(words_at)
        else:
            w = tl.load(w_at, mask=(i < I)[:, None] & j_inside[None, :], other=0.0)
            if TRANSPOSED:
                words = tl.load(words_at, mask=(word_i < words_stride)[:, None] & j_inside[None, :], other=0)
            else:
                words = tl.load(words_at, mask=(i < I)[:, None] & (j0 // 32 + word_j < words_stride)[None, :], other=0)
        operand = tl.load(in_at) if EVEN_J else tl.load(in_at, mask=j_inside[:, None], other=0.0)
        kept = expand_words_down(words, BI // 32, BJ) if TRANSPOSED else expand_words(words, BI, BJ // 32)
        acc = tl.dot(tl.where(kept, w, 0.0), operand, acc, input_precision=PRECISION)

    # 4. Store.
    if HAS_BIAS:
        acc += tl.load(bias_ptr + i, mask=i < I, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + t[None, :].to(tl.int64) * I + i[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(i < I)[:, None] & (t < T)[None, :])


@triton.jit
def gradient_tile(
    dy_ptr, x_ptr, n, k, N, K, T, dy_stride_t, dy_stride_n, x_stride_t, x_stride_k,
    EVEN_TILE: tl.constexpr, EVEN_T: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """dy^T x at outputs ``n`` (BN) and inputs ``k`` (BK), summed over T tokens in float32, unmasked."""
    t = tl.arange(0, BT)
    dy_ptrs = dy_ptr + t[None, :].to(tl.int64) * dy_stride_t + n[:, None].to(tl.int64) * dy_stride_n
    x_ptrs = x_ptr + t[:, None].to(tl.int64) * x_stride_t + k[None, :].to(tl.int64) * x_stride_k
    acc = tl.zeros([BN, BK], dtype=tl.float32)
    for t0 in range(0, T, BT):
        dy_at, x_at = dy_ptrs + tl.cast(t0, tl.int64) * dy_stride_t, x_ptrs + tl.cast(t0, tl.int64) * x_stride_t
        if EVEN_TILE and EVEN_T:
            dy, x = tl.load(dy_at), tl.load(x_at)
        else:
            dy = tl.load(dy_at, mask=(n < N)[:, None] & (t0 + t < T)[None, :], other=0.0)
            x = tl.load(x_at, mask=(t0 + t < T)[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(dy, x, acc, input_precision=PRECISION)
    return acc


@triton.jit
def tile_words(words_ptr, n, k_tile, N, words_stride, BK: tl.constexpr):
    """The mask words (rows n, BK / 32) of a tile of the weight, and 1 if the tile keeps anything, otherwise 0."""
    word = k_tile * (BK // 32) + tl.arange(0, BK // 32)
    inside = (n < N)[:, None] & (word < words_stride)[None, :]
    words = tl.load(words_ptr + n[:, None].to(tl.int64) * words_stride + word[None, :], mask=inside, other=0)
    return words, tl.max(tl.max((words != 0).to(tl.int32), axis=1), axis=0)


@triton.jit
def gradient_kernel(
    dy_ptr, x_ptr, words_ptr, dw_ptr,
    N, K, T, words_stride, dy_stride_t, dy_stride_n, x_stride_t, x_stride_k,
    EVEN_TILE: tl.constexpr, EVEN_T: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile (BN, BK) of dW = M * (dy^T x)."""
    # 1. Which tile.
    n_tile, k_tile = grouped_tile(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(K, BK), GROUP)
    n, k = n_tile * BN + tl.arange(0, BN), k_tile * BK + tl.arange(0, BK)

    # 2. The tile's mask.
    words, some_kept = tile_words(words_ptr, n, k_tile, N, words_stride, BK)

    # 3. Loop over the tokens; over none where nothing is kept.
    acc = gradient_tile(
        dy_ptr, x_ptr, n, k, N, K, T * some_kept, dy_stride_t, dy_stride_n, x_stride_t, x_stride_k,
        EVEN_TILE, EVEN_T, PRECISION, BN, BK, BT,
    )  # fmt: skip

    # 4. Store.
    acc = tl.where(expand_words(words, BN, BK // 32), acc, 0.0)
    dw_ptrs = dw_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


# --- launchers ----------------------------------------------------------------------------------------------------


def masked_linear(x: Tensor, weight: Tensor, words: Tensor, bias: Tensor | None, zeroed: bool) -> Tensor:
    """As the op ``masked_linear``; ``zeroed`` makes no difference here."""
    return _product(x, weight, words, bias, transposed=False)


def masked_linear_dx(dy: Tensor, weight: Tensor, words: Tensor, zeroed: bool) -> Tensor:
    """As the op ``masked_linear_dx``."""
    return _product(dy, weight, words, None, transposed=True)


def _product(given: Tensor, weight: Tensor, words: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    n, k = weight.shape
    i, j = (k, n) if transposed else (n, k)
    rows = given.reshape(-1, j)
    out = given.new_empty((*given.shape[:-1], i))
    t = rows.shape[0]
    if out.numel() == 0:
        return out
    config = config_of("product", t, rows, weight)
    bi, bt, bj = (config.tiles[name] for name in ("BI", "BT", "BJ"))
    nonempty = tiles.lines_of(words, *((bj, bi, "down") if transposed else (bi, bj, "along")))
    if nonempty:  # a load whose address is loaded takes two stages of the pipeline
        config = replace(config, stages=2 * config.stages - 1)
    w_strides = weight.stride()[::-1] if transposed else weight.stride()
    words = words.contiguous()
    common.launch(
        product_kernel,
        cdiv(i, bi) * cdiv(t, bt),
        (
            weight,
            words,
            rows,
            None if bias is None else bias.contiguous(),
            out,
            nonempty and nonempty.numbers,
            nonempty and nonempty.counts,
            i,
            j,
            t,
            *w_strides,
            words.shape[1],
            *rows.stride(),
            nonempty.numbers.stride(0) if nonempty else 0,
        ),
        config,
        given.device,
        TRANSPOSED=transposed,
        HAS_BIAS=bias is not None,
        SKIP=nonempty is not None,
        EVEN_I=i % bi == 0,
        EVEN_J=j % bj == 0,
        PRECISION=precision(),
    )
    return out


def masked_linear_dw(dy: Tensor, x: Tensor, words: Tensor) -> Tensor:
    """As the op ``masked_linear_dw``."""
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    (t, n), k = dy.shape, x.shape[1]
    dw = x.new_empty((n, k))
    config = config_of("gradient", t, dy, x)
    bn, bk, bt = (config.tiles[name] for name in ("BN", "BK", "BT"))
    words = words.contiguous()
    common.launch(
        gradient_kernel,
        cdiv(n, bn) * cdiv(k, bk),
        (dy, x, words, dw, n, k, t, words.shape[1], *dy.stride(), *x.stride()),
        config,
        x.device,
        EVEN_TILE=n % bn == 0 and k % bk == 0,
        EVEN_T=t % bt == 0,
        PRECISION=precision(),
    )
    return dw


def config_of(kernel: str, tokens: int, *operands: Tensor) -> Config:
    """The config of a product of 2-D ``operands`` over so many tokens."""
    first = operands[0]
    shape = shape_class(tokens) if all(map(_aligned, operands)) else "ragged"
    if first.dtype == torch.float32 and precision() == "ieee":
        shape = "ieee"
    name = common.device_name(first.device)
    return config_for(kernel, shape, common.capability(first.device), first.element_size(), name)


def _aligned(operand: Tensor) -> bool:
    """Rows begin at multiples of 16 elements, one element after another: what Triton needs for wide, pipelined
    loads."""
    return operand.stride(1) == 1 and operand.stride(0) % 16 == 0 and operand.data_ptr() % 16 == 0


def precision() -> str:
    """How float32 operands are multiplied: ``tf32`` where torch's own products may use it, else ``ieee``."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
