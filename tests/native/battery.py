"""Everything the native library does, against the reference: run in this process, and again for the plain code path.

``EBFT_CPU=plain python tests/native/battery.py`` checks the code that runs where there is no AVX2.
"""

from __future__ import annotations

import itertools
import sys

import torch

from ebft_kernels import reference, sparse_reference
from ebft_kernels._extension import native_reason
from ebft_kernels.adamw import AdamWStep
from ebft_kernels.mask import PackedMask
from ebft_kernels.places import Places
from ebft_kernels.testing import ADAMW_LAYOUTS, MASK_KINDS, adamw_step, make_mask

OPS = torch.ops.ebft_kernels
SPARSE_SHAPES = ((1, 1), (3, 31), (7, 129), (257, 128), (60, 515), (9, 2100))


def check_adamw(layout, dtype, steps=3, scale=0.25, seed=0):
    """Equal bit for bit, states and random bits included."""
    first = adamw_step(*layout, dtype=dtype, seed=seed, grad_scale=None if scale is None else torch.tensor(scale))
    first = first._replace(param_ids=[7 + n for n in first.param_ids])
    mine, truth = first.each(torch.clone), first.each(torch.clone)
    for step in range(1, steps + 1):
        of_this = {"step": step, "zero_grads": step == steps}
        OPS.masked_adamw_step.native(*mine._replace(**of_this))
        reference.masked_adamw_step(truth._replace(**of_this))
    for name, got, true in zip(AdamWStep._fields, mine.written, truth.written, strict=False):
        for n, (a, b) in enumerate(zip(got, true, strict=True)):
            assert torch.equal(a, b) or (
                (a.isnan() == b.isnan()).all() and torch.equal(a.nan_to_num(), b.nan_to_num())
            ), f"{layout} {dtype}: {name}[{n}] {tuple(a.shape)} differs by {(a.float() - b.float()).abs().max()}"


