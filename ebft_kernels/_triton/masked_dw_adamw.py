"""Weight gradient and masked AdamW step in one kernel: dW never leaves the registers.

    g = dy^T x (float32, not rounded to 16 bits in between)      then the step of ``masked_adamw.py`` on M, W, m, v

2 T N K FLOPs, as dW alone. Bytes beside the operands: those of the step without its gradient, and no N K elements of
dW written and read again, which is also the memory that is saved.

A program has a tile (BN, BK) of the gradient in registers when its sum over tokens is done. It walks over that tile
in four column sub-tiles, so that weight and moments of a quarter are held at a time and nothing spills:

          BK                      BK / 4
    +------------+      +--+--+--+--+
    | acc        |  ->  | 0| 1| 2| 3|  BN        for each: load bits, w, m, v; step; store w, m, v
    +------------+      +--+--+--+--+

Dense float32 or bfloat16 moments. 8-bit moments share a scale with 255 neighbours in the next tile, and compact
states begin where the rows before them end: for those, dW is made and used at once, one layer at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ebft_kernels._triton import common
from ebft_kernels._triton.adamw_math import new_moments, new_weight, stored_weight
from ebft_kernels._triton.common import cdiv, expand_words, grouped_tile, narrowed
from ebft_kernels._triton.masked_adamw import hyperparameters
from ebft_kernels._triton.masked_linear import config_of, gradient_tile, precision, tile_words
from ebft_kernels.adamw import AdamWStep

_OPS = torch.ops.ebft_kernels


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of the columns of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@triton.jit(do_not_specialize=["seed", "step", "param_id"])
def gradient_step_kernel(
    dy_ptr, x_ptr, words_ptr, param_ptr, m_ptr, v_ptr, master_ptr,
    N, K, T, words_stride, dy_stride_t, dy_stride_n, x_stride_t, x_stride_k,
    decay, beta1, rest1, beta2, rest2, step_size, correction, eps, seed, step, param_id,
    STOCHASTIC: tl.constexpr, EVEN_TILE: tl.constexpr, EVEN_T: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile (BN, BK) of the weight, updated."""
    # 1. Which tile.
    n_tile, k_tile = grouped_tile(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(K, BK), GROUP)
    n, k = n_tile * BN + tl.arange(0, BN), k_tile * BK + tl.arange(0, BK)

    # 2. Does the tile keep anything?
    words, some_kept = tile_words(words_ptr, n, k_tile, N, words_stride, BK)

    # 3. Loop over the tokens; over none where nothing is kept.
    acc = gradient_tile(
        dy_ptr, x_ptr, n, k, N, K, T * some_kept, dy_stride_t, dy_stride_n, x_stride_t, x_stride_k,
        EVEN_TILE, EVEN_T, PRECISION, BN, BK, BT,
    )  # fmt: skip

    # 4. Update, a quarter of the columns at a time.
    left, right = halves(acc, BN, BK)
    quarters = halves(left, BN, BK // 2) + halves(right, BN, BK // 2)
    WIDTH: tl.constexpr = BK // 4
    for quarter in tl.static_range(4):
        columns = k_tile * BK + quarter * WIDTH + tl.arange(0, WIDTH)
        word = (k_tile * BK + quarter * WIDTH) // 32 + tl.arange(0, WIDTH // 32)
        inside = (n < N)[:, None] & (word < words_stride)[None, :]
        words = tl.load(words_ptr + n[:, None].to(tl.int64) * words_stride + word[None, :], mask=inside, other=0)
        kept, inside = expand_words(words, BN, WIDTH // 32), (n < N)[:, None] & (columns < K)[None, :]
        place = n[:, None].to(tl.int64) * K + columns[None, :]
        grad = tl.where(kept, quarters[quarter], 0.0)
        weight_ptr = param_ptr if master_ptr is None else master_ptr
        w = tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + place, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + place, mask=inside, other=0.0).to(tl.float32)
        m, v = new_moments(grad, m, v, beta1, rest1, beta2, rest2)
        w = tl.where(kept, new_weight(w, m, v, decay, step_size, correction, eps), 0.0)
        tl.store(m_ptr + place, narrowed(tl.where(kept, m, 0.0), m_ptr.dtype.element_ty), mask=inside)
        tl.store(v_ptr + place, narrowed(tl.where(kept, v, 0.0), v_ptr.dtype.element_ty), mask=inside)
        if master_ptr is not None:
            tl.store(master_ptr + place, w, mask=inside)
        rounded = stored_weight(w, place, seed, step, param_id, STOCHASTIC, param_ptr.dtype.element_ty)
        tl.store(param_ptr + place, rounded, mask=inside)


def masked_dw_adamw_step(dy: Tensor, x: Tensor, adamw: AdamWStep) -> None:
    """As the op ``masked_dw_adamw_step``."""
    (param,), (exp_avg,), (exp_avg_sq,), (master,) = adamw.params, adamw.exp_avgs, adamw.exp_avg_sqs, adamw.masters
    (words,), states = adamw.words, (param, exp_avg, exp_avg_sq, master)
    elsewhere = exp_avg.dtype == torch.int8 or adamw.row_offsets[0].numel() > 0 or adamw.grad_scale is not None
    if elsewhere or not all(state.is_contiguous() for state in states):
        grad = _OPS.masked_linear_dw(dy, x, words).to(param.dtype)
        _OPS.masked_adamw_step(*adamw._replace(grads=[grad], zero_grads=False))
        return
    dy, x, words = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), words.contiguous()
    (t, n), k = dy.shape, x.shape[1]
    config = config_of("gradient step", t, dy, x)
    bn, bk, bt = (config.tiles[name] for name in ("BN", "BK", "BT"))
    common.launch(
        gradient_step_kernel, cdiv(n, bn) * cdiv(k, bk),
        (
            dy, x, words, param, exp_avg, exp_avg_sq, master if master.numel() else None,
            n, k, t, words.shape[1], *dy.stride(), *x.stride(),
            *hyperparameters(adamw), adamw.seed, adamw.step, adamw.param_ids[0],
        ),
        config, x.device, exact=True, STOCHASTIC=adamw.stochastic, EVEN_TILE=n % bn == 0 and k % bk == 0,
        EVEN_T=t % bt == 0, PRECISION=precision(),
    )  # fmt: skip
