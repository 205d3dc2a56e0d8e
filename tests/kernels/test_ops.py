"""Every op: schema, fake and autograd by torch's own checker, values against the reference in float64."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn import functional as F

from ebft_kernels import (
    PackedMask,
    masked_adamw_step,
    masked_grad_norm,
    masked_linear,
    reconstruction_loss,
    reference,
    use_impl,
)
from ebft_kernels.adamw import AdamWStep
from ebft_kernels.ops import OF_A_STEP, SCHEMAS
from ebft_kernels.places import Places
from ebft_kernels.testing import (
    ADAMW_LAYOUTS,
    adamw_step,
    assert_exact_zeros,
    check_linear,
    linear_cases,
    one_adamw_step,
)

OPS = torch.ops.ebft_kernels
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_words(*shape, seed=0):
    return reference.pack_mask(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5)


def op_examples():
    """One call of every op: name -> (args, kwargs)."""
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((2, 3, 37), (5, 37), (5,)))
    dy, words = torch.randn(2, 3, 5, requires_grad=True), make_words(5, 37)
    none = torch.empty(0, dtype=torch.int32)
    step = adamw_step("master", "int8", True, grad_scale=torch.tensor(0.5))
    values, scales = reference.compress(weight.detach(), words, int8=True)
    compressed = (words, values, reference.row_offsets(words), scales)
    places = Places.of(PackedMask(words, weight.shape))
    walks, kept = (*places.walk, *places.back), torch.randn(len(values), requires_grad=True)
    return {
        "pack_mask": ((torch.rand(3, 5, 70) > 0.5,), {}),
        "unpack_mask": ((words, 37), {}),
        "topk_mask": ((torch.randn(3, 40), 7), {}),
        "nm_mask": ((torch.randn(3, 40), 2, 4), {}),
        "is_nm": ((make_words(3, 40), 40, 2, 4), {}),
        "masked_linear": ((x, weight, words, bias, False), {}),
        "masked_linear_dx": ((dy, weight, words, False), {}),
        "masked_linear_dw": ((dy, x, words), {}),
        "row_offsets": ((words,), {}),
        "compressed_linear": ((x, *compressed, bias, 37), {}),
        "decompress": ((*compressed, 37), {}),
        "gather_kept": ((weight, words, places.row_offsets), {}),
        "sparse_linear": ((x, kept, *walks, bias, 37), {}),
        "sparse_linear_dx": ((dy, kept, *walks, 37), {}),
        "sparse_linear_dw": ((dy, x, *walks), {}),
        "zero_pruned": ((weight.detach(), words), {}),
        "zero_pruned_": ((weight.detach().clone(), words), {}),
        "reconstruction_loss": ((dy.detach().requires_grad_(), torch.randn(2, 3, 5), torch.randn(2, 3, 5)), {}),
        "masked_grad_norm": (([torch.randn(5, 37), torch.randn(4)], [words, none]), {}),
        "masked_dw_adamw_step": ((torch.randn(2, 3, 7), torch.randn(2, 3, 33), *step.only(0)._replace(grads=[])), {}),
        "masked_adamw_step": (step, {}),
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_in_place(dtype):
    """Over anything, bit for bit, in whatever strides; memory without anything in pruned places is not written to."""
    for name, case in linear_cases(dtype, contiguous=dtype != torch.float64):
        words = reference.pack_mask(case.mask)
        for value in (1.0, -0.0, float("nan"), float("inf"), torch.finfo(dtype).smallest_normal):
            weight = torch.where(case.mask, case.weight, torch.tensor(value, dtype=dtype))
            OPS.zero_pruned_(weight, words)
            assert_exact_zeros(weight, case.mask, name)
            assert not torch.signbit(weight[~case.mask]).any(), name
            assert torch.equal(weight[case.mask], case.weight[case.mask]), name
            mine, truth = case.weight.clone().T.contiguous().T, case.weight.clone()
            OPS.zero_pruned_(mine, words)
            reference.zero_pruned_(truth, words)
            assert torch.equal(mine, truth), name


@pytest.mark.parametrize("rows", [0, 5])
def test_negated_views_are_not_written_to(rows):
    """Torch's own fallback would do it, and corrupt the stack of arguments where an op returns nothing."""
    weight, words = torch.randn(rows, 40), torch.zeros(rows, 2, dtype=torch.int32)
    before = weight.clone()
    for _ in range(100):
        with pytest.raises(ValueError, match="zero_pruned_ got a negated view; expected a tensor of its own numbers"):
            OPS.zero_pruned_(torch._neg_view(weight), words)
    step = one_adamw_step(torch._neg_view(weight), weight.clone(), *torch.zeros(2, rows, 40), words=words)
    with pytest.raises(RuntimeError, match="mutable TensorLists with negation"):
        OPS.masked_adamw_step(*step)
    assert torch.equal(weight, before)