def check_masks(rows, width, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    for kind in MASK_KINDS:
        mask = make_mask(kind, rows, width, generator)
        words = OPS.pack_mask.native(mask)
        assert torch.equal(words, reference.pack_mask(mask)), (kind, rows, width)
        assert torch.equal(OPS.unpack_mask.native(words, width), mask), (kind, rows, width)
        assert torch.equal(OPS.row_offsets.native(words), reference.row_offsets(words))
        mine, truth = (torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype) for _ in "ab")
        OPS.zero_pruned_.native(mine, words)
        reference.zero_pruned_(truth, words)
        assert torch.equal(mine, truth), (kind, rows, width, dtype)
    scores = torch.randint(-4, 5, (rows, width), generator=generator).to(dtype) * torch.randn(
        1, generator=generator
    ).to(dtype)
    scores[torch.rand(rows, width, generator=generator) > 0.95] = float("nan")
    scores[torch.rand(rows, width, generator=generator) > 0.95] = -float("inf")
    for k in {0, 1, width // 2, width}:
        assert torch.equal(OPS.topk_mask.native(scores, k), reference.topk_mask(scores, k)), (rows, width, k, dtype)
    for m in (m for m in (1, 2, 3, 4, 5, 8, 16, 32, 40) if width % m == 0):
        for n in {1, (m + 1) // 2, m}:
            words = OPS.nm_mask.native(scores, n, m)
            assert torch.equal(words, reference.nm_mask(scores, n, m)), (rows, width, n, m, dtype)
            assert OPS.is_nm.native(words, width, n, m)
            for check in (n, max(1, n - 1)):
                assert OPS.is_nm.native(words, width, check, m) == reference.is_nm(words, width, check, m)


def check_compressed(rows, width, batch, values, x_dtype, kind="random", seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = make_mask(kind, rows, width, generator)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}[values]
    weight = torch.randn(rows, width, generator=generator).to(dtype) * mask
    words = reference.pack_mask(mask)
    survivors, scales = reference.compress(weight, words, values == "int8")
    offsets = reference.row_offsets(words)
    x, bias = (
        torch.randn(batch, width, generator=generator).to(x_dtype),
        torch.randn(rows, generator=generator).to(x_dtype),
    )
    got = OPS.compressed_linear.native(x, words, survivors, offsets, scales, bias, width)
    dense = OPS.decompress.native(words, survivors, offsets, scales, width)
    assert torch.equal(dense, reference.decompress(words, survivors, offsets, scales, width))
    truth = x.double() @ dense.double().T + bias.double()
    plain = torch.nn.functional.linear(x, dense.to(x_dtype), bias)
    error, torchs = ((t.double() - truth).abs().max() if t.numel() else torch.tensor(0.0) for t in (got, plain))
    magnitude = float(truth.abs().max()) if truth.numel() else 0.0
    assert got.dtype == x_dtype
    assert got.shape == truth.shape
    assert error <= 2 * torchs + 4 * torch.finfo(x_dtype).eps * magnitude + 1e-6, (
        rows,
        width,
        batch,
        values,
        x_dtype,
        kind,
    )


def check_sparse(rows, width, tokens, kind, seed=0):
    """No further from float64 than torch's dense float32 products, and the same on one thread and on several."""
    generator = torch.Generator().manual_seed(seed)

    def floats(*shape):
        return torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)[..., ::2]  # of no whole stride

    mask = make_mask(kind, rows, width, generator)
    places = Places.of(PackedMask.from_dense(mask))
    sparse_reference.check_walk(*places.walk, width)
    sparse_reference.check_walk(*places.back, rows)
    weight, x, dy, bias = floats(rows, width) * mask, floats(tokens, width), floats(tokens, rows), torch.randn(rows)
    values = OPS.gather_kept.native(weight.contiguous(), places.words, places.row_offsets)
    assert torch.equal(values, weight[mask])
    walks = (*places.walk, *places.back)

    def products():
        return (
            OPS.sparse_linear.native(x, values, *walks, bias, width),
            OPS.sparse_linear_dx.native(dy, values, *walks, width),
            OPS.sparse_linear_dw.native(dy, x, *walks),
        )

    def dense(x, dy, weight, bias):
        return torch.nn.functional.linear(x, weight, bias), dy @ weight, (dy.T @ x)[mask]

    given = (x, dy, weight, bias)
    with_threads = products(), torch.set_num_threads(2), products(), torch.set_num_threads(1)
    magnitudes = dense(*(of.double().abs() for of in given))
    for got, again, plain, true, terms in zip(
        *with_threads[::2], dense(*given), dense(*(of.double() for of in given)), magnitudes, strict=True
    ):
        assert torch.equal(got, again), (rows, width, tokens, kind)
        error, torchs = ((of.double() - true).norm() for of in (got, plain))
        assert error <= 1.5 * torchs + torch.finfo(torch.float32).eps * terms.norm(), (
            rows,
            width,
            tokens,
            kind,
            error,
            torchs,
        )


def check_grad_norm():
    step = adamw_step("fp32", "fp32", False)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        grads = [grad.to(dtype) for grad in step.grads]
        truth = reference.masked_grad_norm([grad.double() for grad in grads], step.words)
        got = OPS.masked_grad_norm.native(grads, step.words)
        torch.testing.assert_close(got.double(), truth, rtol=1e-6, atol=0)


def everything():
    assert native_reason() is None  # and the library is loaded
    for layout in ADAMW_LAYOUTS:
        for dtype in (torch.bfloat16, torch.float16) if layout[0] == "master" else (torch.bfloat16,):
            for scale in (None, 0.25):
                check_adamw(layout, dtype, scale=scale)
    check_grad_norm()
    for (rows, width), tokens, kind in itertools.product(SPARSE_SHAPES, (0, 1, 65, 520), MASK_KINDS):
        check_sparse(rows, width, tokens, kind)
    for rows, width in ((1, 1), (3, 31), (2, 32), (5, 33), (4, 40), (7, 480), (3, 1000), (0, 8)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check_masks(rows, width, seed=rows + width, dtype=dtype)
    for rows, width in ((1, 1), (3, 15), (5, 16), (4, 33), (9, 260), (64, 512), (0, 40)):
        for values in ("fp32", "bf16", "fp16", "int8"):
            for batch in (0, 1, 2, 3, 4, 5, 8, 11, 16):
                for x_dtype in (torch.float32, torch.bfloat16):
                    check_compressed(rows, width, batch, values, x_dtype)
        for kind in MASK_KINDS:
            check_compressed(rows, width, 1, "bf16", torch.float32, kind=kind)


if __name__ == "__main__":
    everything()
    print("the native library agrees with the reference", *sys.argv[1:])
