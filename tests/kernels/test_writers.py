"""Whoever writes to a MaskedLinear and however: neither its next forward nor its next state dict shows it."""

import copy
import ctypes

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ebft_kernels import MaskedAdamW, MaskedLinear, assert_masked, is_masked, mask_linears_
from ebft_kernels import nn as masked_nn
from ebft_kernels.testing import assert_exact_zeros

SHAPE = (130, 140)  # above the 4,096 entries from which bitsandbytes keeps 8-bit states; no whole number of words


def make_layer(dtype=torch.float32):
    torch.manual_seed(0)
    mask = torch.rand(SHAPE) > 0.5
    return MaskedLinear.from_linear(nn.Linear(SHAPE[1], SHAPE[0], dtype=dtype), mask), mask


def parameter_of(layer):
    """The weight, as an optimizer holds it: asked of the layer it would be looked through."""
    return next(layer.parameters())


def train(layer, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(4, SHAPE[1])).square().sum().backward()
        optimizer.step()


# --- writers ------------------------------------------------------------------------------------------------------


def merge(layer):
    """As peft merges an adapter."""
    layer.weight.data += torch.randn(SHAPE)


def replace_data(layer):
    layer.weight.data = torch.randn(SHAPE)


def average(layer):
    """As an exponential moving average is put in the weight's place."""
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn_like(parameter))


def write_through_a_pointer(layer):
    """As bitsandbytes' kernels do."""
    weight, new = parameter_of(layer), torch.randn(SHAPE)
    ctypes.memmove(weight.data_ptr(), new.data_ptr(), new.nbytes)


def write_through_numpy(layer):
    parameter_of(layer).detach().numpy()[:] = 1.0


def lion_8bit(layer):
    """Signs of 8-bit momentum whose zero is no code of its own, so that nothing stays where it was."""
    layer(torch.randn(4, SHAPE[1])).square().sum().backward()
    momentum = torch.where(layer.weight.grad >= 0, 1.0, -1.0)
    weight = parameter_of(layer)
    new = weight.detach() - 0.1 * momentum
    ctypes.memmove(weight.data_ptr(), new.data_ptr(), new.nbytes)


def muon(layer):
    train(layer, torch.optim.Muon([parameter_of(layer)], lr=0.1))


def adamw_from_before(layer):
    """Moments of a dense layer move what has been pruned since."""
    weight = parameter_of(layer)
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    state = {"step": torch.tensor(1.0), "exp_avg": torch.randn(SHAPE), "exp_avg_sq": torch.rand(SHAPE)}
    optimizer.state[weight] = state
    train(layer, optimizer)


def add_in_place(layer):
    with torch.no_grad():
        parameter_of(layer).add_(1.0)


def foreach(layer):
    torch._foreach_add_([parameter.data for parameter in layer.parameters()], 1.0)


def not_a_number(layer):
    parameter_of(layer).data.fill_(float("nan"))


def another_mask(layer):
    """What was kept and is pruned now."""
    layer.set_mask_(torch.rand(SHAPE) > 0.5)


def another_parameter(layer):
    layer.weight = nn.Parameter(torch.randn(SHAPE))


WRITERS = [
    merge, replace_data, average, write_through_a_pointer, write_through_numpy, lion_8bit, muon, adamw_from_before,
    add_in_place, foreach, not_a_number, another_mask, another_parameter,
]  # fmt: skip
SILENT = [write for write in WRITERS if write is not another_mask]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_the_next_forward_shows_nothing(write, grad):
    layer, _ = make_layer()
    x = torch.randn(3, SHAPE[1])
    layer(x)
    write(layer)
    with torch.set_grad_enabled(grad):
        y = layer(x)
    kept = parameter_of(layer).detach().masked_fill(~layer.mask.dense(), 0.0)
    torch.testing.assert_close(y.detach(), F.linear(x, kept, layer.bias).detach(), equal_nan=True)
    if grad:
        y.sum().backward()
        assert_exact_zeros(parameter_of(layer).grad, layer.mask.dense())


@pytest.mark.parametrize("keep_vars", [False, True])
@pytest.mark.parametrize("write", WRITERS)
def test_the_next_state_dict_shows_nothing(write, keep_vars):
    layer, _ = make_layer()
    model = nn.Sequential(nn.ReLU(), layer)
    write(layer)
    state = model.state_dict(keep_vars=keep_vars)
    assert list(state) == ["1.weight", "1.bias"]
    assert_exact_zeros(state["1.weight"], layer.mask.dense())
    assert state["1.weight"].data_ptr() == parameter_of(layer).data_ptr()  # the very memory, as nn.Module gives it
    if keep_vars:
        assert state["1.weight"] is parameter_of(layer)
    plain = nn.Linear(SHAPE[1], SHAPE[0])
    plain.load_state_dict({name.removeprefix("1."): value for name, value in state.items()})
    x = torch.randn(3, SHAPE[1])
    torch.testing.assert_close(plain(x), layer(x), equal_nan=True)


