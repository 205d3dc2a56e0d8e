"""Models made without their weights: on the meta device, with what no checkpoint holds made real."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel


def materialise_buffers(model: PreTrainedModel, modules: set[nn.Module] | None = None) -> None:
    """Make buffers that were built on the meta device (rotary tables, embedding scales) real, on the CPU, with their values.

    Args:
        model: its own ``_init_weights`` computes the values, as ``from_pretrained`` lets it.
        modules: which of its modules; by default all.
    """
    for module in model.modules() if modules is None else modules:
        meta = {name: buffer for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta}
        for name, buffer in meta.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if meta:
            model._init_weights(module)
