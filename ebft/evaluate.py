"""Perplexity, block by block: only one block, then the head, is ever on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebft.decoder import Decoder
from ebft.stream import Stream

TOKENS_AT_ONCE = 2048  # in one forward pass; logits of a 128k vocabulary are 1 GiB at this size


def perplexities(
    decoder: Decoder,
    windows: Mapping[str, Tensor],
    block_at: Callable[[int], nn.Module] | None = None,
    on_block: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """exp of the mean negative log-likelihood over predicted tokens, for each text.

    Args:
        decoder: the model; its entrance and exit are used.
        windows: text name -> token ids (windows, seqlen); every token but a window's first is predicted.
        block_at: gives the working block of an index (default: the decoder's own).
        on_block: called with the number of blocks done, after each.
    """
    block_at = block_at or decoder.working_block
    streams = {
        name: Stream.entering(decoder, ids, max(1, TOKENS_AT_ONCE // ids.shape[1])) for name, ids in windows.items()
    }
    for index in range(len(decoder)) if streams else ():
        block = block_at(index)
        for stream in streams.values():
            stream.through(partial(decoder.run_block, index, block), out=stream)
        if on_block:
            on_block(index + 1)
    with decoder.ends_on_device():
        return {name: _perplexity(decoder, ids, streams[name]) for name, ids in windows.items()}


@torch.no_grad()
def _perplexity(decoder: Decoder, ids: Tensor, stream: Stream) -> float:
    total = torch.zeros((), dtype=torch.float64, device=decoder.device)
    for tokens, hidden in zip(ids.split(stream.batch_size), stream.states.split(stream.batch_size), strict=True):
        logits = decoder.exit(tokens, hidden)[:, :-1].flatten(0, 1).float()
        total += F.cross_entropy(logits, tokens[:, 1:].flatten().to(logits.device), reduction="sum")
    mean = total.item() / ids[:, 1:].numel()
    return math.exp(mean) if not mean > 700 else math.inf  # NaN stays NaN
