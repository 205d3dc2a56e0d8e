"""Optimizers under the mask: against their formulas in float64, against torch, and in a run."""

import pytest
import torch
from conftest import random_model
from torch import nn

from ebft import BlockReconstructor, EBFTConfig, EBFTError, run_ebft
from ebft.plan.planner import make_plan
from ebft.recovery.optimizers.masked import MaskedLion, MaskedMuon
from ebft_kernels import PackedMask, load_masks


def problem(kind, dtype=torch.float64, shape=(6, 10)):
    """An optimizer of a masked matrix and a free bias, their start, and gradients of five steps."""
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(shape, dtype=dtype)), nn.Parameter(torch.randn(6, dtype=dtype))
    mask = torch.rand(shape) > 0.5
    start = [weight.detach() * mask, bias.detach().clone()]
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = kind(groups, lr=0.01, betas=(0.9, 0.95), masks={weight: PackedMask.from_dense(mask)})
    assert torch.equal(weight.detach(), start[0])
    gradients = [[torch.randn(shape, dtype=dtype), torch.randn(6, dtype=dtype)] for _ in range(5)]
    return optimizer, weight, bias, mask, start, gradients


def run(optimizer, weight, bias, gradients):
    """Five steps at falling learning rates, with whatever gradient where pruned."""
    for step, (of_weight, of_bias) in enumerate(gradients):
        weight.grad, bias.grad = of_weight.clone(), of_bias.clone()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)
        optimizer.step()


def test_sign_is_lion_on_kept_weights():
    optimizer, weight, bias, mask, start, gradients = problem(MaskedLion)
    run(optimizer, weight, bias, gradients)
    for which, (decay, got) in enumerate(((0.1, weight), (0.0, bias))):
        value, momentum = start[which].clone(), torch.zeros_like(start[which])
        for step, of_step in enumerate(gradients):
            gradient = of_step[which] * (mask if which == 0 else 1)
            lr = 0.01 / (step + 1)
            value = value - lr * ((0.9 * momentum + 0.1 * gradient).sign() + decay * value)
            momentum = 0.95 * momentum + 0.05 * gradient
        torch.testing.assert_close(got.detach(), value)
    assert torch.count_nonzero(weight[~mask]) == 0


@pytest.mark.parametrize("shape", [(6, 10), (3, 6, 4)])
def test_muon_is_an_orthogonal_step_of_the_masked_momentum(shape):
    """The exact polar factor of every matrix, whose singular values the iteration gives as about 0.7 to 1.2."""
    optimizer, weight, bias, mask, start, gradients = problem(MaskedMuon, torch.float32, shape)
    momentum, largest = torch.zeros(shape, dtype=torch.float64), max(shape[-2:])
    for step, (of_weight, of_bias) in enumerate(gradients):
        before = weight.detach().double()
        run(optimizer, weight, bias, [(of_weight, of_bias)])
        momentum = 0.9 * momentum + 0.1 * of_weight.double() * mask
        u, _, v = torch.linalg.svd(0.1 * of_weight.double() * mask + 0.9 * momentum, full_matrices=False)
        moved = (before * (1 - 0.01 * 0.1) - weight.detach().double()) / (0.01 * 0.2 * largest**0.5)
        assert torch.count_nonzero(weight[~mask]) == 0
        polar = (u @ v) * mask  # what the step would be with singular values of 1
        likeness = (moved * polar).sum() / (moved.norm() * polar.norm())
        assert likeness > 0.93, step
        assert 0.6 < moved.norm() / polar.norm() < 1.25
    adamw = nn.Parameter(start[1].clone())
    twin = torch.optim.AdamW([adamw], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for _, of_bias in gradients:
        adamw.grad = of_bias
        twin.step()
    torch.testing.assert_close(bias, adamw)


def test_clipping_is_over_kept_weights():
    for kind in (MaskedLion, MaskedMuon):
        optimizer, weight, bias, mask, _, gradients = problem(kind)
        weight.grad, bias.grad = (gradient.clone() for gradient in gradients[0])
        norm = torch.cat([weight.grad[mask], bias.grad]).norm()
        torch.testing.assert_close(optimizer.clip_grad_norm_(0.5), norm)
        torch.testing.assert_close(
            torch.cat([weight.grad[mask], bias.grad]).norm(), norm.new_tensor(0.5), rtol=1e-5, atol=0
        )
        torch.testing.assert_close(optimizer.clip_grad_norm_(2.0), norm.new_tensor(0.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("optimizer", ["sign", "muon"])
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "mixtral"])
def test_a_run_comes_nearer_and_stays_sparse(optimizer, family, config, tokenizer, silent):
    """Conv1D and fused experts among them; each matrix has a rate of its own."""
    settings = config(optimizer=optimizer, lr=2e-2, lr_scale="rms", epochs=3)
    result = run_ebft(random_model(family), settings, tokenizer=tokenizer, reporter=silent)
    for line in result.blocks:
        assert line["loss_after"] < 0.95 * line["loss_before"]
        assert not line["notes"]
    for name, mask in load_masks(result.output / "masks.safetensors").items():
        assert torch.count_nonzero(result.model.get_parameter(name)[~mask.dense()]) == 0


@pytest.mark.parametrize("optimizer", ["sign", "muon"])
def test_products_in_float16(optimizer):
    torch.manual_seed(0)
    block, x = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)).requires_grad_(False), torch.randn(8, 4, 8)
    y, mask = block(x), PackedMask.from_dense(torch.rand(12, 8) > 0.5)
    settings = EBFTConfig.of(optimizer=optimizer, lr=1e-3, batch_size=4, epochs=8, weight_decay=0.0)
    result = BlockReconstructor(settings, torch.device("cpu"), torch.float16).fit(block, x, y, masks={"0.weight": mask})
    assert result.error_after < 0.9 * result.error_before


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"weights": "master"},
            "--weights is a setting of --optimizer adamw, and --optimizer is muon; expected --optimizer adamw",
        ),
        (
            {"moments": "int8"},
            "--moments is a setting of --recover lora or full or distill, or --optimizer adamw, and --recover is ebft "
            "and --optimizer is muon; expected one of these, or no such setting",
        ),
        ({"compact": True}, "--compact is a setting of --recover full or distill, or --optimizer adamw, and"),
        ({"update_in_backward": True, "clip": 0}, "--update-in-backward is a setting of --optimizer adamw, and --opt"),
        (
            {"update_in_backward": True, "recover": "layerwise"},
            "--update-in-backward is a setting of --recover ebft --optimizer adamw, and --recover is layerwise",
        ),
    ],
)
def test_layouts_are_those_of_adamw(given, says):
    with pytest.raises(EBFTError, match=says):
        EBFTConfig.of(**({} if "recover" in given else {"optimizer": "muon"}), **given)


def test_a_plan_counts_their_states(short_run):
    """One state a weight, where AdamW has two; and the leaner settings that are tried are ones that go with them."""
    plans = {}
    for optimizer in ("adamw", "sign", "muon"):
        plans[optimizer] = make_plan(EBFTConfig.of(**short_run(optimizer=optimizer)))
        leanest = make_plan(
            EBFTConfig.of(**short_run(optimizer=optimizer, gpu_memory="1MiB", dtype="bfloat16", device="auto"))
        )
        assert leanest.faults
        assert ("moments" in leanest.chosen) == (optimizer == "adamw")
    states = {name: plan.device["optimizer states"] for name, plan in plans.items()}
    assert states["sign"] < 0.55 * states["adamw"]
    assert states["muon"] < 0.6 * states["adamw"]
    assert states["muon"] > states["sign"]
