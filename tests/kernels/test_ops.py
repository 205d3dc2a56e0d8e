"""Every op: schema, fake and autograd by torch's own checker, values against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn import functional as F

from ebft_kernels import PackedMask, explain, masked_adamw_step, masked_grad_norm, masked_linear, reference, use_impl
from ebft_kernels.ops import SCHEMAS
from ebft_kernels.testing import assert_exact_zeros, assert_no_worse_than_torch, linear_cases

OPS = torch.ops.ebft_kernels
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_words(*shape, seed=0):
    return reference.pack_mask(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5)


def op_examples():
    """One call of every op: name -> (args, kwargs)."""
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((2, 3, 37), (5, 37), (5,)))
    dy, words = torch.randn(2, 3, 5, requires_grad=True), make_words(5, 37)
    none = torch.empty(0, dtype=torch.int32)
    states = [[torch.rand(5, 37), torch.rand(4)] for _ in range(4)]
    adamw = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 3}
    return {
        "pack_mask": ((torch.rand(3, 5, 70) > 0.5,), {}),
        "unpack_mask": ((words, 37), {}),
        "topk_mask": ((torch.randn(3, 40), 7), {}),
        "nm_mask": ((torch.randn(3, 40), 2, 4), {}),
        "is_nm": ((make_words(3, 40), 40, 2, 4), {}),
        "masked_linear": ((x, weight, words, bias, False), {}),
        "masked_linear_dx": ((dy, weight, words, False), {}),
        "masked_linear_dw": ((dy, x, words), {}),
        "masked_grad_norm": ((states[1], [words, none]), {}),
        "masked_adamw_step": ((*states, [words, none], torch.tensor(0.5)), adamw),
    }


@pytest.mark.parametrize("op", SCHEMAS)
def test_opcheck(op):
    args, kwargs = op_examples()[op]
    opcheck(getattr(OPS, op).default, args, kwargs)


# --- masks ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), max_size=2), st.integers(1, 130), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_pack_and_unpack_agree_with_the_reference(lead, width, seed):
    mask = torch.rand(*lead, width, generator=torch.Generator().manual_seed(seed)) > 0.5
    words = OPS.pack_mask(mask)
    assert torch.equal(words, reference.pack_mask(mask))
    assert torch.equal(OPS.unpack_mask(words, width), mask)
    assert torch.equal(reference.unpack_mask(words, width), mask)


def test_bit_order_and_tail():
    mask = torch.zeros(1, 70, dtype=torch.bool)
    mask[0, [0, 31, 33, 69]] = True
    assert reference.pack_mask(mask).tolist() == [[1 - 2**31, 2, 32]]
    assert reference.pack_mask(torch.ones(1, 33, dtype=torch.bool)).tolist() == [[-1, 1]]


def test_pack_takes_strided_masks():
    mask = torch.rand(40, 9) > 0.5
    assert torch.equal(OPS.pack_mask(mask.T), reference.pack_mask(mask.T))


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_and_nm_break_ties_to_the_left(dtype):
    scores = torch.randint(0, 3, (50, 48)).to(dtype)
    scores[0] = float("nan")
    for k in (0, 1, 17, 48):
        assert torch.equal(OPS.topk_mask(scores, k), reference.topk_mask(scores, k))
    for n, m in ((1, 2), (2, 4), (4, 8), (8, 16), (3, 3), (5, 12)):
        words = OPS.nm_mask(scores, n, m)
        assert torch.equal(words, reference.nm_mask(scores, n, m))
        assert OPS.is_nm(words, 48, n, m)
        assert reference.is_nm(words, 48, n, m)
    assert reference.unpack_mask(reference.topk_mask(torch.zeros(1, 5), 2), 5).tolist() == [
        [True, True, False, False, False]
    ]


def test_is_nm_sees_a_single_group_too_full():
    mask = torch.tensor([[True, True, False, False] * 10])
    mask[0, 38] = True
    words = reference.pack_mask(mask)
    for check in (OPS.is_nm, reference.is_nm):
        assert not check(words, 40, 2, 4)
        assert check(words, 40, 3, 4)


# --- masked linear ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_linear_and_its_gradients(dtype, contiguous):
    for name, case in linear_cases(dtype, contiguous=contiguous):
        x, weight, bias = (t.clone().requires_grad_() for t in (case.x, case.weight, case.bias))
        y = masked_linear(x, weight, case.mask, bias)
        got = (y, *torch.autograd.grad(y, (x, weight, bias), case.dy))

        tx, tweight, tbias = (t.clone().requires_grad_() for t in (case.x, case.weight, case.bias))
        ty = F.linear(tx, tweight * case.mask, tbias)
        plain = (ty, *torch.autograd.grad(ty, (tx, tweight, tbias), case.dy))

        x64, w64, dy64 = case.x.double(), case.weight.double(), case.dy.double()
        words = reference.pack_mask(case.mask)
        truth = (
            reference.masked_linear(x64, w64, words, case.bias.double()),
            reference.masked_linear_dx(dy64, w64, words),
            reference.masked_linear_dw(dy64, x64, words),
            dy64.reshape(-1, dy64.shape[-1]).sum(0),
        )
        for what, mine, torchs, true in zip(("y", "dx", "dw", "db"), got, plain, truth, strict=True):
            assert_no_worse_than_torch(mine, torchs, true, what=f"{name}: {what}")
        assert_exact_zeros(got[2], case.mask, name)


def test_what_stands_in_pruned_places_does_not_matter():
    mask = torch.rand(6, 40) > 0.5
    clean, x = torch.randn(6, 40) * mask, torch.randn(3, 40)
    dirty = clean.masked_fill(~mask, float("nan"))
    assert torch.equal(masked_linear(x, dirty, mask), masked_linear(x, clean, mask))
    assert torch.equal(masked_linear(x, clean, mask, zeroed=True), masked_linear(x, clean, mask))
    words = reference.pack_mask(mask)
    assert torch.equal(OPS.masked_linear_dx(x @ clean.T, dirty, words, False), (x @ clean.T) @ clean)


def test_gradients_of_first_and_second_order():
    x, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 7), (4, 7), (4,)))
    mask = PackedMask.from_dense(torch.rand(4, 7) > 0.4)

    def layer(x, weight, bias):
        return masked_linear(x, weight, mask, bias)

    assert torch.autograd.gradcheck(layer, (x, weight, bias))
    assert torch.autograd.gradgradcheck(layer, (x, weight, bias))


@pytest.mark.parametrize(
    ("x", "weight", "mask", "bias", "says"),
    [
        ((2, 5), (3, 4), (3, 4), None, "expected (..., K) and (N, K)"),
        ((2, 4), (3, 4), (4, 3), None, "got a mask (4, 3)"),
        ((2, 4), (3, 4), (3, 4), (4,), "got bias (4,); expected (3,)"),
    ],
)
def test_masked_linear_refuses_what_does_not_fit(x, weight, mask, bias, says):
    bias = None if bias is None else torch.randn(bias)
    with pytest.raises(ValueError, match="masked_linear got") as error:
        masked_linear(torch.randn(x), torch.randn(weight), torch.ones(mask, dtype=torch.bool), bias)
    assert says in str(error.value)


def test_masked_linear_refuses_mixed_dtypes_and_float_masks():
    x, mask = torch.randn(2, 4), torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"weight torch\.float16 .* x torch\.float32"):
        masked_linear(x, torch.randn(3, 4).half(), mask)
    with pytest.raises(ValueError, match=r"got torch\.float32 \(3, 4\); expected torch\.bool"):
        masked_linear(x, torch.randn(3, 4), mask.float())


# --- masked AdamW -------------------------------------------------------------------------------------------------


def adamw_inputs(dtype, seed=0):
    """Three parameters (two masked) with old states; pruned places hold garbage, NaN gradients among it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 33), (5,), (2, 3, 70)]
    masks = [torch.rand(s, generator=generator) > 0.5 if s != (5,) else None for s in shapes]
    params, grads, m, v = ([torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(4))
    for grad, mask in zip(grads, masks, strict=True):
        if mask is not None:
            grad[~mask] = float("nan")
    return params, grads, m, [t.square() for t in v], masks


def clones(lists):
    return [[t.clone() for t in of] for of in lists]


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_adamw_step_against_the_reference(dtype, scale):
    *lists, masks = adamw_inputs(dtype)
    grad_scale = None if scale is None else torch.tensor(scale)
    settings = {"lr": 1e-2, "step": 3, "eps": 1e-8, "weight_decay": 0.1, "grad_scale": grad_scale}
    mine, double = clones(lists), [[t.double() for t in of] for of in lists]
    masked_adamw_step(*mine, masks, betas=(0.9, 0.95), **settings)
    words = [torch.empty(0, dtype=torch.int32) if mask is None else reference.pack_mask(mask) for mask in masks]
    grad_scale = settings.pop("grad_scale")
    reference.masked_adamw_step(*double, words, grad_scale, beta1=0.9, beta2=0.95, **settings)
    for what, got, true in zip(("w", "g", "m", "v"), mine, double, strict=True):
        for g, t, mask in zip(got, true, masks, strict=True):
            if what == "g":
                continue
            torch.testing.assert_close(g.double(), t, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-7)
            if mask is not None:
                assert_exact_zeros(g, mask, what)
    for before, after in zip(lists[1], mine[1], strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)  # gradients are only read


def test_masked_grad_norm_ignores_pruned_entries():
    _, grads, _, _, masks = adamw_inputs(torch.float32)
    words = [torch.empty(0, dtype=torch.int32) if mask is None else reference.pack_mask(mask) for mask in masks]
    truth = reference.masked_grad_norm([g.double() for g in grads], words)
    torch.testing.assert_close(masked_grad_norm(grads, masks).double(), truth, rtol=1e-6, atol=0)


def test_masked_adamw_step_refuses_what_does_not_fit():
    w = torch.randn(3, 4)
    good = ([w], [w.clone()], [w.clone()], [w.clone()], [None])
    with pytest.raises(ValueError, match="got step 0"):
        masked_adamw_step(*good, lr=1e-3, step=0)
    with pytest.raises(ValueError, match="lists of 1, 1, 1, 1, 2"):
        masked_adamw_step(*good[:4], [None, None], lr=1e-3, step=1)
    with pytest.raises(ValueError, match=r"got torch\.float16 \(3, 4\)"):
        masked_adamw_step([w], [w.half()], *good[2:], lr=1e-3, step=1)


# --- which implementation runs ------------------------------------------------------------------------------------


def test_use_impl_and_explain():
    with use_impl("torch"):
        choice = explain("masked_linear")
        assert (choice.impl, choice.fused) == ("torch", False)
        assert "use_impl('torch')" in str(choice)
    assert "use_impl" not in explain("masked_linear").reason
    with pytest.raises(ValueError, match="expected one of auto, triton, native, torch"):
        use_impl("cuda")
    with pytest.raises(ValueError, match="got op 'linear'"):
        explain("linear")


def test_a_forced_implementation_never_falls_back():
    x, weight, mask = torch.randn(2, 4), torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool)
    with use_impl("triton"), pytest.raises(RuntimeError, match=r"use_impl\('triton'\) cannot run \w+ on cpu"):
        masked_linear(x, weight, mask)
    masked_linear(x, weight, mask)