def test_what_is_zero_already_is_not_written_to(tmp_path):
    """So a weight may lie in a file that is mapped for reading alone."""
    mask = torch.rand(64, 100) > 0.5
    values = torch.randn(64, 100).masked_fill(~mask, 0.0).numpy()
    (tmp_path / "weight").write_bytes(values.tobytes())
    mapped = np.memmap(tmp_path / "weight", np.float32, mode="r", shape=(64, 100))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: not writable
        weight = torch.from_numpy(mapped)
    OPS.zero_pruned_(weight, reference.pack_mask(mask))
    assert torch.equal(weight, torch.from_numpy(values))


# --- masked linear ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_linear_and_its_gradients(dtype, contiguous):
    for name, case in linear_cases(dtype, contiguous=contiguous):
        check_linear(lambda x, weight, bias, mask=case.mask: masked_linear(x, weight, mask, bias), case, name)


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


# --- reconstruction loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reconstruction_loss_is_mean_squared_error(dtype, branch):
    output = (torch.randn(3, 5, 7) * 100).to(dtype).requires_grad_()
    target, residual = torch.randn(3, 5, 7), torch.randn(3, 5, 7) if branch else None
    loss = reconstruction_loss(output, target, residual)
    (gradient,) = torch.autograd.grad(loss, output)
    shifted = output.detach().float() - (residual if branch else 0)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert torch.equal(loss.detach(), F.mse_loss(shifted, target))  # the loop's numbers do not change
    torch.testing.assert_close(gradient, (2 / 105 * (shifted - target)).to(dtype))
    truth = reference.reconstruction_loss(output.double(), target, residual)
    torch.testing.assert_close(loss.double(), truth[0], rtol=1e-6, atol=0)


def test_the_gradient_of_a_scaled_loss_does_not_underflow_in_float16():
    output = torch.full((1000, 1000), 1e-3, dtype=torch.float16, requires_grad=True)
    (reconstruction_loss(output, torch.zeros(1000, 1000)) * 2.0**16).backward()
    torch.testing.assert_close(output.grad.double(), torch.full((1000, 1000), 2e-9 * 2**16).double(), rtol=1e-2, atol=0)


def test_reconstruction_loss_has_gradients_of_second_order():
    tensors = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(reconstruction_loss, tensors)
    assert torch.autograd.gradgradcheck(reconstruction_loss, tensors)
    with pytest.raises(ValueError, match=r"got a target \(4,\) on cpu and an output \(3, 4\)"):
        reconstruction_loss(tensors[0], torch.randn(4))


