"""Perplexity, block by block: only one block, then the head, is ever on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebft.data.streams import Store, Stream
from ebft.distributed import Ranks
from ebft.model.decoder import Decoder

TOKENS_AT_ONCE = 2048  # in one forward pass
LOGITS_AT_ONCE = 2**25  # 128 MiB in float32, of which the loss makes a copy or two


def perplexities(
    decoder: Decoder,
    windows: Mapping[str, Tensor],
    block_at: Callable[[int], nn.Module] | None = None,
    on_block: Callable[[int], None] | None = None,
    store: Store | None = None,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """exp of the mean negative log-likelihood over predicted tokens, for each text.

    Args:
        decoder: the model; its entrance and exit are used.
        windows: text name -> token ids (windows, seqlen); every token but a window's first is predicted.
        block_at: gives the working block of an index (default: the decoder's own).
        on_block: called with the number of blocks done, after each.
        store: where hidden states are kept, in float32 (default: host memory).
        ranks: those that share the windows.
    """
    block_at = block_at or decoder.working_block
    store, ranks = store or Store(decoder.device), ranks or Ranks()
    mine = {name: ids[ranks.share(len(ids))] for name, ids in windows.items()}
    streams = {
        name: Stream.entering(decoder, ids, max(1, TOKENS_AT_ONCE // ids.shape[1]), store, f"evaluation-{number}")
        for number, (name, ids) in enumerate(mine.items())
        if len(ids)
    }
    for index in range(len(decoder)) if streams else ():
        block = block_at(index)
        for stream in streams.values():
            stream.through(partial(decoder.run_block, index, block), out=stream)
        if on_block:
            on_block(index + 1)
    with decoder.at_exit():
        surprise = {name: _surprise(decoder, mine[name], stream) for name, stream in streams.items()}
    for stream in streams.values():
        store.drop(stream.name)
    sums = [surprise.get(name, torch.zeros((), dtype=torch.float64)) for name in windows]
    ranks.add_(sums)
    means = (total.item() / ids[:, 1:].numel() for total, ids in zip(sums, windows.values(), strict=True))
    return {
        name: math.exp(mean) if not mean > 700 else math.inf  # NaN stays NaN
        for name, mean in zip(windows, means, strict=True)
    }


@torch.no_grad()
def _surprise(decoder: Decoder, ids: Tensor, stream: Stream) -> Tensor:
    """The sum of negative log-likelihoods, on the host."""
    total = torch.zeros((), dtype=torch.float64, device=decoder.device)
    for (logits,), following in at_exit_together((decoder,), ids, (stream,)):
        total += F.cross_entropy(logits, following, reduction="sum")
    return total.cpu()


def at_exit_together(
    decoders: Sequence[Decoder], ids: Tensor, streams: Sequence[Stream]
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Logits (tokens, vocabulary), float32, of each model, and the tokens that follow; a part of them at a time.

    Args:
        decoders: inside ``at_exit``, with one vocabulary.
        streams: of the hidden states after their last blocks.
    """
    vocabulary = decoders[0].model.get_output_embeddings().weight.shape[0]
    width = max(1, LOGITS_AT_ONCE // (vocabulary * streams[0].batch_size))
    batches = zip(ids.split(streams[0].batch_size), *(stream.batches() for stream in streams), strict=True)
    for tokens, *hidden in batches:
        for start in range(0, ids.shape[1] - 1, width):  # norm and head look at one place at a time
            places = slice(start, min(start + width, ids.shape[1] - 1))
            logits = [
                decoder.exit(tokens[:, places], states[:, places]).flatten(0, 1).float()
                for decoder, states in zip(decoders, hidden, strict=True)
            ]
            yield logits, tokens[:, 1:][:, places].flatten().to(logits[0].device)
