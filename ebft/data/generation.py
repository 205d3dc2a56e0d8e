"""Text that the dense model writes itself, to calibrate on: it needs no data, and is what the model was made for.

Sequences are sampled from the model's whole distribution at temperature 1 (no top-k, no top-p). Each starts as the
tokenizer starts a text, with its beginning-of-text token; where it has none, with a random token of the vocabulary.
The end of a text does not end a sequence: the next text follows, after a beginning-of-text token where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ebft.data.calibration import Tokens, use_of
from ebft.data.texts import SELF
from ebft.errors import EBFTError
from ebft.model.libraries import quiet

WRITTEN_AT_ONCE = 8192  # tokens of the sequences that are written together


@dataclass(frozen=True)
class Generated:
    """Text that a model has written.

    Attributes:
        made_from: a digest of all that it depends on, which an interrupted run knows it by.
    """

    tokens: Tokens
    made_from: str

    @classmethod
    def of(cls, ids: Tensor, made_from: str, tokenizer: PreTrainedTokenizerBase) -> Generated:
        """``ids``, int64 (samples, seqlen), with what is to be said of them."""
        return cls(Tokens(ids, use_of(SELF, "generated", len(ids), ids, tokenizer.decode(ids[0]))), made_from)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    device: torch.device,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Sequences that ``model`` writes: token ids, int64 (samples, seqlen), on the host.

    A token is where the distribution's inverse takes a number in [0, 1), and these numbers depend on ``seed``, the
    sequence and the place alone: not, but for rounding, on which sequences are written together.

    Args:
        model: in evaluation mode, whole; it is on ``device`` meanwhile, and on the host after.
        on_batch: called with the number of sequences written, after every few.

    Raises:
        EBFTError: the model cannot generate, or its logits are not finite.
    """
    if not model.can_generate():
        raise EBFTError(f"--calibration {SELF}: {type(model).__name__} cannot generate text; expected another text")
    numbers = torch.rand(samples, seqlen, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is None or tokenizer("a")["input_ids"][0] != begin:
        begin = None
    start = _first_tokens(tokenizer, numbers[:, 0]) if begin is None else torch.full((samples,), begin)
    after = None if begin is None or end is None or begin == end else (end, begin)
    its_own = model.generation_config
    ids = torch.empty(samples, seqlen, dtype=torch.long)
    try:
        model.generation_config = GenerationConfig()  # whatever generate() would take from it: an end, a penalty …
        model.to(device)
        at_once = max(1, WRITTEN_AT_ONCE // seqlen)
        for rows in torch.arange(samples).split(at_once):
            draw = _Draw(numbers[rows].to(device), after)
            first = start[rows, None].to(device)
            with quiet():
                ids[rows] = model.generate(
                    first,
                    attention_mask=torch.ones_like(first),
                    generation_config=GenerationConfig(max_new_tokens=seqlen - 1, do_sample=False, pad_token_id=0),
                    logits_processor=LogitsProcessorList([draw]),
                ).cpu()
            if draw.lost:
                raise EBFTError(f"--calibration {SELF}: the dense model's logits hold NaN or infinity")
            on_batch(int(rows[-1]) + 1)
    finally:
        model.generation_config = its_own
        model.to("cpu")
    return ids


def _first_tokens(tokenizer: PreTrainedTokenizerBase, numbers: Tensor) -> Tensor:
    """Any token of the vocabulary but special ones, all equally likely."""
    usual = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
    return usual[(numbers * len(usual)).long()]


class _Draw(LogitsProcessor):
    """Makes greedy decoding sample: leaves of all tokens the one that the number for this place chooses.

    Args:
        numbers: in [0, 1), float64 (batch, seqlen), on the logits' device.
        after: a token, and the one that always follows it.
    """

    def __init__(self, numbers: Tensor, after: tuple[int, int] | None) -> None:
        self._numbers, self._after = numbers, after
        self._lost = torch.zeros((), dtype=torch.bool, device=numbers.device)

    @property
    def lost(self) -> bool:
        """Whether there were logits that make no distribution."""
        return bool(self._lost)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
        numbers = self._numbers[:, input_ids.shape[1], None] * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, numbers, right=True)  # the first that goes beyond: never of chance 0
        self._lost |= cumulative[:, -1].isnan().any()
        chosen.clamp_(max=scores.shape[-1] - 1)
        if self._after is not None:
            end, begin = self._after
            chosen = torch.where(input_ids[:, -1:] == end, begin, chosen)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)