# --- masked AdamW -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OF_A_STEP)
def test_an_op_takes_the_fields_of_a_step_in_their_order(op):
    arguments = getattr(OPS, op).default._schema.arguments
    assert [argument.name for argument in arguments][-len(AdamWStep._fields) :] == list(AdamWStep._fields)
    step = adamw_step("fp32", "fp32", False)
    written = [argument.name for argument in arguments if argument.alias_info is not None]
    assert [getattr(step, name) for name in written] == list(step.written)


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize(("weights", "moments", "compact"), ADAMW_LAYOUTS)
def test_masked_adamw_step_against_the_reference(weights, moments, compact, scale):
    step = adamw_step(weights, moments, compact, grad_scale=None if scale is None else torch.tensor(scale))
    mine, truth = step.each(torch.clone), step.each(torch.clone)
    OPS.masked_adamw_step(*mine)
    reference.masked_adamw_step(truth)
    for name, gots, trues in zip(AdamWStep._fields, mine.written, truth.written, strict=False):
        for n, (got, true) in enumerate(zip(gots, trues, strict=True)):
            torch.testing.assert_close(
                got, true, rtol=1e-5, atol=1e-7, equal_nan=True, msg=lambda m, w=f"{name}[{n}]": f"{w}: {m}"
            )
    for param, words in zip(mine.params, step.words, strict=True):
        if words.numel():
            assert_exact_zeros(param, reference.unpack_mask(words, param.shape[-1]))
    for before, after in zip(step.grads, mine.grads, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)  # gradients are only read


def test_masked_adamw_step_in_float64_and_with_any_strides():
    weight, mask = torch.randn(6, 10, dtype=torch.float64), torch.rand(6, 10) > 0.4
    grad, scale = torch.randn(10, 6, dtype=torch.float64).T, torch.tensor(1 / 3, dtype=torch.float64)
    buffer = torch.full((6, 20), 7.0, dtype=torch.float64)
    strided = buffer[:, ::2]
    strided.copy_(weight)
    m, v = torch.randn(10, 6, dtype=torch.float64).T, torch.rand(6, 10, dtype=torch.float64)
    expected = [t.clone(memory_format=torch.contiguous_format) for t in (weight, m, v)]
    masked_adamw_step([strided], [grad], [m], [v], [mask], lr=1e-2, step=2, grad_scale=scale)
    w, first, second = expected
    g = (grad * scale).masked_fill(~mask, 0)
    w *= 1 - 1e-2 * 1e-2
    first.mul_(0.9).add_(0.1 * g)
    second.mul_(0.999).add_(0.001 * g * g)
    w -= 1e-2 / (1 - 0.9**2) * first / ((second / (1 - 0.999**2)).sqrt() + 1e-8)
    for got, true in ((strided, w), (m, first), (v, second)):
        torch.testing.assert_close(got, true.masked_fill(~mask, 0), rtol=1e-12, atol=1e-14)
    assert (buffer[:, 1::2] == 7).all()  # the neighbours in memory


def test_gradients_are_zeroed_in_the_pass_if_asked():
    for layout in (("fp32", "fp32", False), ("stochastic", "int8", True)):
        step = adamw_step(*layout, zero_grads=True)
        OPS.masked_adamw_step(*step)
        assert all(torch.count_nonzero(grad) == 0 for grad in step.grads)


