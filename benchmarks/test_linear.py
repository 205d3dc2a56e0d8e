"""A masked linear layer, forward and backward: ours on zeroed and on dense weights, against what torch offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ebft_kernels import PackedMask, masked_linear

CONTENDERS = ("ebft, zeroed weight", "ebft, dense weight", "F.linear, zeroed weight", "F.linear, weight * mask")


def make_layer(contender: str, weight: Tensor, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """A function of x; ``weight`` is a leaf that requires gradients and holds zeros where pruned."""
    packed, factor = PackedMask.from_dense(mask), mask.to(weight.dtype)
    return {
        "ebft, zeroed weight": lambda x: masked_linear(x, weight, packed, zeroed=True),
        "ebft, dense weight": lambda x: masked_linear(x, weight, packed),
        "F.linear, zeroed weight": lambda x: F.linear(x, weight),
        "F.linear, weight * mask": lambda x: F.linear(x, weight * factor),
    }[contender]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("tokens", [1, 16, 512])
def test_forward_and_backward(benchmark: Any, full: bool, device: torch.device, tokens: int, contender: str) -> None:
    outputs, inputs = (4096, 4096) if full else (48, 64)
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(outputs, inputs, generator=generator) > 0.5).to(device)
    weight = (torch.randn(outputs, inputs, generator=generator).to(device) * mask).requires_grad_()
    x = torch.randn(tokens, inputs, generator=generator).to(device).requires_grad_()
    dy = torch.randn(tokens, outputs, generator=generator).to(device)
    layer = make_layer(contender, weight, mask)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x), (x, weight), dy)

    dx, dw = step()
    torch.testing.assert_close(dx, dy @ weight.detach(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dw * mask, dy.T @ x.detach() * mask, rtol=1e-3, atol=1e-3)
    benchmark.group = f"linear {tokens} x {inputs} -> {outputs}, forward and backward"
    benchmark(step)
