"""Ground truth for every op: plain torch, wide arithmetic, one function per op, no cleverness.

Tests hold every back end against these functions, and these functions fix what an op means where a back end could
choose (ties, what happens to pruned entries, NaN). Arithmetic is float64 for float64 inputs and float32 for all others.

Long, because it is the list of all ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebft_kernels.adamw import AdamWStep

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
    """The inverse of ``pack_mask``: int32 words (..., ceil(K / 32)) -> bool mask (..., K) with K = ``width``.

    What stands in the tail bits does not matter.
    """
    check_words(words, width)
    bits = words.unsqueeze(-1) >> torch.arange(WORD_BITS, dtype=torch.int32, device=words.device) & 1
    return bits.flatten(-2)[..., :width].bool()


def check_words(words: Tensor, width: int) -> None:
    """Words of rows of ``width``: int32 (..., ceil(K / 32)), K at least 1.

    Raises:
        ValueError: they are not.
    """
    expected = -(-width // WORD_BITS)
    if width < 1 or words.dtype != torch.int32 or words.ndim == 0 or words.shape[-1] != expected:
        given = f"{words.dtype} {tuple(words.shape)}"
        raise ValueError(f"got mask words {given} for rows of {width}; expected torch.int32, {expected} a row")


def check_kept_rows(words: Tensor, offsets: Tensor, width: int, stored: int) -> None:
    """The layout of entries that are stored for kept places alone, row after row: what every op that finds them trusts.

    Words as ``check_words`` has them, with tail bits 0; int64 row offsets (rows + 1) that count the bits of the words
    from 0 on, and end at ``stored``, the number of entries. Contents are read: a sync point on a GPU.

    Raises:
        ValueError: it is another one.
    """
    check_words(words, width)
    rows = words.shape[:-1].numel()
    if offsets.dtype != torch.int64 or tuple(offsets.shape) != (rows + 1,):
        given = f"{offsets.dtype} {tuple(offsets.shape)}"
        raise ValueError(f"got row offsets {given} for {rows} rows; expected torch.int64 ({rows + 1},)")
    used = width % WORD_BITS
    if used and bool((words[..., -1] >> used).any()):
        raise ValueError(f"got a mask with bits set past the end of a row of {width}")
    counted = row_offsets(words)
    if not torch.equal(counted, offsets):
        row = int((counted != offsets).nonzero()[0])
        raise ValueError(
            f"got row offset {int(offsets[row])} at {row}; its mask keeps {int(counted[row])} before there"
        )
    if int(counted[-1]) != stored:
        raise ValueError(f"got {stored} values for a mask that keeps {int(counted[-1])}; expected as many")


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


def zero_pruned(tensor: Tensor, words: Tensor) -> Tensor:
    """A copy of ``tensor`` (..., K), contiguous, with exact zeros where pruned."""
    return masked_weight(tensor, words).contiguous()


def zero_pruned_(tensor: Tensor, words: Tensor) -> None:
    """Exact zeros where pruned, in place; memory is written only where something else stands."""
    tensor.copy_(masked_weight(tensor, words))


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


# --- compressed weights -------------------------------------------------------------------------------------------
# A weight (N, K) as mask words (N, ceil(K / 32)) and its kept values, row by row; row_offsets say where a row begins.

SCALE_GROUP = 128  # inputs of a row that share the float32 scale of 8-bit values
VALUES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64)  # float64: as all of this file


def check_compressed(words: Tensor, values: Tensor, row_offsets: Tensor, scales: Tensor | None, width: int) -> None:
    """The layout of a compressed weight, whole: that of ``check_kept_rows``, on one device, with values (kept,) of
    ``VALUES`` and, for int8 alone, float32 scales (N, ceil(K / 128)).

    Raises:
        ValueError: it is another one.
    """
    devices = {t.device for t in (words, values, row_offsets, scales) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"got tensors on {' and '.join(sorted(map(str, devices)))}; expected one device")
    if words.ndim != 2 or values.ndim != 1 or values.dtype not in VALUES:
        given = f"words {tuple(words.shape)} and values {values.dtype} {tuple(values.shape)}"
        raise ValueError(f"got {given}; expected (N, ceil(K / 32)), and (kept,) in float32, bfloat16, float16 or int8")
    expected = (words.shape[0], -(-width // SCALE_GROUP)) if values.dtype == torch.int8 else None
    if (None if scales is None else tuple(scales.shape)) != expected or not (
        scales is None or scales.dtype == torch.float32
    ):
        given = "no scales" if scales is None else f"scales {scales.dtype} {tuple(scales.shape)}"
        wanted = "none" if expected is None else f"torch.float32 {expected}"
        raise ValueError(f"got {given} with values of {values.dtype}; expected {wanted}")
    check_kept_rows(words, row_offsets, width, values.numel())


def compress(weight: Tensor, words: Tensor, int8: bool) -> tuple[Tensor, Tensor | None]:
    """The kept values of ``weight`` (N, K), 1-D; or 8-bit codes of them and scales (N, ceil(K / 128)).

    A scale is the largest absolute kept value of its 128 inputs divided by 127.
    """
    mask = unpack_mask(words, weight.shape[1])
    if not int8:
        return weight[mask], None
    groups = -(-weight.shape[1] // SCALE_GROUP)
    kept = torch.nn.functional.pad(wide(weight).masked_fill(~mask, 0.0), (0, groups * SCALE_GROUP - weight.shape[1]))
    scales = kept.view(-1, groups, SCALE_GROUP).abs().amax(-1) / 127
    spread = scales.repeat_interleave(SCALE_GROUP, dim=1)[:, : weight.shape[1]]
    codes = torch.where(spread > 0, wide(weight) / spread, 0.0).round().clamp(-127, 127)
    return codes[mask].to(torch.int8), scales


def decompress(words: Tensor, values: Tensor, row_offsets: Tensor, scales: Tensor | None, width: int) -> Tensor:
    """The weight (N, K) with zeros where pruned: in the values' dtype, float32 from 8-bit codes."""
    check_compressed(words, values, row_offsets, scales, width)
    mask = unpack_mask(words, width)
    dense = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    dense[mask] = values
    return dense if scales is None else dense.float() * scales.repeat_interleave(SCALE_GROUP, dim=1)[:, :width]