def test_masked_grad_norm_ignores_pruned_entries():
    step = adamw_step("fp32", "fp32", False)
    masks = [None if not w.numel() else PackedMask(w, p.shape) for p, w in zip(step.params, step.words, strict=True)]
    truth = reference.masked_grad_norm([g.double() for g in step.grads], step.words)
    torch.testing.assert_close(masked_grad_norm(step.grads, masks).double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_lists_of_no_tensors(impl):
    with use_impl(impl):
        masked_adamw_step([], [], [], [], [], lr=1e-3, step=1)  # there is nothing to do
        with pytest.raises(ValueError, match="masked_grad_norm got no tensors; expected at least one"):
            masked_grad_norm([], [])


def test_masked_adamw_step_refuses_what_does_not_fit():
    w = torch.randn(3, 4)
    good = ([w], [w.clone()], [w.clone()], [w.clone()], [None])
    with pytest.raises(ValueError, match="got step 0"):
        masked_adamw_step(*good, lr=1e-3, step=0)
    with pytest.raises(ValueError, match=r"lists of 1, 1, 1, 1, .*2"):
        masked_adamw_step(*good[:4], [None, None], lr=1e-3, step=1)
    with pytest.raises(ValueError, match=r"a gradient torch\.float16 \(3, 4\) for a parameter torch\.float32"):
        masked_adamw_step([w], [w.half()], *good[2:], lr=1e-3, step=1)
    with pytest.raises(ValueError, match=r"got moments torch\.float16 and torch\.float32"):
        masked_adamw_step(*good[:2], [w.half()], *good[3:], lr=1e-3, step=1)
    with pytest.raises(ValueError, match=r"got 11 first moments; expected 12"):
        masked_adamw_step(*good[:2], [torch.zeros(11)], *good[3:], lr=1e-3, step=1)
    codes = ([torch.zeros(3, 4, dtype=torch.int8)], [torch.zeros(3, 4, dtype=torch.uint8)])
    with pytest.raises(ValueError, match=r"got 0 scales of the first moments; expected 1"):
        masked_adamw_step(*good[:2], *codes, [None], lr=1e-3, step=1)


# --- 8-bit codes and random bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_exact_at_zero_and_fine_near_the_top(signed):
    values = torch.cat([torch.logspace(-16, 0, 700), torch.zeros(68)]) * 3.7
    values = torch.cat([values, -values]) if signed else values
    shuffled = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    codes, scales = reference.quantize(shuffled, signed)
    back = reference.dequantize(codes, scales)
    assert codes.dtype == (torch.int8 if signed else torch.uint8)
    assert scales.shape == (-(-len(values) // 256),)
    assert (back[shuffled == 0] == 0).all()
    assert (back.sign() == shuffled.sign()).all()
    if not signed:
        assert (back[shuffled > 0] > 0).all()  # or the step would explode
    size, error = shuffled.abs() / 3.7, (back - shuffled).abs() / shuffled.abs()
    for least, allowed in (
        (2**-7, 0.07 if signed else 0.035),
        (2**-15, 0.14 if signed else 0.07),
        (2**-23, 0.28 if signed else 0.14),
    ):
        assert error[size > least].max() < allowed
    largest = shuffled.view(-1, 256).abs().amax(-1) if len(values) % 256 == 0 else None
    if largest is not None:
        torch.testing.assert_close(back.view(-1, 256).abs().amax(-1), largest, rtol=1e-6, atol=0)
    assert torch.equal(reference.quantize(back, signed)[0], codes)  # a second time changes nothing


def test_codes_of_the_tiniest_values():
    codes, scales = reference.quantize(torch.tensor([0.0, 1e-45, 1e-38]), signed=False)
    assert codes.tolist()[0] == 0
    assert min(codes.tolist()[1:]) > 0
    assert scales.isfinite().all()
    codes, scales = reference.quantize(torch.zeros(256), signed=True)
    assert codes.count_nonzero() == scales.count_nonzero() == 0


def test_philox_is_philox():
    """The known answers of Random123's own test (kat_vectors, philox4x32 10 rounds)."""
    assert reference.philox(0, 0, 0, torch.tensor([0])).tolist() == [0x6627E8D5]
    full = 0xFFFFFFFF
    assert reference.philox(full << 32 | full, full, full, torch.tensor([-1])).tolist() == [0x408F276D]
    key, counter = 0x299F31D0 << 32 | 0xA4093822, (0x85A308D3 << 32 | 0x243F6A88) - 2**64 * (0x85A308D3 >> 31)
    assert reference.philox(key, 0x03707344, 0x13198A2E, torch.tensor([counter])).tolist() == [0xD16CFE09]


def test_stochastic_rounding_is_right_on_average_and_passes_infinity_and_nan():
    value = torch.full((20000,), 1.0 + 2**-9)  # a quarter of the way from one bfloat16 to the next
    rounded = reference.round_stochastically(value, reference.philox(1, 2, 3, torch.arange(20000)))
    assert set(rounded.tolist()) == {1.0, 1.0078125}
    assert rounded.mean().item() == pytest.approx(1.0 + 2**-9, abs=1e-4)
    odd = torch.tensor([float("inf"), float("-inf"), float("nan")])
    got = reference.round_stochastically(odd, torch.full((3,), 0xFFFF))
    assert got[:2].tolist() == odd[:2].tolist()
    assert got[2].isnan()
