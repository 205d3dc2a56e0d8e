"""A pruned linear layer without its zeros against ``F.linear`` on the dense-stored one, on few rows.

Between calls the layers are changed, among copies that together do not fit any cache: as in a model, weights come from
memory. Both run with one thread and with all; the better of the two is what counts.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ebft_kernels import CompressedLinear, PackedMask, explain

SPARSITIES = (0.5, 0.6, 0.7, 0.8)
IN_FLIGHT = 512 * 2**20  # bytes of weights that calls go through in turn


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.param == "one thread" else before)
    yield torch.get_num_threads()
    torch.set_num_threads(before)


def make_weight(shape: tuple[int, int], sparsity: float, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5
    PackedMask.from_topk(weight.abs(), round((1 - sparsity) * shape[1])).zero_pruned_(weight)
    return weight.to(dtype)


def make_x(batch: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def copies(of: Any, nbytes: int, full: bool) -> list[Any]:
    return [copy.deepcopy(of) for _ in range(-(-IN_FLIGHT // nbytes) if full else 2)]


@functools.lru_cache(maxsize=1)
def dense_weights(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, full: bool) -> list[Tensor]:
    weight = make_weight(shape, 0.5, dtype).to(device)
    return copies(weight, weight.nbytes, full)


@functools.lru_cache(maxsize=1)
def compressed_layers(
    shape: tuple[int, int], sparsity: float, values: str, device: torch.device, full: bool
) -> list[CompressedLinear]:
    """Validated: no further from float64 than torch's own product."""
    weight = make_weight(shape, sparsity, torch.float32 if values == "fp32" else torch.bfloat16).to(device)
    layer = CompressedLinear.from_weight(weight, weight != 0, values=values)
    x = make_x(4, shape[1], device, weight.dtype)
    with torch.no_grad():
        truth = F.linear(x.double(), layer.dense().double())
        error, torchs = ((y.double() - truth).abs().max() for y in (layer(x), F.linear(x, layer.dense().to(x.dtype))))
    assert error <= 1.5 * torchs
    return copies(layer, layer.nbytes(), full)


# The one that stands first changes fastest, so that layers are made once.
both_threads = pytest.mark.parametrize("threads", ["one thread", "all threads"], indirect=True)
batches = pytest.mark.parametrize("batch", [1, 4, 16])
shapes = pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096)], ids=lambda shape: "x".join(map(str, shape)))


@both_threads
@batches
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@shapes
def test_dense(
    benchmark: Any,
    full: bool,
    device: torch.device,
    threads: int,
    batch: int,
    dtype: torch.dtype,
    shape: tuple[int, int],
) -> None:
    shape = shape if full else (48, 96)
    weights = dense_weights(shape, dtype, device, full)
    x = make_x(batch, shape[1], device, dtype)
    report(benchmark, shape, batch, threads, weights[0].nbytes)
    turns = itertools.cycle(weights)
    benchmark(lambda: F.linear(x, next(turns)))


@both_threads
@batches
@pytest.mark.parametrize("values", ["bf16", "fp32", "int8"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
@shapes
def test_compressed(
    benchmark: Any,
    full: bool,
    device: torch.device,
    threads: int,
    batch: int,
    values: str,
    sparsity: float,
    shape: tuple[int, int],
) -> None:
    shape = shape if full else (48, 96)
    layers = compressed_layers(shape, sparsity, values, device, full)
    x = make_x(batch, shape[1], device, torch.float32 if values == "fp32" else torch.bfloat16)
    report(benchmark, shape, batch, threads, layers[0].nbytes())
    benchmark.extra_info["bytes of dense bfloat16"] = layers[0].nbytes() / (2 * shape[0] * shape[1])
    benchmark.extra_info["implementation"] = str(explain("compressed_linear", device, x.dtype))
    turns = itertools.cycle(layers)
    with torch.no_grad():
        benchmark(lambda: next(turns)(x))


def report(benchmark: Any, shape: tuple[int, int], batch: int, threads: int, nbytes: int) -> None:
    benchmark.group = f"linear {shape[0]}x{shape[1]}, {batch} rows of x"
    benchmark.extra_info["threads"] = threads
    benchmark.extra_info["weight bytes"] = nbytes
