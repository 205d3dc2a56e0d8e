"""Products with kept weights alone: the ops, their derivatives, and the layout. tests/native holds the native kernels
against the reference."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from ebft_kernels import (
    MaskedAdamW,
    MaskedLinear,
    PackedMask,
    dispatch,
    explain,
    reference,
    unmask_linears_,
    use_impl,
)
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


# --- MaskedLinear ---------------------------------------------------------------------------------------------------


@pytest.fixture
def skipped(monkeypatch):
    """Whatever is multiplied, it was measured to be faster without zeros."""
    everything = {dispatch.cpu_kind(): {"least_side": 1, "sparsity": {"0": 0.0}}}
    monkeypatch.setattr(dispatch, "sparse_measured", lambda: everything)
    with use_impl("auto"):
        yield


def layer_of(seed=0):
    torch.manual_seed(seed)
    mask = torch.rand(30, 140) > 0.6
    return MaskedLinear(140, 30, mask=mask), mask, torch.randn(2, 35, 140, requires_grad=True)


def skips(y):
    return "sparse_linear" in type(y.grad_fn).__name__


def test_a_layer_skips_zeros_and_gives_what_it_gave(skipped):
    layer, mask, x = layer_of()
    y = layer(x)
    assert skips(y)
    with use_impl("torch"):
        dense = layer(x)
    assert not skips(dense)
    torch.testing.assert_close(y, dense)
    wanted = (x, layer.weight, layer.bias)
    dy = torch.randn_like(y)
    for ours, theirs in zip(*(torch.autograd.grad(of, wanted, dy) for of in (y, dense)), strict=True):
        torch.testing.assert_close(ours, theirs)
    layer(x).square().sum().backward()
    assert not layer.weight.grad[~mask].any()
    assert layer.weight.grad.is_contiguous()


def test_second_derivatives_through_a_layer(skipped):
    layer, _, x = layer_of()
    of = []
    for impl in ("auto", "torch"):
        with use_impl(impl):
            (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
            of.append(torch.autograd.grad(dx.square().sum(), (x, layer.weight)))
    for ours, theirs in zip(*of, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_whoever_writes_is_seen(skipped):
    layer, mask, x = layer_of()
    layer(x)
    held = next(layer.parameters())
    with torch.no_grad():
        held.data.fill_(1.0)
        torch.testing.assert_close(layer(x), F.linear(x, mask.float(), layer.bias))
        layer.mask_words.data.copy_(PackedMask.from_dense(~mask).words)  # no version counts this
        held.data.fill_(2.0)
        torch.testing.assert_close(layer(x), F.linear(x, 2.0 * ~mask, layer.bias))
        layer.set_mask_(mask)
        held.data.fill_(3.0)
        torch.testing.assert_close(layer(x), F.linear(x, 3.0 * mask, layer.bias))
    y = layer(x)
    layer.set_mask_(~mask)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_copies_and_state_dicts_know_nothing_of_places(skipped):
    layer, _, x = layer_of()
    y = layer(x)
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    assert "_places" not in layer.__getstate__()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y)
    assert "_places" not in vars(unmask_linears_(layer))


def test_where_zeros_are_not_skipped(skipped):
    layer, _, x = layer_of()
    with torch.autocast("cpu", torch.bfloat16):
        assert not skips(layer(x))
    assert not skips(layer.double()(x.double()))
    layer = layer.float()
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    optimizer = MaskedAdamW.for_module(layer, update_in_backward=True)
    assert not skips(layer(x))
    del optimizer
    assert skips(layer(x))


def test_it_skips_zeros_only_where_that_was_measured_to_be_faster(skipped, monkeypatch):
    table = {"least_side": 100, "sparsity": {"256": 0.7, "1024": 0.5}}
    monkeypatch.setattr(dispatch, "sparse_measured", lambda: {dispatch.cpu_kind(): table})

    def of(**given):
        settings = {"shape": (200, 300), "density": 0.4, "tokens": 2048, **given}
        return explain("masked_linear", "cpu", **settings)

    assert of().impl == of(density=0.3, tokens=300).impl == "native"
    assert "faster with 50% zeros from 1024 tokens on; here are 60% and 2048" in of().reason
    assert of(tokens=300).impl == of(density=0.6).impl == of(shape=(99, 300)).impl == of(tokens=255).impl == "torch"
    assert of(dtype=torch.bfloat16).impl == "torch"
    with use_impl("torch"):
        assert of().impl == "torch"
    monkeypatch.setattr(dispatch, "sparse_measured", dict)
    assert "nothing has been measured" in of().reason
