"""Products that skip zeros, on a CPU, against torch's dense ones: forward, dx and dW, and the three as ``MaskedLinear``
needs them, its weight and gradient dense. Each is validated against float64 first, and timed in turns with its rival.

    pytest benchmarks/test_sparse.py --size full --benchmark-enable --benchmark-only
    python -m benchmarks.sparse_table     the same in pairs, and the table that ``MaskedLinear`` goes by
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.sparse_table import Layer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="sparse products are for CPUs")


@pytest.mark.parametrize("contender", ["sparse", "dense"])
@pytest.mark.parametrize("product", ["forward", "dx", "dw", "step"])
@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("shape", [(576, 576), (1536, 576), (576, 1536)], ids=lambda shape: "x".join(map(str, shape)))
def test_sparse(
    benchmark: Any, full: bool, shape: tuple[int, int], sparsity: float, product: str, contender: str
) -> None:
    layer = Layer(*(shape if full else (40, 136)), sparsity, tokens=512 if full else 70)
    layer.validate()
    benchmark.group = f"{shape[1]} -> {shape[0]}, {sparsity:.0%} pruned, {product}"
    benchmark(getattr(layer, contender)[product])
