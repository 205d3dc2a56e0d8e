"""``MaskedAdamW(update_in_backward=True)``: the same steps as without, no gradients, and what it refuses."""

import copy
import pickle

import pytest
import torch
from torch import nn

from ebft_kernels import MaskedAdamW, MaskedLinear, PackedMask, mask_linears_, reference
from ebft_kernels.testing import ADAMW_LAYOUTS, adamw_step, assert_exact_zeros

RECIPE = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def make_model(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(40, 33), nn.Tanh(), nn.LayerNorm(33), nn.Linear(33, 5)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    masks = {f"{i}.weight": torch.rand(model[i].weight.shape, generator=generator) > 0.6 for i in (0, 3)}
    return mask_linears_(model, masks)


def train(model, optimizer, steps=4):
    dtype = model[0].weight.dtype
    for step in range(steps):
        x = torch.randn(2, 7, 40, generator=torch.Generator().manual_seed(step)).to(dtype).requires_grad_()
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return x.grad


@pytest.mark.parametrize(("weights", "moments", "compact"), ADAMW_LAYOUTS)
def test_it_takes_the_same_steps(weights, moments, compact):
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    layout = {"weights": weights, "moments": moments, "compact": compact}
    usual, early = make_model(dtype), make_model(dtype)
    optimizer = MaskedAdamW.for_module(early, update_in_backward=True, **layout, **RECIPE)
    dx = train(usual, MaskedAdamW.for_module(usual, **layout, **RECIPE))
    assert torch.equal(train(early, optimizer), dx)  # input gradients used the old weights
    for (name, mine), theirs in zip(early.named_parameters(), usual.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    for layer in (early[0], early[3]):
        assert_exact_zeros(layer.weight, layer.mask.dense())
        assert layer.weight.grad is None


def test_it_takes_the_same_steps_under_autocast():
    usual, early = make_model(), make_model()
    optimizers = (
        MaskedAdamW.for_module(usual, **RECIPE),
        MaskedAdamW.for_module(early, update_in_backward=True, **RECIPE),
    )
    for model, optimizer in zip((usual, early), optimizers, strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            train(model, optimizer)
    for mine, theirs in zip(early.parameters(), usual.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_copies_update_themselves(copied):
    model = make_model()
    optimizer = MaskedAdamW.for_module(model, update_in_backward=True, **RECIPE)
    train(model, optimizer, steps=1)
    other_model, other = copied((model, optimizer))
    before = model[0].weight.detach().clone()
    train(other_model, other, steps=1)
    assert torch.equal(model[0].weight, before)
    assert other.state[other_model[0].weight]["step"] == 2
    assert other_model[0].weight.grad is None


def test_an_optimizer_that_is_gone_updates_nothing():
    model = make_model()
    optimizer = MaskedAdamW.for_module(model, update_in_backward=True)
    del optimizer
    model(torch.randn(3, 40)).sum().backward()
    assert model[0].weight.grad is not None


def test_one_gradient_a_step_and_no_weight_twice():
    model = make_model()
    optimizer = MaskedAdamW.for_module(model, update_in_backward=True)
    x = torch.randn(3, 40)
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"got a second gradient of a weight \(5, 33\) before step\(\)"):
        model(x).sum().backward()  # accumulation, or a repetition after an error
    optimizer.step()
    with pytest.raises(
        RuntimeError, match="expected a weight that is updated in the backward pass to be used once a step"
    ):
        (model(x) + model(2 * x)).sum().backward()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model.zero_grad()
    train(model, optimizer, steps=1)
    model(x).sum().backward()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with pytest.raises(RuntimeError, match=r"got \.grad of a weight that the backward pass has updated"):
        optimizer.step()


def test_a_failed_step_is_not_repeated(monkeypatch):
    model = make_model()
    optimizer = MaskedAdamW.for_module(model, update_in_backward=True)  # noqa: F841  (it lives as long as this name)
    real, calls = MaskedAdamW.update, []

    def update(self, weight, dy, x):
        calls.append(weight)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        real(self, weight, dy, x)

    monkeypatch.setattr(MaskedAdamW, "update", update)
    with pytest.raises(torch.OutOfMemoryError):
        model(torch.randn(3, 40)).sum().backward()
    with pytest.raises(RuntimeError, match="no backward pass again after one that failed"):
        model(torch.randn(3, 40)).sum().backward()


def test_clipping_loss_scaling_and_data_parallelism_are_refused(monkeypatch):
    model = make_model()
    optimizer = MaskedAdamW.for_module(model, update_in_backward=True)
    with pytest.raises(RuntimeError, match="cannot clip by the global norm"):
        optimizer.clip_grad_norm_(1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(torch.randn(3, 40)).sum()).backward()
    with pytest.raises(RuntimeError, match="cannot scale the loss"):
        scaler.step(optimizer)
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="got 2 data-parallel processes; expected one"):
        MaskedAdamW.for_module(model, update_in_backward=True)


def test_a_frozen_weight_and_evaluation_are_left_alone():
    layer = MaskedLinear(8, 4, mask=torch.rand(4, 8) > 0.5)
    optimizer = MaskedAdamW.for_module(layer, update_in_backward=True)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer(torch.randn(2, 8))
    layer.weight.requires_grad_(False)
    layer(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(("weights", "moments", "compact"), ADAMW_LAYOUTS)
def test_the_op_against_the_reference(weights, moments, compact):
    torch.manual_seed(0)
    whole = adamw_step(weights, moments, compact)
    for number in (0, 3, 4, 5, 6):  # the matrices
        step = whole.only(number)._replace(grads=[])
        rows, width = step.params[0].shape
        dy, x = torch.randn(2, 3, rows), torch.randn(2, 3, width)
        mine, truth = step.each(torch.clone), step.each(torch.clone)
        torch.ops.ebft_kernels.masked_dw_adamw_step(dy, x, *mine)
        reference.masked_dw_adamw_step(dy, x, truth)
        unit = torch.finfo(mine.params[0].dtype).eps  # torch's kernel rounds the gradient to the parameter's dtype
        for name in ("params", "exp_avgs", "exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales", "masters"):
            (got,), (true,) = getattr(mine, name), getattr(truth, name)
            codes = true.dtype in (torch.int8, torch.uint8)
            if codes:  # what they stand for: where a gradient is rounded, a small moment may get another
                scales = f"{name[:-1]}_scales"
                got = reference.dequantize(got.flatten(), getattr(mine, scales)[0])
                true = reference.dequantize(true.flatten(), getattr(truth, scales)[0])
            largest = float(true.abs().max() if true.numel() else 0)
            rtol = 0.15 if codes else max(1e-5, 2 * unit)
            torch.testing.assert_close(got.float(), true.float(), rtol=rtol, atol=2 * unit * largest + 1e-6)
        assert_exact_zeros(mine.params[0], PackedMask(step.words[0], step.params[0].shape).dense())


def test_compiled_layers_make_gradients_as_usual():
    layer = MaskedLinear(8, 4, mask=torch.rand(4, 8) > 0.5)
    optimizer = MaskedAdamW.for_module(layer, update_in_backward=True)
    before = layer.weight.detach().clone()
    torch.compile(layer, fullgraph=True, backend="eager")(torch.randn(2, 8)).sum().backward()
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight, before)
    optimizer.step()
    assert not torch.equal(layer.weight, before)
    assert_exact_zeros(layer.weight, layer.mask.dense())
