"""One optimizer step on a pruned matrix: ours, in every layout, against ``torch.optim.AdamW`` and the mask multiply.

``GB/s`` is the bytes that a step must move over the median; ``test_copy_bandwidth`` measures what the machine can do (a
copy reads what it overwrites, too, which is not counted).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.kernel_cases import must_move
from ebft_kernels import MaskedAdamW, explain
from ebft_kernels.testing import ADAMW_LAYOUTS

RECIPE: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
SPARSITY = 0.7
TORCH = ("torch fused", "torch fused, bool mask", "torch foreach", "torch loop")
AGREES = {"fp32": 1e-5, "bf16": 2e-2, "int8": 0.5}  # with torch's float32 steps: the worst weight, in learning rates


def make_problem(shape: tuple[int, int], device: torch.device) -> tuple[nn.Parameter, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(shape, generator=generator) >= SPARSITY).to(device)
    weight = nn.Parameter(torch.randn(shape, generator=generator).to(device) * mask)
    weight.grad = torch.randn(shape, generator=generator).to(device)
    return weight, mask


def torch_step(contender: str, weight: nn.Parameter, mask: torch.Tensor) -> Callable[[], None]:
    """A function that takes one step of torch's and sets pruned weights back to zero."""
    how: dict[str, Any] = {"fused": "fused" in contender, "foreach": "foreach" in contender}
    optimizer = torch.optim.AdamW([weight], **RECIPE, **how)
    factor = mask if "bool" in contender else mask.to(weight.dtype)

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        weight.mul_(factor)

    return step


def in_layout(weight: nn.Parameter, weights: str) -> nn.Parameter:
    if weights == "fp32":
        return weight
    small = nn.Parameter(weight.detach().bfloat16())
    assert weight.grad is not None
    small.grad = weight.grad.bfloat16()
    return small


@pytest.fixture
def shape(full: bool) -> tuple[int, int]:
    return (4096, 11008) if full else (64, 96)


@pytest.mark.parametrize("contender", TORCH)
def test_torch(benchmark: Any, shape: tuple[int, int], device: torch.device, contender: str) -> None:
    weight, mask = make_problem(shape, device)
    step = torch_step(contender, weight, mask)
    step()
    assert torch.count_nonzero(weight[~mask]) == 0
    measure(benchmark, step, shape, 28 + 1 / 8)


@pytest.mark.parametrize(("weights", "moments", "compact"), ADAMW_LAYOUTS)
def test_ebft(
    benchmark: Any, shape: tuple[int, int], device: torch.device, weights: str, moments: str, compact: bool
) -> None:
    (weight, mask), (expected, _) = make_problem(shape, device), make_problem(shape, device)
    truth = torch_step("torch fused", expected, mask)
    weight = in_layout(weight, weights)
    optimizer = MaskedAdamW([weight], masks={weight: mask}, weights=weights, moments=moments, compact=compact, **RECIPE)
    for _ in range(2):
        optimizer.step()
        truth()
    moved = (weight.float() - expected)[mask].abs().max()
    # bfloat16 is off by half a last place at the start; by half (to nearest) or one (stochastically) with every step.
    roundings = {"fp32": 2**-22, "master": 2 * 2**-8, "stochastic": 2**-8 + 2 * 2**-7}[weights]
    allowed = roundings * float(expected.detach().abs().max())
    assert moved <= allowed + 2 * RECIPE["lr"] * AGREES[moments]
    assert torch.count_nonzero(weight[~mask]) == 0
    benchmark.extra_info["implementation"] = str(explain("masked_adamw_step", device, weight.dtype))
    measure(benchmark, optimizer.step, shape, must_move(weights, moments, compact, SPARSITY))


def measure(benchmark: Any, step: Callable[[], Any], shape: tuple[int, int], bytes_a_weight: float) -> None:
    benchmark.group = f"AdamW {shape[0]}x{shape[1]}, {SPARSITY:.0%} pruned"
    benchmark.extra_info["bytes"] = shape[0] * shape[1] * bytes_a_weight
    benchmark(step)
    if benchmark.stats is not None:
        benchmark.extra_info["GB/s"] = benchmark.extra_info["bytes"] / benchmark.stats.stats.median / 1e9


def test_copy_bandwidth(benchmark: Any, full: bool, device: torch.device) -> None:
    """What the steps are held against: bytes read and written a second by a plain copy."""
    source = torch.randn(64 * 2**20 if full else 2**10, device=device)
    target = torch.empty_like(source)
    benchmark.group = "copy"
    benchmark(target.copy_, source)
    assert torch.equal(source, target)
    if benchmark.stats is not None:
        benchmark.extra_info["GB/s"] = 2 * source.nbytes / benchmark.stats.stats.median / 1e9
