"""Whether a walk from block to block comes to what the model's own forward comes to.

``Decoder`` knows nothing of families: it sees how a model calls its blocks, and takes it that hidden states are all
that a block needs of the one before. A model for which that is not so would be pruned by what it never computes.
So it is tried: on a few tokens, the model's own forward runs, with the weights of one block in memory at a time; at
each block its hidden states are held against those that were handed from block to block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ebft.errors import EBFTError
from ebft.model.blocks import BlockCall, first_output
from ebft.model.decoder import Decoder

TOKENS = (2, 16)  # sequences, and tokens of each
ROUNDING = 1e-4  # of the standard deviation: both sides run the same code in float32, in places on other batch shapes


@torch.no_grad()
def check_agreement(decoder: Decoder, called: str) -> None:
    """Run the model on a few random tokens in both ways.

    Args:
        decoder: the model, its weights in memory or on disk; the blocks are read one after another.
        called: how an error calls the model.

    Raises:
        EBFTError: hidden states or logits differ by more than rounding; it names the first block that does.
    """
    kind, names = type(decoder.model).__name__, decoder.names
    vocabulary = decoder.model.get_input_embeddings().weight.shape[0]
    batch, seqlen = TOKENS
    seqlen = min(seqlen, getattr(decoder.model.config.get_text_config(), "max_position_embeddings", None) or seqlen)
    ids = torch.randint(vocabulary, (batch, seqlen), generator=torch.Generator().manual_seed(2))
    walked, calls = decoder.enter(ids), [decoder.call_for(index, batch, seqlen) for index in range(len(decoder))]

    def run(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal walked
        given, block = BlockCall.split(args, kwargs)[0], decoder.block_on_host(index)
        if not _agree(walked, given):
            before = names[index - 1] if index else "its embeddings"
            raise EBFTError(
                f"{called}: {kind} does more to hidden states between {before} and {names[index]} than to hand them "
                "on; expected blocks that follow one another"
            )
        walked = calls[index].map_tensors(lambda tensor: tensor.cpu())(block, walked, torch.float32)
        out = block(*args, **kwargs)
        if not _agree(walked, first_output(out)):
            raise EBFTError(
                f"{called}: run by itself, {names[index]} gives other hidden states than in {kind}'s own forward; "
                "expected blocks that need only hidden states and positions"
            )
        return out

    logits = decoder.forward(ids, run)
    if not _agree(decoder.exit(ids, walked, torch.float32).cpu(), logits):
        raise EBFTError(
            f"{called}: after {names[-1]}, final norm and head give other logits than {kind}'s own forward; expected "
            "them to need only the last block's hidden states"
        )


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors are equal but for rounding; NaN, which other checks name, agrees with NaN."""
    ours, theirs = ours.float(), theirs.float()
    if ours.shape != theirs.shape:
        return False
    rounding = float(ROUNDING * theirs[theirs.isfinite()].std(correction=0).nan_to_num(0.0))
    return torch.allclose(ours, theirs, rtol=ROUNDING, atol=rounding, equal_nan=True)
