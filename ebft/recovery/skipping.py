"""Blocks whose products skip the zeros of pruned weights: on a CPU, where that was measured to be faster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ebft_kernels import PackedMask, explain, mask_linears_, unmask_linears_


@contextmanager
def zeros_skipped(
    block: nn.Module, masks: Mapping[str, PackedMask], tokens: int, device: torch.device, compute: torch.dtype
) -> Iterator[None]:
    """The matrices of ``block`` that are multiplied faster without their zeros are so while inside.

    Not to be used where masks change, which needs gradients of pruned weights, or where layers are compiled, which
    multiplies masks in.

    Args:
        masks: of its parameters by their names in it.
        tokens: that go through it at once.
        device, compute: where products are made, and their dtype.
    """

    def pays(mask: PackedMask) -> bool:
        shape = (mask.shape[0], mask.shape[-1])
        return explain("masked_linear", shape=shape, density=mask.density(), tokens=tokens).fused

    may = device.type == "cpu" and compute == torch.float32
    sparse = {name: mask for name, mask in masks.items() if may and len(mask.shape) == 2 and pays(mask)}
    with masked_layers(block, sparse):
        yield


@contextmanager
def masked_layers(block: nn.Module, masks: Mapping[str, PackedMask]) -> Iterator[None]:
    """The linear layers of ``block`` as masked ones while inside: theirs are the updates in the backward pass, and the
    products that skip zeros.
    """
    linears = {name: block.get_submodule(name.rpartition(".")[0]) for name in masks}
    linears = {name: layer for name, layer in linears.items() if layer is not block and type(layer) is nn.Linear}
    mask_linears_(block, {name: masks[name] for name in linears})
    try:
        yield
    finally:
        for layer in linears.values():
            unmask_linears_(layer)
