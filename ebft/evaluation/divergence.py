"""How far a model is from another one, token by token: what a perplexity, with its one right answer, does not show."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ebft.data.streams import Store, Stream
from ebft.evaluation.perplexity import TOKENS_AT_ONCE, at_exit_together
from ebft.model.decoder import Decoder


@dataclass(frozen=True)
class Divergence:
    """Of one model from another, over the predicted tokens of a text.

    Attributes:
        perplexity, of_other: of the two models.
        kl: mean of KL(other || model), nats a token.
        same_choice: share of the tokens for which both have the same most likely one.
    """

    perplexity: float
    of_other: float
    kl: float
    same_choice: float


def divergences(
    model: Decoder,
    other: Decoder,
    windows: Mapping[str, Tensor],
    on_block: Callable[[int], None] | None = None,
) -> dict[str, Divergence]:
    """``model`` against ``other``, which has the same vocabulary, on each text; a block of each is in memory at a time.

    Args:
        windows: text name -> token ids (windows, seqlen); every token but a window's first is predicted.
        on_block: called with the number of blocks of both that are done, after each.
    """
    done, found = 0, dict[str, Divergence]()
    streams: dict[str, dict[str, Stream]] = {}
    for of, decoder in (("model", model), ("other", other)):
        store = Store(decoder.device)
        streams[of] = {
            name: Stream.entering(decoder, ids, max(1, TOKENS_AT_ONCE // ids.shape[1]), store, f"{of}-{number}")
            for number, (name, ids) in enumerate(windows.items())
        }
        for index in range(len(decoder)):
            block = decoder.working_block(index)
            for stream in streams[of].values():
                stream.through(partial(decoder.run_block, index, block), out=stream)
            done += 1
            if on_block:
                on_block(done)
    with model.at_exit(), other.at_exit():
        for name, ids in windows.items():
            found[name] = _compared(model, other, ids, streams["model"][name], streams["other"][name])
    return found


@torch.no_grad()
def _compared(model: Decoder, other: Decoder, ids: Tensor, of_model: Stream, of_other: Stream) -> Divergence:
    totals = torch.zeros(4, dtype=torch.float64, device=model.device)  # two losses, the divergence, the same choices
    for mine, following in at_exit_together((model, other), ids, (of_model, of_other)):
        ours, theirs = (logits.log_softmax(-1) for logits in mine)
        totals += torch.stack(
            [
                F.nll_loss(ours, following, reduction="sum").double(),
                F.nll_loss(theirs, following, reduction="sum").double(),
                F.kl_div(ours, theirs, reduction="sum", log_target=True).double(),
                (ours.argmax(-1) == theirs.argmax(-1)).sum().double(),
            ]
        )
    own, its, kl, same = (totals / ids[:, 1:].numel()).tolist()
    return Divergence(math.exp(min(own, 700)), math.exp(min(its, 700)), kl, same)
