"""One optimizer step on a pruned matrix: ours against ``torch.optim.AdamW`` followed by the mask multiply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ebft_kernels import MaskedAdamW

RECIPE: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
CONTENDERS = ("ebft", "torch fused", "torch fused, bool mask", "torch foreach", "torch loop")


def make_step(contender: str, weight: nn.Parameter, mask: torch.Tensor) -> Callable[[], None]:
    """A function that takes one step and leaves pruned weights at zero."""
    if contender == "ebft":
        return MaskedAdamW([weight], masks={weight: mask}, **RECIPE).step
    how: dict[str, Any] = {"fused": "fused" in contender, "foreach": "foreach" in contender}
    optimizer = torch.optim.AdamW([weight], **RECIPE, **how)
    factor = mask if "bool" in contender else mask.to(weight.dtype)

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        weight.mul_(factor)

    return step


def make_problem(shape: tuple[int, int], device: torch.device) -> tuple[nn.Parameter, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(shape, generator=generator) > 0.6).to(device)
    weight = nn.Parameter(torch.randn(shape, generator=generator).to(device) * mask)
    weight.grad = torch.randn(shape, generator=generator).to(device)
    return weight, mask


@pytest.mark.parametrize("contender", CONTENDERS)
def test_adamw_step(benchmark: Any, full: bool, device: torch.device, contender: str) -> None:
    shape = (4096, 11008) if full else (64, 96)
    (weight, mask), (expected, _) = make_problem(shape, device), make_problem(shape, device)
    step, truth = make_step(contender, weight, mask), make_step("torch loop", expected, mask)
    for _ in range(2):
        step()
        truth()
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    assert torch.count_nonzero(weight[~mask]) == 0

    benchmark.group = f"AdamW {shape[0]}x{shape[1]} float32"
    benchmark.extra_info["bytes"] = weight.numel() * 28 + weight.numel() // 8
    benchmark(step)
    if benchmark.stats is not None:
        benchmark.extra_info["GB/s"] = benchmark.extra_info["bytes"] / benchmark.stats.stats.median / 1e9


def test_copy_bandwidth(benchmark: Any, full: bool, device: torch.device) -> None:
    """What the step is held against: bytes read and written a second by a plain copy."""
    source = torch.randn(64 * 2**20 if full else 2**10, device=device)
    target = torch.empty_like(source)
    benchmark.group = "copy"
    benchmark(target.copy_, source)
    assert torch.equal(source, target)
    if benchmark.stats is not None:
        benchmark.extra_info["GB/s"] = 2 * source.nbytes / benchmark.stats.stats.median / 1e9
