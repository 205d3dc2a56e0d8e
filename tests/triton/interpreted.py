"""Every Triton kernel under Triton's interpreter, through the public functions, against the reference.

    TRITON_INTERPRET=1 python tests/triton/interpreted.py [masks|linear|adamw|...]

A process of its own, started by test_triton.py: the interpreter and the compiler cannot share one. bfloat16 products
are left to the compile tests and to a GPU, because the interpreter multiplies bfloat16 wrongly.
"""

import sys
import time

import torch
import triton
import triton.language as tl

from ebft_kernels import (
    MaskedAdamW,
    MaskedLinear,
    PackedMask,
    explain,
    masked_grad_norm,
    masked_linear,
    reconstruction_loss,
    reference,
    use_impl,
)
from ebft_kernels._triton.adamw_math import dequantized
from ebft_kernels.adamw import AdamWStep
from ebft_kernels.testing import (
    ADAMW_LAYOUTS,
    adamw_step,
    assert_exact_zeros,
    check_linear,
    linear_cases,
    one_adamw_step,
)

OPS = torch.ops.ebft_kernels


def poisoned_empty():
    """Uninitialised memory holds NaN from here on, so that nothing that was not written passes for a result."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


# --- masks and norm -------------------------------------------------------------------------------------------------


def masks():
    generator = torch.Generator().manual_seed(0)
    for lead, width in (((), 1), ((3,), 31), ((2, 2), 32), ((5,), 33), ((0,), 8), ((40,), 300)):
        mask = torch.rand(*lead, width, generator=generator) > 0.5
        packed = PackedMask.from_dense(mask)
        assert torch.equal(packed.words, reference.pack_mask(mask))
        assert torch.equal(packed.dense(), mask)
        assert torch.equal(packed.row_offsets(), reference.row_offsets(packed.words))
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            values = torch.randn(*lead, width, generator=generator).to(dtype).masked_fill(~mask, float("nan"))
            assert torch.equal(OPS.zero_pruned(values, packed.words), reference.zero_pruned(values, packed.words))
            cleared = values.clone()
            OPS.zero_pruned_(cleared, packed.words)
            assert torch.equal(cleared, reference.zero_pruned(values, packed.words))
            if values.ndim == 2:
                strided = values.T.contiguous().T
                OPS.zero_pruned_(strided, packed.words)
                assert torch.equal(strided, cleared)
    strided = torch.rand(40, 9, generator=generator) > 0.5
    assert torch.equal(OPS.pack_mask(strided.T), reference.pack_mask(strided.T))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        scores = torch.randint(-1, 2, (50, 48), generator=generator).to(dtype)
        scores[0], scores[1], scores[1, ::3] = float("nan"), -0.0, 0.0
        for n, m in ((1, 2), (2, 4), (4, 8), (8, 16), (3, 3), (5, 12)):
            words = OPS.nm_mask(scores, n, m)
            assert torch.equal(words, reference.nm_mask(scores, n, m)), (dtype, n, m)
            for allowed in (n, max(1, n - 1)):
                assert OPS.is_nm(words, 48, allowed, m) == reference.is_nm(words, 48, allowed, m)


def norm():
    step = adamw_step("fp32", "fp32", False)  # NaN in pruned places
    packed = [PackedMask(w, p.shape) if w.numel() else None for p, w in zip(step.params, step.words, strict=True)]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        grads = [grad.to(dtype) for grad in step.grads]
        truth = reference.masked_grad_norm([grad.double() for grad in grads], step.words)
        norms = [masked_grad_norm(grads, packed) for _ in range(2)]
        torch.testing.assert_close(norms[0].double(), truth, rtol=1e-6, atol=0)
        assert torch.equal(*norms)


# --- products -------------------------------------------------------------------------------------------------------


def linear(dtype, contiguous):
    """Through ``MaskedLinear``, with dense weights: garbage where pruned."""
    for name, case in linear_cases(dtype, contiguous=contiguous):
        layer = MaskedLinear.from_linear(torch.nn.Linear(case.x.shape[-1], case.dy.shape[-1], dtype=dtype), case.mask)
        layer.weight, layer.bias = (torch.nn.Parameter(t) for t in (case.weight, case.bias))

        def run(x, weight, bias, layer=layer):
            return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

        for _ in range(2):  # the second time with lists of non-empty tiles
            check_linear(run, case, f"{dtype} {name}")


def empty_tiles():
    """Whole tiles are pruned: the list of the others is used, is right, and is made anew when the mask changes."""
    from ebft_kernels._triton import tiles

    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(200, 300, generator=generator) > 0.5
    mask[64:128], mask[:, 64:192] = False, False
    weight, x = (torch.randn(*shape, generator=generator) for shape in ((200, 300), (20, 300)))
    dy, packed = torch.randn(20, 200, generator=generator), PackedMask.from_dense(mask)
    weight[~mask] = float("nan")
    for attempt in range(3):
        y, dx = masked_linear(x, weight, packed), OPS.masked_linear_dx(dy, weight, packed.words, False)
        torch.testing.assert_close(y, reference.masked_linear(x, weight, packed.words), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(dx, reference.masked_linear_dx(dy, weight, packed.words), rtol=1e-5, atol=1e-4)
        lines = tiles._known[packed.words].lines
        assert len(lines) == (2 if attempt else 0)
        assert all(listed is not None for listed in lines.values())
    packed.words.copy_(reference.pack_mask(torch.ones(200, 300, dtype=torch.bool)))
    weight.nan_to_num_(0.5)
    for _ in range(2):
        torch.testing.assert_close(masked_linear(x, weight, packed), x @ weight.T, rtol=1e-5, atol=1e-4)
    assert tiles._known[packed.words].lines == {(64, 32, "along"): None}


# --- loss -----------------------------------------------------------------------------------------------------------


def loss():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for branch in (False, True):
            output, target, residual = (torch.randn(3, 50, 67, generator=generator) for _ in range(3))
            output, residual = output.to(dtype).requires_grad_(), residual if branch else None
            got = reconstruction_loss(output, target, residual)
            (gradient,) = torch.autograd.grad(got, output)
            true_loss, true_gradient = reference.reconstruction_loss(output.detach().double(), target, residual)
            torch.testing.assert_close(got.double(), true_loss, rtol=1e-6, atol=0)
            torch.testing.assert_close(
                gradient, true_gradient.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-9
            )


# --- AdamW ----------------------------------------------------------------------------------------------------------


def adamw():
    """One step on every ugly shape, in every layout: weights, moments and codes are the reference's bit for bit."""
    for number, layout in enumerate(ADAMW_LAYOUTS):
        for dtype in (torch.bfloat16, torch.float16) if layout[0] == "master" else (torch.bfloat16,):
            scale = (
                0.25 if (number // 2 + (dtype == torch.float16)) % 2 else None
            )  # every layout sees both, or its sisters do
            grad_scale = None if scale is None else torch.tensor(scale)
            step = adamw_step(*layout, dtype=dtype, grad_scale=grad_scale, zero_grads=scale is not None)
            mine, truth = step.each(torch.clone), step.each(torch.clone)
            OPS.masked_adamw_step(*mine)
            reference.masked_adamw_step(truth)
            for name, got, true in zip(AdamWStep._fields, mine.written, truth.written, strict=False):
                for a, b in zip(got, true, strict=True):
                    torch.testing.assert_close(
                        a, b, rtol=0, atol=0, equal_nan=True,
                        msg=lambda text, w=f"{layout} {dtype} {name}": f"{w}: {text}",
                    )  # fmt: skip
            for param, words in zip(mine.params, step.words, strict=True):
                if words.numel():
                    assert_exact_zeros(param, reference.unpack_mask(words, param.shape[-1]), str(layout))


@triton.jit
def codes_kernel(code_ptr, scale_ptr, out_ptr, SIGNED: tl.constexpr):
    place = tl.arange(0, 256)
    tl.store(out_ptr + place, dequantized(tl.load(code_ptr + place), tl.load(scale_ptr), SIGNED))


def codes():
    """Codes of every kind, under scales of every kind (negative ones too), stand for what the reference says, to the
    sign of zero."""
    for dtype in (torch.int8, torch.uint8):
        every = torch.arange(256).to(torch.uint8).view(dtype)
        for number in (0.0, -0.0, 1.0, -1.0, -3e-7, 1e-44, -2e38, float("inf"), -float("inf"), float("nan")):
            scale, got = torch.tensor([number]), torch.empty(256)
            codes_kernel[(1,)](every, scale, got, SIGNED=dtype == torch.int8)
            true = reference.dequantize(every, scale)
            same = (got.view(torch.int32) == true.view(torch.int32)) | (got.isnan() & true.isnan())
            assert same.all(), f"{dtype}, scale {number}: {got[~same]} for {true[~same]}"


def optimizer(steps=20):
    """``MaskedAdamW`` in every layout, beside the same in torch: clipping, a step, and the mask bit-exact after
    each."""
    for weights, moments, compact in ADAMW_LAYOUTS:
        runs = []
        for impl in ("triton", "torch"):
            generator = torch.Generator().manual_seed(0)
            with use_impl(impl):
                start = torch.randn(3, 190, generator=generator).to(
                    torch.float32 if weights == "fp32" else torch.bfloat16
                )
                weight, bias = torch.nn.Parameter(start), torch.nn.Parameter(torch.ones(190))
                mask = torch.rand(3, 190, generator=generator) > 0.6
                layout = {"weights": weights, "moments": moments, "compact": compact, "zero_grads": True, "seed": 5}
                adam = MaskedAdamW([weight, bias], masks={weight: mask}, lr=1e-2, weight_decay=0.1, **layout)
                for step in range(steps):
                    weight.grad = torch.randn(3, 190, generator=generator).to(weight.dtype)
                    bias.grad = torch.randn(190, generator=generator)
                    if step % 2:
                        adam.clip_grad_norm_(5.0)
                    adam.step()
                    assert_exact_zeros(weight, mask, f"{impl} {layout} step {step}")
                    assert torch.count_nonzero(weight.grad) == 0
                runs.append((weight.detach().float(), bias.detach()))
        # One code or rounding that falls the other way moves a weight by a hundredth of a step, or by a bfloat16 ulp.
        loose = 1e-4 if moments == "fp32" else 5e-3
        for mine, torchs in zip(*runs, strict=True):
            moved = 20 * 1e-2
            unit = 0.0 if weights == "fp32" else float(torchs.abs().max()) * 2.0**-7
            assert (mine - torchs).abs().max() <= loose * moved + unit, (weights, moments, compact)
            assert (mine - torchs).abs().mean() <= loose * moved / 10 + unit / 50, (weights, moments, compact)


def in_backward():
    """Weight gradient and step in one kernel, through ``MaskedLinear``, beside the same in torch; and on the ugly
    shapes."""
    for number, (weights, moments, compact) in enumerate(ADAMW_LAYOUTS):
        if compact or moments == "int8":
            continue  # two kernels, each tested above
        generator = torch.Generator().manual_seed(number)
        dtype = {"fp32": torch.float32, "master": torch.float16, "stochastic": torch.bfloat16}[weights]
        for tokens, rows, width in ((5, 7, 33), (40, 70, 130), (0, 3, 64)):
            mask = torch.rand(rows, width, generator=generator) > 0.6
            dy, x = (
                torch.randn(tokens, size, generator=generator) for size in (rows, width)
            )  # as autocast to float32 would
            w, m, v = (torch.randn(rows, width, generator=generator) for _ in range(3))
            kind = torch.float32 if moments == "fp32" else torch.bfloat16
            fields = {"words": reference.pack_mask(mask), "stochastic": weights == "stochastic", "param_ids": [2]}
            if weights == "master":
                fields["masters"] = w
            step = one_adamw_step(w.to(dtype), None, m.to(kind), v.square().to(kind), **fields)
            mine, truth = step.each(torch.clone), step.each(torch.clone)
            OPS.masked_dw_adamw_step(dy, x, *mine)
            reference.masked_dw_adamw_step(dy, x, truth)
            for name, gots, trues in zip(AdamWStep._fields, mine.written, truth.written, strict=False):
                for got, true in zip(gots, trues, strict=True):
                    unit = torch.finfo(true.dtype).eps  # where the sums differ in the last place, so may the rounding
                    torch.testing.assert_close(
                        got, true, rtol=max(1e-5, unit), atol=1e-5, msg=lambda t, n=f"{name} {weights}": f"{n}: {t}"
                    )
            assert_exact_zeros(mine.params[0], mask)
    runs = []
    for impl in ("triton", "torch"):
        with use_impl(impl):
            torch.manual_seed(0)
            layer = MaskedLinear(70, 20, mask=torch.rand(20, 70) > 0.5)
            adam = MaskedAdamW.for_module(layer, update_in_backward=True)
            for _ in range(5):
                layer(torch.randn(6, 70)).square().sum().backward()
                adam.step()
                adam.zero_grad()
            runs.append(layer.weight.detach().clone())
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-5)


