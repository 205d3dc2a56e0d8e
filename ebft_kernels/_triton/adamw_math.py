"""The arithmetic of one AdamW step in registers, operation by operation that of ``reference.masked_adamw_step``.

Kernels that use it are compiled without fused multiply-adds and with correctly rounded division and root, so that
they give the reference's bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ebft_kernels._triton.common import narrowed
from ebft_kernels.reference import _LEAST, _OFFSET, _TOP

SIGNED_TOP, UNSIGNED_TOP = tl.constexpr(_TOP[True]), tl.constexpr(_TOP[False])
SIGNED_OFFSET, UNSIGNED_OFFSET = tl.constexpr(_OFFSET[True]), tl.constexpr(_OFFSET[False])
LEAST_SCALED = tl.constexpr(_LEAST)
TO_INTEGER = tl.constexpr(
    1.5 * 2**23
)  # added and taken away again, it rounds a small float to an integer, half to even


@triton.jit
def new_moments(grad, m, v, beta1, rest1, beta2, rest2):
    """Both moments after a step; ``rest`` is 1 - beta."""
    return beta1 * m + rest1 * grad, beta2 * v + rest2 * grad * grad


@triton.jit
def new_weight(w, m, v, decay, step_size, correction, eps):
    """The weight after a step, from the new moments."""
    return w * decay - tl.div_rn(step_size * m, tl.sqrt_rn(v) * correction + eps)


# --- 8-bit moments ------------------------------------------------------------------------------------------------


@triton.jit
def dequantized(code, scale, SIGNED: tl.constexpr):
    """As ``reference.dequantize``."""
    OFFSET: tl.constexpr = SIGNED_OFFSET if SIGNED else UNSIGNED_OFFSET
    code = code.to(tl.float32)
    root = tl.abs(code)
    fraction = ((root.to(tl.int32, bitcast=True) - OFFSET) << 3).to(tl.float32, bitcast=True)
    value = tl.where(root == 0, 0.0, fraction) * scale
    # Not -value: Triton has that as 0 - value, which makes another zero of 0.
    return tl.where(code < 0, value * -1.0, value) if SIGNED else value


@triton.jit
def size_bits(values):
    """The bits of |value|, ordered as the sizes are, NaN above all: their integer maximum is the largest value's."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest_bits, SIGNED: tl.constexpr):
    """The scale of a block of codes, and what its values are multiplied by, from its largest value."""
    TOP: tl.constexpr = SIGNED_TOP if SIGNED else UNSIGNED_TOP
    largest = largest_bits.to(tl.float32, bitcast=True)
    clamped = tl.where(largest < LEAST_SCALED, LEAST_SCALED, largest)
    top = clamped * 0.0 + TOP
    return tl.where(largest == 0, 0.0, tl.div_rn(clamped, top)), tl.div_rn(top, clamped)


@triton.jit
def quantized(values, factor, SIGNED: tl.constexpr):
    """The codes of values, as float32 integers, as ``reference.quantize`` has them."""
    OFFSET: tl.constexpr = SIGNED_OFFSET if SIGNED else UNSIGNED_OFFSET
    HIGHEST: tl.constexpr = 127.0 if SIGNED else 255.0
    fraction = tl.abs(values) * factor
    root = ((fraction.to(tl.int32, bitcast=True) >> 3) + OFFSET).to(tl.float32, bitcast=True)
    code = tl.minimum((root + TO_INTEGER) - TO_INTEGER, HIGHEST)
    if SIGNED:
        return tl.where(values < 0, -code, code)
    return tl.where(values > 0, tl.maximum(code, 1.0), code)


# --- what a parameter keeps of a weight -----------------------------------------------------------------------------


@triton.jit
def stored_weight(w, place, seed, step, param_id, STOCHASTIC: tl.constexpr, DTYPE: tl.constexpr):
    """The weight in the parameter's dtype: to nearest even, or STOCHASTIC (``reference.round_stochastically``).

    ``place``: int64 dense flat indices, which the random bits depend on.
    """
    if STOCHASTIC:
        low, high = place.to(tl.uint32), (place >> 32).to(tl.uint32)
        zero = low * 0
        random, _, _, _ = tl.philox(seed, low, high, zero + param_id.to(tl.uint32), zero + step.to(tl.uint32))
        bits = w.to(tl.int32, bitcast=True)
        rounded = (bits + (random & 0xFFFF).to(tl.int32)) & -65536
        w = tl.where((bits & 0x7F800000) == 0x7F800000, w, rounded.to(tl.float32, bitcast=True))
    return narrowed(w, DTYPE)
