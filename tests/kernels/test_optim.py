"""MaskedAdamW against torch.optim.AdamW, and everything an optimizer must live through."""

import copy

import pytest
import torch
from torch import nn

from ebft_kernels import MaskedAdamW, MaskedLinear, PackedMask
from ebft_kernels.testing import assert_exact_zeros

RECIPE = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def make_problem(dtype=torch.float32, seed=0):
    """A weight (masked), a bias (not), and gradients that depend on the step alone."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(9, 70, generator=generator, dtype=dtype))
    bias = nn.Parameter(torch.randn(9, generator=generator, dtype=dtype))
    mask = torch.rand(9, 70, generator=generator) > 0.6

    def gradients(step):
        generator = torch.Generator().manual_seed(1000 + step)
        return tuple(torch.randn(p.shape, generator=generator, dtype=dtype) for p in (weight, bias))

    return weight, bias, mask, gradients


def run(optimizer, weight, bias, gradients, steps):
    for step in steps:
        weight.grad, bias.grad = gradients(step)
        optimizer.step()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_a_hundred_steps_of_adamw_on_kept_weights(dtype, tolerance):
    weight, bias, mask, gradients = make_problem(dtype)
    their_weight, their_bias = (nn.Parameter(p.detach().clone()) for p in (weight, bias))
    mine = MaskedAdamW([weight, bias], masks={weight: mask}, **RECIPE)
    theirs = torch.optim.AdamW([their_weight, their_bias], **RECIPE)
    for step in range(100):
        run(mine, weight, bias, gradients, [step])
        run(theirs, their_weight, their_bias, gradients, [step])
        assert_exact_zeros(weight, mask, f"step {step}")
    torch.testing.assert_close(weight[mask], their_weight[mask], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(bias, their_bias, rtol=tolerance, atol=tolerance)
    for key in ("exp_avg", "exp_avg_sq"):
        assert_exact_zeros(mine.state[weight][key], mask, key)


def test_pruned_weights_are_zero_from_the_start_and_nan_gradients_there_are_harmless():
    weight, bias, mask, _ = make_problem()
    optimizer = MaskedAdamW([weight, bias], masks={weight: PackedMask.from_dense(mask)}, **RECIPE)
    assert_exact_zeros(weight, mask)
    weight.grad = torch.ones_like(weight).masked_fill(~mask, float("nan"))
    assert optimizer.clip_grad_norm_(1.0).item() == pytest.approx(mask.sum().sqrt().item())
    optimizer.step()
    assert torch.isfinite(weight).all()
    assert_exact_zeros(weight, mask)


def test_clipping_is_that_of_torch_on_kept_entries():
    weight, bias, mask, gradients = make_problem()
    their_weight, their_bias = (nn.Parameter(p.detach().clone()) for p in (weight, bias))
    mine = MaskedAdamW([weight, bias], masks={weight: mask}, **RECIPE)
    theirs = torch.optim.AdamW([their_weight, their_bias], **RECIPE)
    for step in range(5):
        (weight.grad, bias.grad), (their_weight.grad, their_bias.grad) = gradients(step), gradients(step)
        their_weight.grad *= mask
        their_norm = nn.utils.clip_grad_norm_([their_weight, their_bias], 0.5)
        torch.testing.assert_close(mine.clip_grad_norm_(0.5), their_norm)
        mine.step()
        theirs.step()
    torch.testing.assert_close(weight[mask], their_weight[mask], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias, their_bias, rtol=1e-5, atol=1e-6)


def test_a_clip_factor_is_for_one_step_only():
    weight, bias, mask, gradients = make_problem()
    optimizer = MaskedAdamW([weight, bias], masks={weight: mask}, **RECIPE)
    twin_weight, twin_bias = (nn.Parameter(p.detach().clone()) for p in (weight, bias))
    twin = MaskedAdamW([twin_weight, twin_bias], masks={twin_weight: mask}, **RECIPE)
    weight.grad, bias.grad = gradients(0)
    optimizer.clip_grad_norm_(1e-3)
    optimizer.zero_grad()  # and with the gradient goes its factor
    run(optimizer, weight, bias, gradients, [1])
    run(twin, twin_weight, twin_bias, gradients, [1])
    assert torch.equal(weight, twin_weight)
    assert MaskedAdamW([nn.Parameter(torch.ones(2))]).clip_grad_norm_(1.0) == 0


@pytest.mark.parametrize("through_file", [False, True])
def test_state_dict_round_trip_continues_bit_for_bit(through_file, tmp_path):
    weight, bias, mask, gradients = make_problem()
    optimizer = MaskedAdamW(
        [{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}], masks={weight: mask}, **RECIPE
    )
    run(optimizer, weight, bias, gradients, range(3))
    saved, values = optimizer.state_dict(), [p.detach().clone() for p in (weight, bias)]
    if through_file:
        torch.save(saved, tmp_path / "state.pt")
        saved = torch.load(tmp_path / "state.pt", weights_only=True)
    else:
        saved = copy.deepcopy(saved)
    run(optimizer, weight, bias, gradients, range(3, 6))

    other_weight, other_bias = (nn.Parameter(value) for value in values)
    other = MaskedAdamW(
        [{"params": [other_weight]}, {"params": [other_bias]}]
    )  # it learns the mask and all from the state
    other.load_state_dict(saved)
    assert other.mask_of(other_weight) == PackedMask.from_dense(mask)
    assert other.param_groups[1]["weight_decay"] == 0.0
    run(other, other_weight, other_bias, gradients, range(3, 6))
    assert torch.equal(other_weight, weight)
    assert torch.equal(other_bias, bias)


def test_the_state_of_a_plain_adamw_is_taken_over():
    weight, bias, mask, gradients = make_problem()
    plain = torch.optim.AdamW([weight, bias], **RECIPE)
    run(plain, weight, bias, gradients, range(3))
    optimizer = MaskedAdamW([weight, bias], masks={weight: mask}, **RECIPE)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.state[weight]["step"] == 3
    for tensor in (weight, optimizer.state[weight]["exp_avg"]):
        assert_exact_zeros(tensor, mask)
    run(optimizer, weight, bias, gradients, range(3, 5))
    assert_exact_zeros(weight, mask)


def test_set_mask_keeps_survivors_and_starts_newcomers_at_zero():
    weight, bias, mask, gradients = make_problem()
    optimizer = MaskedAdamW([weight, bias], masks={weight: mask}, **RECIPE)
    run(optimizer, weight, bias, gradients, range(3))
    before = {key: optimizer.state[weight][key].clone() for key in ("exp_avg", "exp_avg_sq")} | {
        "w": weight.detach().clone()
    }
    fresh = torch.rand(mask.shape, generator=torch.Generator().manual_seed(5)) > 0.5
    optimizer.set_mask_(weight, fresh)
    after = {key: optimizer.state[weight][key] for key in ("exp_avg", "exp_avg_sq")} | {"w": weight}
    for key, value in after.items():
        survivors = mask & fresh
        assert torch.equal(value[survivors], before[key][survivors])
        assert_exact_zeros(value, survivors, key)
    run(optimizer, weight, bias, gradients, [3])
    assert_exact_zeros(weight, fresh)
    assert weight[fresh].count_nonzero() == fresh.sum()


def test_parameters_that_join_later_or_have_no_gradient():
    weight, bias, mask, gradients = make_problem()
    optimizer = MaskedAdamW([weight], masks={weight: mask}, **RECIPE)
    weight.grad = gradients(0)[0]
    optimizer.step()
    optimizer.add_param_group({"params": [bias], "lr": 0.5})
    untouched = bias.detach().clone()
    optimizer.step()  # bias has no gradient
    assert torch.equal(bias, untouched)
    run(optimizer, weight, bias, gradients, [1])  # weight's third step, bias's first
    assert (optimizer.state[weight]["step"], optimizer.state[bias]["step"]) == (3, 1)
    torch.testing.assert_close(bias, untouched * (1 - 0.5 * 0.1) - 0.5 * gradients(1)[1].sign(), rtol=1e-4, atol=1e-4)


def test_schedulers_closures_and_grad_scaler():
    layer = MaskedLinear(20, 4, mask=torch.rand(4, 20) > 0.5)
    optimizer = MaskedAdamW.for_module(layer, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(layer(torch.randn(5, 20)).square().mean()).backward()
        scaler.unscale_(optimizer)
        optimizer.clip_grad_norm_(1.0)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(7e-3)
    assert_exact_zeros(layer.weight, layer.mask.dense())

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.ones(20)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad


def test_for_module_leaves_out_frozen_parameters():
    model = nn.Sequential(MaskedLinear(8, 8, mask=torch.rand(8, 8) > 0.5), MaskedLinear(8, 8))
    model[1].requires_grad_(False)
    optimizer = MaskedAdamW.for_module(model)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model[0].parameters()]
    assert optimizer.mask_of(model[0].weight) == model[0].mask
    assert optimizer.mask_of(model[0].bias) is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lr": -1.0}, "lr = -1.0"),
        ({"eps": -1e-8}, "eps"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] = 1.0"),
        ({"weight_decay": -1}, "decay"),
    ],
)
def test_settings_out_of_range(settings, says):
    with pytest.raises(ValueError, match=says):
        MaskedAdamW([nn.Parameter(torch.ones(2))], **settings)


def test_masks_and_parameters_that_do_not_fit():
    weight = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"got a mask \(3, 2\); expected \(2, 3\)"):
        MaskedAdamW([weight], masks={weight: torch.ones(3, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="not among its parameters"):
        MaskedAdamW([weight], masks={nn.Parameter(torch.ones(2, 3)): torch.ones(2, 3, dtype=torch.bool)})
    with pytest.raises(TypeError, match=r"a parameter of torch\.bfloat16"):
        MaskedAdamW([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])
