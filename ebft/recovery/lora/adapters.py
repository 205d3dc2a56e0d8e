"""Low-rank adapters (Hu et al., arXiv 2106.09685; through peft) on every pruned linear matrix.

With W the pruned weight, M its mask, B A the adapter's product and s = alpha / rank, what is saved is the *masked
merge*  W + M * (s B A),  so that sparsity survives. What the forward pass sees while the adapters are tuned is

    with ``lora_masked``      W + M * (s B A)    so that nothing is lost in the merge
    without                   W + s B A          the usual LoRA; the merge then drops what lies on pruned places

The *plain merge*  W + s B A  fills the zeros. It is measured and reported, and never saved.

The masked forward makes W + M * (s B A) as a matrix and so needs its gradient too: a step costs about what full
fine-tuning costs, a third more than the usual LoRA's, while the optimizer's states are those of A and B alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ebft.config import EBFTConfig
from ebft.recovery.lora import LoRA
from ebft.recovery.whole_model import WholeResult, WholeTask, fit
from ebft_kernels import MaskedAdamW

_ADAPTER = "default"


def tune_adapters(task: WholeTask, config: EBFTConfig, own: LoRA.Settings) -> WholeResult:
    """Tune adapters of ``task.model``, without weight decay, and merge them into it."""
    masks = {}
    for name, mask in task.masks.items():
        path = name.rpartition(".")[0]
        if isinstance(task.model.get_submodule(path), nn.Linear | Conv1D):  # not fused experts
            masks[path] = mask.to(task.device)
    notes = [f"{bare} fused expert matrices have no adapters" for bare in [len(task.masks) - len(masks)] if bare]
    with _seeded(config.runtime.seed, task.device):
        layers = _add_adapters(task.model, list(masks), own)
        if own.lora_masked:
            for path, layer in layers.items():
                layer.forward = partial(_masked_forward, layer, masks[path].dense())
        for layer in layers.values():
            layer.lora_dropout.train()  # all else stays in evaluation mode
        adapters = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
        optimizer = MaskedAdamW(adapters, lr=own.lm_lr, betas=own.betas, weight_decay=0.0, moments=own.moments)
        result = fit(task, config, own, optimizer, dropout=own.lora_dropout > 0)
    left_out = {}
    for path, layer in layers.items():
        parent, _, last = path.rpartition(".")
        setattr(task.model.get_submodule(parent), last, layer.base_layer)
        with torch.no_grad():
            layer.base_layer.weight.add_(masks[path].zero_pruned_(layer.get_delta_weight(_ADAPTER)))
        left_out[f"{path}.weight"] = partial(_left_out, layer, masks[path])
    task.model.requires_grad_(False)
    return replace(result, blocks=list(task.blocks.values()), notes=notes, left_out=left_out)


def _add_adapters(model: nn.Module, paths: list[str], own: LoRA.Settings) -> dict[str, Any]:
    """Put adapters around these layers, in place; gives peft's layers, the only ones with gradients then."""
    peft = import_module("peft")
    settings = peft.LoraConfig(
        r=own.lora_rank,
        lora_alpha=own.lora_alpha,
        lora_dropout=own.lora_dropout,
        target_modules=paths,
        fan_in_fan_out=all(isinstance(model.get_submodule(path), Conv1D) for path in paths),
    )
    peft.inject_adapter_in_model(settings, model, _ADAPTER)
    return {path: model.get_submodule(path) for path in paths}


def _masked_forward(layer: Any, kept: Tensor, x: Tensor) -> Tensor:
    """The layer with the weight W + M * (s B A); ``kept`` is M, bool, in the weight's shape."""
    base = layer.base_layer
    weight = base.weight + torch.where(kept, layer.get_delta_weight(_ADAPTER), 0)
    return functional_call(base, {"weight": weight}, (x,))


@torch.no_grad()
def _left_out(layer: Any, mask: Any) -> Tensor:
    """(1 - M) * (s B A)."""
    delta = layer.get_delta_weight(_ADAPTER)
    return delta.masked_fill_(mask.dense(), 0)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's own random numbers, which peft and dropout take, from ``seed`` on while inside."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
