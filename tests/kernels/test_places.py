"""Products with kept weights alone: the ops, their derivatives, and the layout. tests/native holds the native kernels
against the reference."""

import pytest
import torch

from ebft_kernels import PackedMask, reference
from ebft_kernels.places import Places
from ebft_kernels.testing import MASK_KINDS, UGLY_SHAPES, make_mask

OPS = torch.ops.ebft_kernels


def case(kind, lead, rows, width, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    mask = make_mask(kind, rows, width, generator)
    places = Places.of(PackedMask.from_dense(mask))
    weight, x = (torch.randn(*shape, width, generator=generator, dtype=dtype) for shape in ((rows,), lead))
    dy, bias = (torch.randn(*shape, rows, generator=generator, dtype=dtype) for shape in (lead, ()))
    return places, mask, weight, x, dy, bias


def product(places, x, values, bias, width):
    return OPS.sparse_linear(x, values, *places.walk, *places.back, bias, width)


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_are_those_of_the_masked_weight(kind, dtype):
    for lead, rows, width in (*UGLY_SHAPES, ((70,), 140, 300)):
        places, mask, weight, x, dy, bias = case(kind, lead, rows, width, dtype)
        weight, x, bias = (t.requires_grad_() for t in (weight, x, bias))
        values = OPS.gather_kept(weight, places.words, places.row_offsets)
        assert torch.equal(values, weight[mask])
        y = product(places, x, values, bias, width)
        true = torch.nn.functional.linear(x.double(), torch.where(mask, weight, 0.0).double(), bias.double())
        torch.testing.assert_close(y.double(), true, rtol=1e-5, atol=1e-4)
        got = torch.autograd.grad(y, (x, weight, bias), dy)
        for ours, theirs in zip(got, torch.autograd.grad(true, (x, weight, bias), dy.double()), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
        assert not got[1][~mask].any()


def test_derivatives_of_any_order():
    places, mask, weight, x, _, bias = case("random", (3,), 5, 140)
    weight = torch.where(mask, weight, 0.0)
    given = tuple(t[..., :140].clone().requires_grad_() for t in (x, weight, bias))

    def layer(x, weight, bias):
        return product(places, x, OPS.gather_kept(weight, places.words, places.row_offsets), bias, 140).square()

    assert torch.autograd.gradcheck(layer, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, given, fast_mode=True)


def test_the_layout_of_a_small_mask():
    mask = torch.zeros(3, 130, dtype=torch.bool)
    mask[0, [1, 129]] = mask[2, [0, 1]] = True
    places = Places.of(PackedMask.from_dense(mask))
    assert places.walk.columns.tolist() == [1, 1, 0, 1]
    assert places.walk.offsets.tolist() == [0, 1, 2, 2, 2, 4, 4]
    assert places.back.columns.tolist() == [2, 0, 2, 0]
    assert places.back.offsets.tolist() == [0, 1, *[3] * 128, 4]
    assert places.belong_to(reference.pack_mask(mask))
    assert not places.belong_to(reference.pack_mask(~mask))


def test_a_way_back_through_other_places_is_refused():
    places, mask, _, _, dy, _ = case("random", (3,), 5, 140)
    other = Places.of(PackedMask.from_dense(mask.flip(1)))
    values = torch.zeros(int(mask.sum()), dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        with pytest.raises(ValueError, match="do not meet the same places"):
            OPS.sparse_linear_dx(dy.to(dtype), values.to(dtype), *places.walk, *other.back, 140)
