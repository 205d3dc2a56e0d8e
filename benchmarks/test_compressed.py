"""A pruned linear layer without its zeros against ``F.linear`` on the dense-stored one, on few rows.

Between calls the layers are changed, among copies that together do not fit any cache: as in a model, weights come from memory.
Both run with one thread and with all; the better of the two is what counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ebft_kernels import CompressedLinear, PackedMask, explain

SPARSITIES = (0.5, 0.6, 0.7, 0.8)
IN_FLIGHT = 512 * 2**20  # bytes of weights that calls go through in turn


@pytest.fixture(params=["one thread", "all threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.param == "one thread" else before)
    yield torch.get_num_threads()
    torch.set_num_threads(before)


def make_weight(shape: tuple[int, int], sparsity: float, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5
    PackedMask.from_topk(weight.abs(), round((1 - sparsity) * shape[1])).zero_pruned_(weight)
    return weight.to(dtype)


def in_turn(make: Callable[[], Any], nbytes: int, full: bool) -> Iterator[Any]:
    return itertools.cycle([make() for _ in range(-(-IN_FLIGHT // nbytes) if full else 2)])


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096)], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense(
    benchmark: Any, full: bool, device: torch.device, threads: int, shape: tuple[int, int], batch: int, dtype: torch.dtype
) -> None:
    shape = shape if full else (48, 96)
    weight = make_weight(shape, 0.5, dtype).to(device)
    x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(1)).to(device, dtype)
    weights = in_turn(weight.clone, weight.nbytes, full)
    report(benchmark, shape, batch, threads, weight.nbytes)
    benchmark(lambda: F.linear(x, next(weights)))


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096)], ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("values", ["bf16", "fp32", "int8"])
def test_compressed(
    benchmark: Any,
    full: bool,
    device: torch.device,
    threads: int,
    shape: tuple[int, int],
    batch: int,
    sparsity: float,
    values: str,
) -> None:
    shape = shape if full else (48, 96)
    weight = make_weight(shape, sparsity, torch.float32 if values == "fp32" else torch.bfloat16).to(device)
    layer = CompressedLinear.from_weight(weight, weight != 0, values=values)
    x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(1)).to(device, weight.dtype)
    with torch.no_grad():
        truth = F.linear(x.double(), layer.dense().double())
        error, torchs = ((y.double() - truth).abs().max() for y in (layer(x), F.linear(x, layer.dense().to(x.dtype))))
        assert error <= 1.5 * torchs
    layers = in_turn(lambda: CompressedLinear.from_weight(weight, weight != 0, values=values), layer.nbytes(), full)
    report(benchmark, shape, batch, threads, layer.nbytes())
    benchmark.extra_info["bytes of dense bfloat16"] = layer.nbytes() / (2 * weight.numel())
    benchmark.extra_info["implementation"] = str(explain("compressed_linear", device, x.dtype))
    with torch.no_grad():
        benchmark(lambda: next(layers)(x))


def report(benchmark: Any, shape: tuple[int, int], batch: int, threads: int, nbytes: int) -> None:
    benchmark.group = f"linear {shape[0]}x{shape[1]}, {batch} rows of x"
    benchmark.extra_info["threads"] = threads
    benchmark.extra_info["weight bytes"] = nbytes
