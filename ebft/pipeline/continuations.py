"""The text samples of a run: the same prompts continued by the dense, the pruned and the recovered model.

A model is held whole for them, in float32, one at a time; where it does not fit beside what is there already they are
left out, and the report says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ebft.config.fields import parse_bytes
from ebft.evaluation.continuations import CannotContinue, continuations
from ebft.model.decoder import Decoder
from ebft.model.tensors import Tensors
from ebft.output.figures import size
from ebft.pipeline.context import RunContext
from ebft.pipeline.memory import free_memory, memory_in_use
from ebft.pipeline.walk import apply_masks
from ebft_kernels import PackedMask

SHARE = 0.5  # of the memory that is free, for the model; keys, values and the system have the other half


def of_dense(context: RunContext) -> dict[str, Any]:
    """What the dense model writes, or why it writes nothing."""
    return _sampled(context, context.teacher)


def of_pruned(context: RunContext) -> dict[str, Any]:
    """The same of the model that is pruned and not recovered."""

    out, decoder = context.output, context.decoder

    def masks(index: int) -> dict[str, PackedMask]:
        prefix = f"{decoder.names[index]}."
        return {name.removeprefix(prefix): mask for name, mask in out.block_masks(index).items()}

    return _sampled(context, decoder, out.pruned_block, masks)


def of_saved(context: RunContext, saved: Decoder) -> dict[str, Any]:
    """The same of the files that the run has saved."""
    return _sampled(context, saved)


def _sampled(
    context: RunContext,
    decoder: Decoder,
    block_at: Callable[[int], Tensors | None] = lambda index: None,
    masks: Callable[[int], dict[str, PackedMask]] = lambda index: {},
) -> dict[str, Any]:
    def sample() -> dict[str, Any]:
        assert context.tokenizer is not None
        if reason := _no_room(context, decoder):
            return {"left_out": reason}
        try:
            model = decoder.whole(block_at)
            for index, name in enumerate(decoder.names):
                apply_masks(model.get_submodule(name), masks(index))
            return {"texts": continuations(model, context.tokenizer, context.prompts)}
        except (CannotContinue, torch.OutOfMemoryError) as error:
            return {"left_out": str(error) if isinstance(error, CannotContinue) else "the GPU's memory ran out"}

    return context.ranks.first(sample)


def _no_room(context: RunContext, decoder: Decoder) -> str:
    """Why the whole model is not to be held; nothing where it may."""
    runtime, gpu = context.config.runtime, decoder.device.type == "cuda"
    needed = 4 * sum(parameter.numel() for parameter in decoder.model.parameters())
    budget = runtime.gpu_memory if gpu else runtime.host_memory
    free = int(SHARE * free_memory(decoder.device))
    if budget:
        free = min(free, parse_bytes(budget, "the budget") - memory_in_use(decoder.device))
    if needed <= free:
        return ""
    return f"the whole model takes {size(needed)} in float32, and {size(max(0, free))} can be spared for it"