@pytest.mark.parametrize("write", SILENT)
def test_it_is_said_until_then(write):
    layer, mask = make_layer()
    model = nn.Sequential(nn.ReLU(), layer)
    assert is_masked(model)
    assert_masked(model)
    write(layer)
    filled = int((parameter_of(layer).detach()[~mask] != 0).sum())
    assert filled > 4096
    assert not is_masked(model)
    assert f"sparsity={1 - mask.float().mean():.3f}, {filled} pruned weights written to" in repr(model)
    with pytest.raises(ValueError, match=rf"\({filled} of 1\.weight\); expected zeros.*apply_mask_\(\)"):
        assert_masked(model)
    model(torch.randn(3, SHAPE[1]))
    if write is not another_parameter:  # which no layer may write to before it is told
        assert_masked(model)
    model.state_dict()
    assert is_masked(model)
    assert "written" not in repr(model)


def test_a_model_without_masks_is_not_masked():
    plain = nn.Sequential(nn.Linear(3, 2))
    assert not is_masked(plain)
    with pytest.raises(ValueError, match="found no MaskedLinear in a Sequential"):
        assert_masked(plain)


def test_whoever_asks_for_the_weight_gets_it_masked():
    """Code that goes around forward: torch's fast path of an encoder, a forward that somebody kept."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    mask_linears_(encoder, {"linear1.weight": torch.rand(64, 32) > 0.5})
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        before = encoder(x)
        encoder.linear1._parameters["weight"].data.masked_fill_(~encoder.linear1.mask.dense(), 1.0)
        torch.testing.assert_close(encoder(x), before)


def test_kept_weights_and_graphs_are_left_alone():
    """A forward that has to clear something does not spoil a graph that was made before."""
    layer, mask = make_layer()
    x = torch.randn(3, SHAPE[1], requires_grad=True)
    first = layer(x)
    version, kept = parameter_of(layer)._version, parameter_of(layer).detach()[mask].clone()
    parameter_of(layer).data[~mask] = 1.0
    (first.sum() + layer(x).sum()).backward()
    assert parameter_of(layer)._version == version
    assert torch.equal(parameter_of(layer).detach()[mask], kept)
    torch.testing.assert_close(x.grad, 2 * (parameter_of(layer) * mask).detach().sum(0).expand(3, -1))


def test_another_mask_ends_graphs_that_saw_the_weights_it_prunes():
    layer, mask = make_layer()
    y = layer(torch.randn(3, SHAPE[1], requires_grad=True))
    layer.set_mask_(~mask)
    with pytest.raises(RuntimeError, match=r"modified (by an inplace operation|inplace)"):
        y.sum().backward()


def test_the_tensors_of_others_are_not_written_to():
    """``functional_call`` and a loaded teacher lend the layer a weight; only its own is zeroed."""
    layer, mask = make_layer()
    teacher = torch.randn(SHAPE)
    lent, x = teacher.clone(), torch.randn(3, SHAPE[1])
    for weight in (lent, nn.Parameter(lent)):
        y = torch.func.functional_call(layer, {"weight": weight}, (x,))
        torch.testing.assert_close(y, F.linear(x, teacher * mask, layer.bias))
    assert torch.equal(lent, teacher)
    layer(x)  # its own again
    assert is_masked(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_and_strided_weights(dtype):
    layer, mask = make_layer(dtype)
    for weight in (torch.randn(SHAPE, dtype=dtype), torch.randn(SHAPE[::-1], dtype=dtype).T):
        layer.weight.data = weight
        layer(torch.randn(3, SHAPE[1], dtype=dtype))
        assert_exact_zeros(weight, mask)


def test_checkpointed_and_shared_layers():
    layer, mask = make_layer()
    square = MaskedLinear.from_linear(nn.Linear(SHAPE[1], SHAPE[1]), torch.rand(SHAPE[1], SHAPE[1]) > 0.5)
    model = nn.Sequential(square, nn.Tanh(), square, layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        y = torch.utils.checkpoint.checkpoint(model, torch.randn(3, SHAPE[1], requires_grad=True), use_reentrant=False)
        optimizer.zero_grad()
        y.square().sum().backward()
        average(layer)
        optimizer.step()
    model.state_dict()
    assert_exact_zeros(parameter_of(layer), mask)


# --- a device on which a look is dear -----------------------------------------------------------------------------


@pytest.fixture
def trusting(monkeypatch):
    """As on a GPU: without gradients a weight that was looked through is trusted."""
    monkeypatch.setattr(masked_nn, "_trusts", lambda weight: True)


def look_count(monkeypatch):
    looks, real = [], torch.ops.ebft_kernels.zero_pruned_
    monkeypatch.setattr(
        masked_nn._OPS, "zero_pruned_", lambda held, words: looks.append(len(held)) or real(held, words)
    )
    return looks


@pytest.mark.parametrize("write", [*(w for w in WRITERS if w not in (average, write_through_a_pointer, foreach))])
def test_trust_ends_with_whatever_points_to_a_write(write, trusting):
    layer, _ = make_layer()
    x = torch.randn(3, SHAPE[1])
    with torch.no_grad():
        layer(x)
    if write in (write_through_numpy, not_a_number):  # nothing shows these; what comes with them does
        layer.eval()
    write(layer)
    with torch.no_grad():
        y = layer(x)
    kept = parameter_of(layer).detach().masked_fill(~layer.mask.dense(), 0.0)
    torch.testing.assert_close(y, F.linear(x, kept, layer.bias).detach(), equal_nan=True)


@torch.no_grad()
def test_trust_saves_passes_and_is_tested_all_the_time(trusting, monkeypatch):
    layer, mask = make_layer()
    looks, x = look_count(monkeypatch), torch.randn(3, SHAPE[1])
    for _ in range(4):
        layer(x)
    assert looks == [130, 9, 9, 9]  # a sixteenth of the rows, in turn
    write_through_a_pointer(layer)
    for _ in range(masked_nn.STRIPES):
        layer(x)
    assert_exact_zeros(parameter_of(layer), mask)
    del looks[:]
    with torch.enable_grad():
        layer(x)
        layer(x)
    layer(x)
    layer.train()
    layer(x)
    assert looks == [130] * 4


# --- averages and casts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_models_keep_the_mask(use_buffers):
    layer, mask = make_layer()
    model = nn.Sequential(layer, nn.BatchNorm1d(SHAPE[0]))
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=use_buffers)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        train(model, optimizer, steps=1)
        averaged.update_parameters(model)
    assert torch.equal(averaged.module[0].mask.dense(), mask)
    assert averaged.module[0].mask_words is not layer.mask_words
    assert_exact_zeros(averaged.module.state_dict()["0.weight"], mask)


def test_nothing_casts_or_averages_the_words():
    layer, mask = make_layer()
    assert list(layer.buffers()) == []
    layer.half().double().to(torch.bfloat16).apply(lambda module: module.float())
    assert layer.mask_words.dtype == torch.int32
    for tensor in (*layer.buffers(), *layer.parameters()):
        tensor.data.mul_(0.5)
    assert torch.equal(layer.mask.dense(), mask)
    assert is_masked(layer)


def test_a_layer_keeps_its_mask_through_meta_and_empty_memory():
    layer, mask = make_layer()
    state = copy.deepcopy(layer.state_dict())
    layer.to("meta")
    assert layer.mask_words.is_meta
    assert layer(torch.empty(3, SHAPE[1], device="meta")).shape == (3, SHAPE[0])
    copy.deepcopy(layer).to_empty(device="cpu")
    layer.to_empty(device="cpu")
    assert is_masked(layer)
    layer.load_state_dict(state)
    assert torch.equal(layer.mask.dense(), mask)
    assert torch.equal(layer.weight, state["weight"])
    with torch.device("meta"):
        made = MaskedLinear(SHAPE[1], SHAPE[0], mask=mask)
    made.load_state_dict(state, assign=True)
    assert torch.equal(made.weight, state["weight"])
    assert torch.equal(made.mask.dense(), mask)
    with torch.device("meta"):
        made = MaskedLinear(SHAPE[1], SHAPE[0])
        lost = MaskedLinear(SHAPE[1], SHAPE[0], mask=torch.empty(SHAPE, dtype=torch.bool))
    assert "sparsity=0.000" in repr(made.to_empty(device="cpu"))
    assert "sparsity" not in repr(lost)
    with pytest.raises(ValueError, match=r"a mask on the meta device for a weight on cpu; expected set_mask_"):
        lost.to_empty(device="cpu")
    lost.set_mask_(mask)
    lost.load_state_dict(state)
    assert is_masked(lost)


@pytest.mark.parametrize("swap", [False, True])
def test_moves_and_loads_that_swap_tensors(swap):
    layer, mask = make_layer()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        layer.to(torch.bfloat16).to(torch.float32)
        layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    average(layer)
    layer(torch.randn(3, SHAPE[1]))
    assert_exact_zeros(parameter_of(layer), mask)


# --- loading --------------------------------------------------------------------------------------------------------


def test_what_loading_drops_is_said(recwarn):
    layer, mask = make_layer()
    model = nn.Sequential(nn.ReLU(), layer)
    dense = {"1.weight": torch.randn(SHAPE), "1.bias": torch.zeros(SHAPE[0])}
    dropped = int((~mask).sum())
    for assign in (False, True):
        with pytest.warns(UserWarning, match=rf"got {dropped} non-zero weights for 1\.weight where its mask prunes"):
            model.load_state_dict(dense, assign=assign)
        assert is_masked(model)
    recwarn.clear()
    average(layer)  # what stood there before is not what was loaded
    model.load_state_dict({"1.bias": torch.zeros(SHAPE[0])}, strict=False)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert not recwarn.list
    assert is_masked(model)


def test_masked_adamw_beside_another_writer():
    layer, mask = make_layer()
    optimizer = MaskedAdamW.for_module(layer)
    average(layer)
    train(layer, optimizer, steps=1)
    assert_exact_zeros(parameter_of(layer), mask)