def compressed_linear(
    x: Tensor,
    words: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    width: int,
) -> Tensor:
    """y = x W^T + b in wide arithmetic, (..., K) -> (..., N) in x's dtype."""
    y = wide(x) @ decompress(words, values, row_offsets, scales, width).to(wide(x).dtype).T
    return (y if bias is None else y + wide(bias)).to(x.dtype)


def gather_kept(tensor: Tensor, words: Tensor, row_offsets: Tensor) -> Tensor:
    """The kept entries of ``tensor`` (N, K), row by row: (kept,). The inverse of ``decompress``."""
    mask = unpack_mask(words, tensor.shape[-1])
    check_kept_rows(words, row_offsets, tensor.shape[-1], int(mask.sum()))
    return tensor[mask]


# --- reconstruction loss --------------------------------------------------------------------------------------------


def reconstruction_loss(output: Tensor, target: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mean of d^2, d = (output - residual) - target, a scalar; and its gradient 2 d / n with respect to ``output``.

    All of one shape, in whatever dtypes; loss and gradient in wide arithmetic.
    """
    branch = wide(output) if residual is None else wide(output) - residual.to(wide(output).dtype)
    difference = branch - target.to(branch.dtype)
    return difference.square().mean(), difference * (2 / max(1, difference.numel()))


# --- masked AdamW -------------------------------------------------------------------------------------------------


def masked_grad_norm(grads: list[Tensor], words: list[Tensor]) -> Tensor:
    """The L2 norm over all kept gradient entries, a scalar; no words (numel 0) for a tensor without a mask."""
    total = torch.zeros((), dtype=wide(grads[0]).dtype, device=grads[0].device)
    for grad, mask in zip(grads, words, strict=True):
        total += wide(masked_weight(grad, mask) if mask.numel() else grad).square().sum()
    return total.sqrt()


def masked_adamw_step(adamw: AdamWStep) -> None:
    """One AdamW step (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) on kept weights, in place.

    With g = grad_scale * gradient, for every kept weight w:

        w <- (1 - lr * weight_decay) w
        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        w <- w - (lr / (1 - beta1^step)) m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

    Pruned weights become exactly 0, whatever stood there, and so do their moments where they are stored. States are
    *stored* either dense, in the parameter's shape, or compact: 1-D, row-major over kept weights.
    """
    lr, beta1, beta2, eps, step = adamw.lr, adamw.beta1, adamw.beta2, adamw.eps, adamw.step
    step_size = lr / (1 - beta1**step)
    correction = (1 - beta2**step) ** -0.5
    for param_id, *tensors in zip(adamw.param_ids, *adamw.tensors, strict=True):
        param, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, master, words, offsets = tensors
        compact = offsets.numel() > 0
        kept = unpack_mask(words, param.shape[-1]) if words.numel() else torch.ones_like(param, dtype=torch.bool)
        if compact:
            check_kept_rows(words, offsets, param.shape[-1], exp_avg.numel())
        # In storage order: all places, or kept ones alone.
        places = kept.flatten().nonzero().flatten() if compact else torch.arange(kept.numel())
        places = places.to(param.device)
        alive = kept.flatten()[places]
        m, v = _load_moment(exp_avg, exp_avg_scale), _load_moment(exp_avg_sq, exp_avg_sq_scale)
        g = wide(grad).flatten()[places].masked_fill(~alive, 0.0)
        if adamw.grad_scale is not None:
            g = g * adamw.grad_scale
        w = master.flatten() if master.numel() else wide(param).flatten()[places]

        w = w * (1 - lr * adamw.weight_decay)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        # Rounded correctly by way of float64: torch's float32 root on a CPU may be off by a bit.
        root = v.double().sqrt().to(v.dtype)
        w = w - step_size * m / (root * correction + eps)

        w, m, v = (t.masked_fill(~alive, 0.0) for t in (w, m, v))
        _store_moment(m, exp_avg, exp_avg_scale)
        _store_moment(v, exp_avg_sq, exp_avg_sq_scale)
        if master.numel():
            master.copy_(w.view_as(master))
        if adamw.stochastic:
            w = round_stochastically(w, philox(adamw.seed, step, param_id, places))
        full = torch.zeros(param.numel(), dtype=w.dtype, device=param.device)
        full[places] = w
        param.copy_(full.view_as(param))
        if adamw.zero_grads:
            grad.zero_()


def masked_dw_adamw_step(dy: Tensor, x: Tensor, adamw: AdamWStep) -> None:
    """``masked_adamw_step`` of one parameter (N, K) on ``masked_linear_dw`` of dy (..., N) and x (..., K).

    The gradient is not rounded between the two. A back end that writes it may round it to the parameter's dtype.
    """
    (words,) = adamw.words
    masked_adamw_step(adamw._replace(grads=[masked_linear_dw(wide(dy), wide(x), words)]))


def _load_moment(code: Tensor, scale: Tensor) -> Tensor:
    return dequantize(code.flatten(), scale) if scale.numel() else wide(code).flatten()


def _store_moment(value: Tensor, code: Tensor, scale: Tensor) -> None:
    if scale.numel():
        codes, scales = quantize(value, signed=code.dtype == torch.int8)
        code.copy_(codes.view_as(code))
        scale.copy_(scales)
    else:
        code.copy_(value.view_as(code))


def row_offsets(words: Tensor) -> Tensor:
    """int64 (rows + 1): how many weights a mask of words (..., W) keeps before each row, and in all."""
    pairs = words.long() & 0xFFFFFFFF  # tail bits are 0
    pairs = pairs - (pairs >> 1 & 0x55555555)
    nibbles = (pairs & 0x33333333) + (pairs >> 2 & 0x33333333)
    octets = nibbles + (nibbles >> 4) & 0x0F0F0F0F
    counts = (octets * 0x01010101 >> 24 & 0xFF).sum(-1).flatten()
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


# --- 8-bit moments ------------------------------------------------------------------------------------------------
# Blocks of 256 consecutive stored values share a float32 scale. A code is, but for rounding, the eighth root of the
# value, which a shift by three bits makes of a float's bits (piecewise linearly): 127 or 255 levels down to 2^-63, the
# nearer to 1 the finer. Integer arithmetic on float bits alone, so that every back end gives the same codes.

QUANTIZED_BLOCK = 256
_TOP = {
    True: 1.875,
    False: 1.9375,
}  # what the highest code stands for, signed (7 bits and a sign) and unsigned (8 bits)
_OFFSET = {True: 944 << 20, False: 952 << 20}
_LEAST = 2.0**-100  # a block whose largest value is smaller is scaled by this one


def quantize(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """float32 (n,) -> codes (n,), int8 or uint8, and float32 scales (ceil(n / 256),).

    0 is exact. Unsigned: a value above 0 never becomes 0, because a second moment that did would make the step explode.
    """
    blocks = torch.nn.functional.pad(values, (0, -len(values) % QUANTIZED_BLOCK)).view(-1, QUANTIZED_BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    clamped = largest.clamp(min=_LEAST)
    fraction = blocks.abs() * (torch.full_like(clamped, _TOP[signed]) / clamped)  # one rounding; a scalar / x has two
    root = ((fraction.view(torch.int32) >> 3) + _OFFSET[signed]).view(torch.float32)
    code = root.round().clamp(max=127.0 if signed else 255.0)
    code = torch.where(blocks < 0, -code, code) if signed else torch.where(blocks > 0, code.clamp(min=1.0), code)
    scales = torch.where(largest == 0, 0.0, clamped / _TOP[signed]).flatten()
    return code.flatten()[: len(values)].to(torch.int8 if signed else torch.uint8), scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """The inverse of ``quantize``: float32 (n,)."""
    signed = codes.dtype == torch.int8
    root = codes.float().abs()
    fraction = ((root.view(torch.int32) - _OFFSET[signed]) << 3).view(torch.float32)
    value = torch.where(root == 0, 0.0, fraction) * scales.repeat_interleave(QUANTIZED_BLOCK)[: len(codes)]
    return torch.where(codes < 0, -value, value) if signed else value


# --- random bits --------------------------------------------------------------------------------------------------


def philox(seed: int, step: int, param_id: int, places: Tensor) -> Tensor:
    """The first word of Philox 4x32-10 (Salmon et al., SC 2011) for each place: int64 holding 32 bits.

    key = (seed, seed >> 32), counter = (place, place >> 32, param_id, step), each modulo 2^32. ``places`` are dense
    flat indices, whatever the layout of the states: the bits are the same on every back end, tile and thread count.
    """
    word = 0xFFFFFFFF
    c0, c1 = places.long() & word, (places.long() >> 32) & word
    c2, c3 = torch.full_like(c0, param_id & word), torch.full_like(c0, step & word)
    k0, k1 = seed & word, (seed >> 32) & word
    for _ in range(10):
        # int64 products wrap modulo 2^64, so both halves are right.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & word) ^ c1 ^ k0, p1 & word, (p0 >> 32 & word) ^ c3 ^ k1, p0 & word
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return c0


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """float32 -> float32 that bfloat16 can hold: the low 16 random bits are added before truncation.

    The expected value is the value. Infinity and NaN pass through.
    """
    rounded = (values.view(torch.int32) + (bits & 0xFFFF).int()) & -65536
    return torch.where(values.isfinite(), rounded.view(torch.float32), values)
