"""Packing, unpacking and choosing masks, against what one would write in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ebft_kernels import PackedMask


def torch_pack(mask: Tensor) -> Tensor:
    bits = mask.reshape(*mask.shape[:-1], -1, 32).to(torch.int64) << torch.arange(32, device=mask.device)
    return bits.sum(-1).to(torch.int32)


def torch_unpack(words: Tensor) -> Tensor:
    return (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=words.device) & 1).flatten(-2).bool()


def torch_nm(scores: Tensor) -> Tensor:
    best = scores.reshape(-1, 4).topk(2, dim=-1).indices
    return torch.zeros(scores.numel() // 4, 4, dtype=torch.bool, device=scores.device).scatter_(1, best, True)


def torch_topk(scores: Tensor) -> Tensor:
    best = scores.topk(scores.shape[1] // 2, dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)


def torch_is_nm(mask: Tensor) -> Tensor:
    return (mask.reshape(-1, 4).sum(-1) <= 2).all()


@pytest.mark.parametrize("who", ["ebft", "torch"])
@pytest.mark.parametrize("what", ["pack", "unpack", "2:4", "top half of a row", "2:4 check"])
def test_masks(benchmark: Any, full: bool, device: torch.device, what: str, who: str) -> None:
    shape = (4096, 11008) if full else (16, 96)
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch_nm(scores).reshape(shape)
    packed = PackedMask.from_dense(mask)
    cases: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "pack": (lambda: PackedMask.from_dense(mask).words, lambda: torch_pack(mask)),
        "unpack": (packed.dense, lambda: torch_unpack(packed.words)),
        "2:4": (lambda: PackedMask.from_scores(scores, 2, 4).dense(), lambda: torch_nm(scores).reshape(shape)),
        "top half of a row": (
            lambda: PackedMask.from_topk(scores, shape[1] // 2).dense(),
            lambda: torch_topk(scores),
        ),
        "2:4 check": (lambda: packed.is_nm(2, 4), lambda: torch_is_nm(packed.dense()).item()),
    }
    ours, theirs = cases[what]
    assert torch.equal(torch.as_tensor(ours()), torch.as_tensor(theirs()))
    benchmark.group = f"masks, {what} {shape[0]}x{shape[1]}"
    benchmark(ours if who == "ebft" else theirs)
