"""MaskedLinear is an nn.Linear to whoever looks at it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ebft_kernels import MaskedLinear, PackedMask, is_masked, mask_linears_
from ebft_kernels.testing import assert_exact_zeros


def make_layer(outputs=6, inputs=40, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    mask = torch.rand(outputs, inputs) > 0.5
    return MaskedLinear.from_linear(nn.Linear(inputs, outputs, bias=bias, dtype=dtype), mask), mask


def test_from_and_to_linear_share_the_parameters():
    linear = nn.Linear(40, 6).eval()
    weight = linear.weight
    layer = MaskedLinear.from_linear(linear, torch.rand(6, 40) > 0.5)
    assert isinstance(layer, nn.Linear)
    assert layer.weight is weight
    assert not layer.training
    back = layer.to_linear()
    assert type(back) is nn.Linear
    assert back.weight is weight
    assert back.bias is linear.bias
    assert_exact_zeros(back.weight, layer.mask.dense())
    x = torch.randn(2, 40)
    torch.testing.assert_close(layer(x), back(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"got a mask \(40, 6\); expected the weight's shape \(6, 40\)"):
        MaskedLinear.from_linear(linear, torch.ones(40, 6, dtype=torch.bool))


def test_state_dict_is_that_of_a_linear_and_loading_masks_again():
    layer, mask = make_layer()
    assert list(layer.state_dict()) == ["weight", "bias"]
    dense = nn.Linear(40, 6)
    with pytest.warns(UserWarning, match="non-zero weights for weight where its mask prunes"):
        layer.load_state_dict(dense.state_dict())
    assert_exact_zeros(layer.weight, mask)
    assert torch.equal(layer.weight[mask], dense.weight[mask])
    nn.Linear(40, 6).load_state_dict(layer.state_dict())
    teacher = nn.Linear(40, 6)
    values = teacher.weight.detach().clone()
    with pytest.warns(UserWarning, match="non-zero weights"):
        layer.load_state_dict(teacher.state_dict(), assign=True)
    assert_exact_zeros(layer.weight, mask)
    assert torch.equal(teacher.weight, values)  # a dense teacher is not pruned along


def test_a_plain_constructor_keeps_everything():
    layer = MaskedLinear(5, 3)
    assert layer.mask.count() == 15
    assert "sparsity=0.000" in repr(layer)
    assert MaskedLinear(5, 3, mask=torch.zeros(3, 5, dtype=torch.bool)).weight.count_nonzero() == 0


def test_another_mask():
    layer, mask = make_layer()
    layer.set_mask_(PackedMask.from_dense(~mask))
    assert torch.equal(layer(torch.ones(40)), layer.bias.detach())  # all that is kept now was pruned before
    assert torch.equal(layer.mask.dense(), ~mask)


def test_gradients_are_zero_where_pruned_on_both_paths():
    layer, mask = make_layer()
    for dense in (False, True):
        if dense:
            with torch.no_grad():
                layer.weight.add_(1.0)
        layer.zero_grad()
        layer(torch.randn(2, 3, 40)).square().sum().backward()
        assert_exact_zeros(layer.weight.grad, mask)
        assert layer.weight.grad[mask].count_nonzero() == mask.sum()


def test_a_plain_optimizer_keeps_the_mask():
    layer, mask = make_layer()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(4, 40)).square().sum().backward()
        optimizer.step()
    assert_exact_zeros(layer.weight, mask)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_copies_are_masked_too(copied):
    layer, _ = make_layer()
    other = copied(layer)
    assert other.weight is not layer.weight
    assert other.mask == layer.mask
    x = torch.randn(2, 40)
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        next(other.parameters()).fill_(1.0)
    assert not is_masked(other)
    assert is_masked(layer)
    assert not is_masked(copied(other))
    third = copied(other)
    third(x)
    assert is_masked(third)  # it writes to its own weight
    assert not is_masked(other)


def test_to_dtype_and_device():
    layer, mask = make_layer()
    assert layer.to(torch.bfloat16) is layer
    assert layer.weight.dtype == torch.bfloat16
    assert layer.mask_words.dtype == torch.int32
    assert_exact_zeros(layer.weight, mask)
    assert layer(torch.randn(2, 40, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.to_empty(device="cpu")
    assert torch.equal(layer.mask.dense(), mask)  # no state dict would bring it back
    assert layer.to("meta").mask_words.device.type == "meta"
    assert layer(torch.empty(2, 40, dtype=torch.bfloat16, device="meta")).shape == (2, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    layer, mask = make_layer()
    plain, x = layer.to_linear(), torch.randn(2, 40)
    for known in (True, False):
        if not known:
            with torch.no_grad():
                layer.weight.mul_(1.0)
        with torch.autocast("cpu", dtype=dtype):
            y, expected = layer(x), plain(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert_exact_zeros(layer.weight.grad, mask)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    layer, mask = make_layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        layer.weight.add_(1.0)  # compiled code masks for itself
    for tokens in (1, 3):
        x = torch.randn(2, tokens, 40)
        y = compiled(x)
        torch.testing.assert_close(y, F.linear(x, layer.weight * mask, layer.bias))
        layer.zero_grad()
        y.sum().backward()
        assert_exact_zeros(layer.weight.grad, mask)


def test_inference_mode():
    layer, _ = make_layer()
    with torch.inference_mode():
        assert layer(torch.randn(2, 40)).shape == (2, 6)
        made_inside, _ = make_layer()
        assert torch.equal(made_inside(torch.ones(40)), made_inside.to_linear()(torch.ones(40)))
        layer._parameters["weight"].data.fill_(1.0)
        layer(torch.ones(40))
        assert is_masked(layer)
    for masked in (made_inside, copy.deepcopy(made_inside)):
        masked.state_dict()
        masked.to(torch.bfloat16)
        assert is_masked(masked)


def test_mask_linears():
    model = nn.Sequential(nn.Linear(40, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 4)))
    masks = {"0.weight": torch.rand(8, 40) > 0.5, "1.1.weight": torch.rand(4, 8) > 0.5}
    keys, params = list(model.state_dict()), list(model.parameters())
    assert mask_linears_(model, masks) is model
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(params, model.parameters(), strict=True))
    assert_exact_zeros(model[1][1].weight, masks["1.1.weight"])
    mask_linears_(model, {"0.weight": ~masks["0.weight"]})  # once more, with another mask
    assert torch.equal(model[0].mask.dense(), ~masks["0.weight"])


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        ({"0.bias": (8,)}, "'0.bias', where Linear is; expected the weight of an nn.Linear"),
        ({"7.weight": (8, 40)}, "'7.weight', where nothing is"),
        ({"1.weight": (8, 40)}, "'1.weight', where ReLU is"),
        ({"0.weight": (40, 8)}, r"got a mask \(40, 8\) for 0.weight; expected \(8, 40\)"),
    ],
)
def test_mask_linears_refuses_and_changes_nothing(masks, says):
    model = nn.Sequential(nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 4))
    good = {"2.weight": torch.ones(4, 8, dtype=torch.bool)}
    with pytest.raises(ValueError, match=says):
        mask_linears_(model, good | {name: torch.ones(shape, dtype=torch.bool) for name, shape in masks.items()})
    assert type(model[2]) is nn.Linear
