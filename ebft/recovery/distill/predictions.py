"""What the dense model predicts at every place of the calibration text: its likeliest tokens, and the rest as one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ebft.data.streams import Store, Stream
from ebft.distributed import Ranks
from ebft.model.decoder import Decoder

TOKENS_AT_ONCE = 2048  # in one forward pass
LOGITS_AT_ONCE = 2**24  # 64 MiB in float32, of which a loss makes two or three more


@dataclass(frozen=True)
class Predictions:
    """Of every token of a text but its first, in host memory.

    Attributes:
        tokens: the likeliest tokens, (samples, seqlen - 1, k), int32.
        logarithms: their log-probabilities, and in the last column that of all other tokens together,
            (samples, seqlen - 1, k + 1), float16; at least ``LEAST``.
    """

    tokens: Tensor
    logarithms: Tensor

    LEAST = -20.0  # 2e-9: what float16 holds, and a token that never comes

    @staticmethod
    def bytes_a_token(k: int) -> int:
        """Of memory."""
        return 4 * k + 2 * (k + 1)

    @classmethod
    @torch.no_grad()
    def of(cls, teacher: Decoder, ids: Tensor, k: int, store: Store, ranks: Ranks) -> Predictions:
        """One pass of the dense model, a block at a time, over ``ids`` (samples, seqlen), which the ranks share."""
        samples, seqlen = ids.shape
        k = min(k, teacher.model.get_output_embeddings().weight.shape[0] - 1)
        tokens = torch.zeros(samples, seqlen - 1, k, dtype=torch.int32)
        logarithms = torch.zeros(samples, seqlen - 1, k + 1)
        share = ranks.share(samples)
        mine = ids[share]
        if len(mine):
            stream = Stream.entering(teacher, mine, max(1, TOKENS_AT_ONCE // seqlen), store, "predictions")
            for index in range(len(teacher)):
                stream.through(partial(teacher.run_block, index, teacher.working_block(index)), out=stream)
            batches = (part.split(stream.batch_size) for part in (mine, tokens[share], logarithms[share]))
            with teacher.at_exit():
                for hidden, of, likeliest, likely in zip(stream.batches(), *batches, strict=True):
                    for places in chunks_of_places(teacher, *of.shape):
                        logits = teacher.exit(of[:, places], hidden[:, places]).float()
                        found = likeliest_of(logits, k)
                        likeliest[:, places], likely[:, places] = (part.cpu() for part in found)
            store.drop(stream.name)
        ranks.add_([tokens, logarithms])
        return cls(tokens, logarithms.half())


def likeliest_of(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` likeliest tokens (..., k), and log-probabilities (..., k + 1) as in ``Predictions``."""
    logarithms = logits.log_softmax(-1)
    top = logarithms.topk(k)
    rest = logarithms.scatter_(-1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
    return top.indices.int(), torch.cat([top.values, rest], -1).clamp(min=Predictions.LEAST)


def chunks_of_places(decoder: Decoder, batch: int, seqlen: int) -> list[slice]:
    """The places that predict a token, in parts whose logits are at hand together: norm and head look at one place."""
    vocabulary = decoder.model.get_output_embeddings().weight.shape[0]
    width = max(1, LOGITS_AT_ONCE // (vocabulary * batch))
    return [slice(start, min(start + width, seqlen - 1)) for start in range(0, seqlen - 1, width)]
