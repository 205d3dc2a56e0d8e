"""Ground truth for every op: plain torch, wide arithmetic, one function per op, no cleverness.

Tests hold every back end against these functions, and these functions fix what an op means where a back end could
choose (ties, what happens to pruned entries, NaN). Arithmetic is float64 for float64 inputs and float32 for all others.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32  # weights in one mask word


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` in the arithmetic of this file: float64 stays, every other dtype becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# --- masks --------------------------------------------------------------------------------------------------------


def pack_mask(mask: Tensor) -> Tensor:
    """Bool mask (..., K) -> int32 words (..., ceil(K / 32)): bit i of word j is input 32 j + i, tail bits are 0."""
    width = mask.shape[-1]
    count = -(-width // WORD_BITS)
    bits = torch.zeros(*mask.shape[:-1], count * WORD_BITS, dtype=torch.int64, device=mask.device)
    bits[..., :width] = mask
    bits = bits.reshape(*mask.shape[:-1], count, WORD_BITS)
    return (bits << torch.arange(WORD_BITS, device=mask.device)).sum(-1).to(torch.int32)


def unpack_mask(words: Tensor, width: int) -> Tensor:
    """The inverse of ``pack_mask``: int32 words (..., ceil(K / 32)) -> bool mask (..., K) with K = ``width``."""
    bits = words.unsqueeze(-1) >> torch.arange(WORD_BITS, dtype=torch.int32, device=words.device) & 1
    return bits.flatten(-2)[..., :width].bool()


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """Words that keep the ``k`` highest scores of every row of (..., K); of equal ones those further left.

    NaN counts as the highest score, as ``torch.sort`` has it.
    """
    order = wide(scores).argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return pack_mask(mask.scatter_(-1, order[..., :k], True))


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Words that keep the ``n`` highest of every ``m`` consecutive scores (..., K); ties and NaN as ``topk_mask``."""
    groups = scores.reshape(*scores.shape[:-1], scores.shape[-1] // m, m)
    mask = unpack_mask(topk_mask(groups, n), m)
    return pack_mask(mask.reshape(scores.shape))


def is_nm(words: Tensor, width: int, n: int, m: int) -> Tensor:
    """Bool scalar: every ``m`` consecutive inputs of every row hold at most ``n`` kept ones."""
    mask = unpack_mask(words, width)
    return (mask.reshape(*mask.shape[:-1], width // m, m).sum(-1) <= n).all()


# --- masked linear ------------------------------------------------------------------------------------------------


def masked_weight(weight: Tensor, words: Tensor) -> Tensor:
    """M * W with exact zeros where pruned, whatever stands there (NaN and infinity too)."""
    return weight.masked_fill(~unpack_mask(words, weight.shape[-1]), 0.0)


def masked_linear(x: Tensor, weight: Tensor, words: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x (M * W)^T + b.

    Args:
        x: float (..., K).
        weight: float (N, K).
        words: int32 (N, ceil(K / 32)).
        bias: float (N,) or None.

    Returns:
        (..., N) in x's dtype.
    """
    y = wide(x) @ wide(masked_weight(weight, words)).T
    return (y if bias is None else y + wide(bias)).to(x.dtype)


def masked_linear_dx(dy: Tensor, weight: Tensor, words: Tensor) -> Tensor:
    """The input gradient dx = dy (M * W): dy (..., N) -> (..., K) in dy's dtype."""
    return (wide(dy) @ wide(masked_weight(weight, words))).to(dy.dtype)


def masked_linear_dw(dy: Tensor, x: Tensor, words: Tensor) -> Tensor:
    """The weight gradient dW = M * (dy^T x), exactly zero where pruned: (N, K) in x's dtype, summed over tokens."""
    product = wide(dy).reshape(-1, dy.shape[-1]).T @ wide(x).reshape(-1, x.shape[-1])
    return masked_weight(product, words).to(x.dtype)


# --- masked AdamW -------------------------------------------------------------------------------------------------


def masked_grad_norm(grads: list[Tensor], words: list[Tensor]) -> Tensor:
    """The L2 norm over all kept gradient entries, a scalar; no words (numel 0) for a tensor without a mask."""
    total = torch.zeros((), dtype=wide(grads[0]).dtype, device=grads[0].device)
    for grad, mask in zip(grads, words, strict=True):
        total += wide(masked_weight(grad, mask) if mask.numel() else grad).square().sum()
    return total.sqrt()


def masked_adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    words: list[Tensor],
    grad_scale: Tensor | None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """One AdamW step (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) on kept weights, in place.

    With g = grad_scale * gradient, for every kept weight w:

        w <- (1 - lr * weight_decay) w
        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        w <- w - lr * (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

    Pruned weights and their moments become exactly 0, whatever stood there. Gradients are only read.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: float tensors, alike in shape and dtype one by one.
        words: int32 mask words of each parameter; no words (numel 0) for a parameter without a mask.
        grad_scale: scalar tensor that multiplies the gradients (a clip factor, 1 / loss scale), or None.
        step: number of this step, from 1.
    """
    for param, grad, m, v, mask in zip(params, grads, exp_avgs, exp_avg_sqs, words, strict=True):
        kept = unpack_mask(mask, param.shape[-1]) if mask.numel() else torch.ones_like(param, dtype=torch.bool)
        g = wide(grad).masked_fill(~kept, 0.0)
        if grad_scale is not None:
            g = g * grad_scale
        w = wide(param) * (1 - lr * weight_decay)
        new_m = beta1 * m + (1 - beta1) * g
        new_v = beta2 * v + (1 - beta2) * g * g
        w = w - lr * (new_m / (1 - beta1**step)) / ((new_v / (1 - beta2**step)).sqrt() + eps)
        for old, new in ((param, w), (m, new_m), (v, new_v)):
            old.copy_(new.masked_fill(~kept, 0.0))