def tuner():
    """``benchmarks/tune.py`` at toy size: it runs, and the dispatcher reads what it writes."""
    import tempfile
    from pathlib import Path

    from benchmarks.tune import tune

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        entry = tune(torch.device("cpu"), torch.float16, (32, 64), {"few": 2}, out, time.perf_counter() + 60)
    assert set(entry["products"]) == {f"{op}/few/2" for op in ("masked_linear", "masked_linear_dx", "masked_linear_dw")}
    assert all(set(row) == {"triton", "multiply", "zeroed"} for row in entry["products"].values())
    assert set(entry["configs"]) == {f"{kernel}/few/2" for kernel in ("product", "gradient", "gradient step")}


EVERYTHING = {
    "masks": masks,
    "norm": norm,
    "loss": loss,
    "empty tiles": empty_tiles,
    "linear": lambda: [linear(d, c) for d in (torch.float32, torch.float16) for c in (True, False)],
    "adamw": adamw,
    "codes": codes,
    "optimizer": optimizer,
    "in backward": in_backward,
    "tuner": tuner,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    poisoned_empty()
    with use_impl("triton"):
        assert explain("masked_adamw_step").impl == "triton"
        for part in sys.argv[1:] or EVERYTHING:
            began = time.perf_counter()
            EVERYTHING[part]()
            print(f"{part}: right ({time.perf_counter() - began:.0f} s)", flush=True)
