"""MaskedAdamW against torch.optim.AdamW, and everything an optimizer must live through."""

import copy
import pickle

import pytest
import torch
from torch import nn

from ebft_kernels import MaskedAdamW, MaskedLinear, PackedMask
from ebft_kernels.testing import ADAMW_LAYOUTS, assert_exact_zeros

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


# --- every layout of the states -----------------------------------------------------------------------------------


def make_layout_problem(weights, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    weight = nn.Parameter(torch.randn(40, 300, generator=generator).to(dtype))
    norm = nn.Parameter(torch.ones(300))
    return weight, norm, torch.rand(40, 300, generator=generator) > 0.6


def gradients_of(weight, norm, step, span=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    scales = 10 ** (-span * torch.rand(weight.shape, generator=torch.Generator().manual_seed(99)))
    grad = torch.randn(weight.shape, generator=generator) + 0.5
    return (grad * scales).to(weight.dtype), torch.randn(300, generator=generator)


@pytest.mark.parametrize(("weights", "moments", "compact"), ADAMW_LAYOUTS)
def test_every_layout_follows_float32(weights, moments, compact):
    """Twenty steps against torch's AdamW in float32: no further away than the layout's rounding explains."""
    weight, norm, mask = make_layout_problem(weights)
    start = weight.detach().float() * mask
    optimizer = MaskedAdamW(
        [weight, norm], masks={weight: mask}, weights=weights, moments=moments, compact=compact, **RECIPE
    )
    exact, exact_norm = nn.Parameter(start.clone()), nn.Parameter(torch.ones(300))
    theirs = torch.optim.AdamW([exact, exact_norm], **RECIPE)
    for step in range(20):
        weight.grad, norm.grad = gradients_of(weight, norm, step)
        exact.grad, exact_norm.grad = weight.grad.float() * mask, norm.grad.clone()
        optimizer.step()
        theirs.step()
        assert_exact_zeros(weight, mask, f"step {step}")
    moved = (exact.detach() - start)[mask]
    master = optimizer._dense(weight, "master") if weights == "master" else weight.detach().float()
    error = (master - exact.detach())[mask].norm() / moved.norm()
    allowed = {"fp32": 1e-5, "bf16": 0.01, "int8": 0.1}[moments] + {"fp32": 0, "master": 1e-5, "stochastic": 0.2}[
        weights
    ]
    assert error < allowed
    torch.testing.assert_close(norm, exact_norm, rtol=0, atol={"fp32": 1e-6, "bf16": 2e-3, "int8": 2e-2}[moments])


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("weights", ["fp32", "master", "stochastic"])
def test_survivors_only_states_change_no_bit(weights, moments):
    ends = []
    for compact in (False, True):
        weight, norm, mask = make_layout_problem(weights)
        layout = {"weights": weights, "moments": moments, "compact": compact}
        optimizer = MaskedAdamW([weight, norm], masks={weight: mask}, **layout, **RECIPE)
        for step in range(5):
            weight.grad, norm.grad = gradients_of(weight, norm, step)
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        ends.append([weight, norm, *(optimizer._dense(weight, key) for key in ("exp_avg", "exp_avg_sq"))])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("compact", [False, True])
def test_int8_moments_on_gradients_from_1e_minus_8_to_1(compact):
    """The steps of the smallest gradients neither vanish nor explode."""
    steps = {}
    for moments in ("fp32", "int8"):
        weight, norm, mask = make_layout_problem("fp32")
        start = weight.detach() * mask
        optimizer = MaskedAdamW(
            [weight], masks={weight: mask}, moments=moments, compact=compact, lr=1e-2, weight_decay=0.0
        )
        for step in range(20):
            weight.grad = gradients_of(weight, norm, step, span=8.0)[0]
            optimizer.step()
        steps[moments] = (weight.detach() - start)[mask]
    assert steps["int8"].abs().max() < 2 * steps["fp32"].abs().max()
    small = weight.grad.abs()[mask] < 1e-6
    assert small.sum() > 500
    for chosen, allowed in ((small, 0.35), (~small, 0.15)):  # at 2^-50 of a block's largest a code has one bit
        error = (steps["int8"] - steps["fp32"])[chosen].norm() / steps["fp32"][chosen].norm()
        assert error < allowed
        assert 0.9 < steps["int8"][chosen].norm() / steps["fp32"][chosen].norm() < 1.1


@pytest.mark.parametrize(("weights", "moments", "compact"), ADAMW_LAYOUTS)
def test_the_bytes_of_a_state_are_those_that_are_promised(weights, moments, compact):
    weight, norm, mask = make_layout_problem(weights)
    optimizer = MaskedAdamW([weight, norm], masks={weight: mask}, weights=weights, moments=moments, compact=compact)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    stored = int(mask.sum()) if compact else mask.numel()
    each = {"fp32": 8, "bf16": 4, "int8": 2}[moments] + (4 if weights == "master" else 0)
    scales = 8 * -(-stored // 256) if moments == "int8" else 0
    indices = 8 * 41 if compact else 0
    assert sum(t.nbytes for t in state.values() if isinstance(t, torch.Tensor)) == each * stored + scales + indices


@pytest.mark.parametrize(("weights", "moments", "compact"), ADAMW_LAYOUTS)
def test_set_mask_in_every_layout(weights, moments, compact):
    weight, norm, mask = make_layout_problem(weights)
    optimizer = MaskedAdamW(
        [weight, norm], masks={weight: mask}, weights=weights, moments=moments, compact=compact, **RECIPE
    )
    for step in range(3):
        weight.grad, norm.grad = gradients_of(weight, norm, step)
        optimizer.step()
    keys = ["exp_avg", "exp_avg_sq"] + (["master"] if weights == "master" else [])
    before = {key: optimizer._dense(weight, key) for key in keys}
    fresh = torch.rand(mask.shape, generator=torch.Generator().manual_seed(5)) > 0.5
    optimizer.set_mask_(weight, fresh)
    for key in keys:
        after, survivors = optimizer._dense(weight, key), mask & fresh
        tolerance = (
            {"rtol": 0.15, "atol": 1e-3 * before[key].abs().max().item()}
            if moments == "int8" and key != "master"
            else {"rtol": 0, "atol": 0}
        )
        torch.testing.assert_close(after[survivors], before[key][survivors], **tolerance)
        assert_exact_zeros(after, survivors, key)
    weight.grad, norm.grad = gradients_of(weight, norm, 3)
    optimizer.step()
    assert_exact_zeros(weight, fresh)
    assert weight[fresh].count_nonzero() > 0.99 * fresh.sum()


@pytest.mark.parametrize(("weights", "moments", "compact"), ADAMW_LAYOUTS)
@pytest.mark.parametrize("how", ["state dict", "deepcopy", "pickle"])
def test_every_layout_resumes_bit_for_bit(weights, moments, compact, how):
    weight, norm, mask = make_layout_problem(weights)
    layout = {"weights": weights, "moments": moments, "compact": compact, "seed": 11}
    optimizer = MaskedAdamW([weight, norm], masks={weight: mask}, **layout, **RECIPE)
    for step in range(2):
        weight.grad, norm.grad = gradients_of(weight, norm, step)
        optimizer.step()
    weight.grad = norm.grad = None
    if how == "state dict":
        other_weight, other_norm = copy.deepcopy(weight), copy.deepcopy(norm)
        other = MaskedAdamW([other_weight, other_norm], **layout)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        other = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        other_weight, other_norm = other.param_groups[0]["params"]
    assert other_weight is not weight
    for step in range(2, 4):
        for w, n, o in ((weight, norm, optimizer), (other_weight, other_norm, other)):
            w.grad, n.grad = gradients_of(w, n, step)
            o.step()
    assert torch.equal(other_weight, weight)
    assert torch.equal(other_norm, norm)
    assert other.mask_of(other_weight) == PackedMask.from_dense(mask)


def test_a_state_of_another_layout_is_refused():
    weight, norm, mask = make_layout_problem("fp32")
    optimizer = MaskedAdamW([weight], masks={weight: mask}, moments="int8")
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    for other in ({"moments": "bf16"}, {"moments": "int8", "compact": True}):
        with pytest.raises(ValueError, match=r"got a state dict with torch\.int8 moments of 12000 entries"):
            MaskedAdamW([weight], **other).load_state_dict(optimizer.state_dict())
    amsgrad = torch.optim.AdamW([norm], amsgrad=True)
    norm.grad = torch.ones_like(norm)
    amsgrad.step()
    with pytest.raises(ValueError, match="AMSGrad"):
        MaskedAdamW([norm]).load_state_dict(amsgrad.state_dict())


def test_loading_a_state_leaves_its_source_alone():
    weight, _, mask = make_layout_problem("fp32")
    plain = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    plain.step()
    before = plain.state[weight]["exp_avg"].clone()
    other = nn.Parameter(weight.detach().clone())
    MaskedAdamW([other], masks={other: mask}).load_state_dict(plain.state_dict())
    assert torch.equal(plain.state[weight]["exp_avg"], before)


def test_stochastic_rounding_moves_a_weight_that_rounding_to_nearest_would_hold():
    """Steps of a hundredth of an ulp add up, on average."""
    weight = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    optimizer = MaskedAdamW([weight], lr=4e-5, weight_decay=0.0, weights="stochastic")
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.float().mean().item() == pytest.approx(1 - 100 * 4e-5, abs=2e-4)
    assert torch.equal(weight.new_tensor(1.0) - weight.new_tensor(4e-5), weight.new_tensor(1.0))


def test_layout_settings_are_checked():
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="got weights = 'fp16'; expected one of fp32, master, stochastic"):
        MaskedAdamW([parameter], weights="fp16")
    with pytest.raises(ValueError, match="got moments = 'fp8'; expected one of fp32, bf16, int8"):
        MaskedAdamW([parameter], moments="fp8")
    with pytest.raises(
        TypeError, match=r"torch\.float16; expected torch\.float32, torch\.bfloat16 with weights='stochastic'"
    ):
        MaskedAdamW([nn.Parameter(torch.ones(2, dtype=torch.float16))], weights="stochastic", moments="int8")


def test_a_step_counts_as_a_change_of_weights_and_states():
    """Autograd and MaskedLinear go by version counters, whichever kernel writes."""
    weight = nn.Parameter(torch.randn(4, 8))
    mask = torch.rand(4, 8) > 0.5
    optimizer = MaskedAdamW([weight], masks={weight: mask})
    weight.grad = torch.randn(4, 8)
    optimizer.step()
    states = [weight, *(optimizer.state[weight][key] for key in ("exp_avg", "exp_avg_sq"))]
    before = [tensor._version for tensor in states]
    optimizer.step()
    assert all(tensor._version > version for tensor, version in zip(states, before, strict=True))
    y = (weight * weight).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("compact", [False, True])
def test_masks_are_saved_before_the_first_step(compact):
    """And nothing else is: a library that fills states by a first step (DCP) looks whether there are any."""
    weight, bias, mask, gradients = make_problem()
    optimizer = MaskedAdamW([weight, bias], masks={weight: mask}, compact=compact, **RECIPE)
    assert not optimizer.state
    saved = copy.deepcopy(optimizer.state_dict())
    other_weight, other_bias = nn.Parameter(torch.ones(9, 70)), nn.Parameter(torch.ones(9))
    other = MaskedAdamW([other_weight, other_bias], compact=compact)
    other.load_state_dict(saved)
    run(other, other_weight, other_bias, gradients, range(2))
    assert other.mask_of(other_weight) == PackedMask.from_dense(mask)
    assert_exact_zeros(other_weight, mask)
    assert other_weight[mask].all()


def test_zero_grads_reaches_gradients_that_are_not_contiguous():
    weight, _, mask, _ = make_problem()
    optimizer = MaskedAdamW([weight], masks={weight: mask}, zero_grads=True)
    weight.grad = torch.ones(70, 9).T
    optimizer.step()
    assert not weight.grad.any()
