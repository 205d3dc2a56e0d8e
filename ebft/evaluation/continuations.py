"""Text samples: how a model goes on from a few prompts, greedily, so that people can see what a perplexity means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ebft.config.fields import is_file
from ebft.errors import EBFTError, first_line, on_one_line
from ebft.files import ordinary
from ebft.model.libraries import quiet

BUILTIN = ("The capital of France is", "Once upon a time, there was", "To bake bread, you need")
TOKENS = 40  # that each prompt is continued by, at most
MOST = 20  # prompts
LONGEST = 256  # tokens of a prompt, of which the last are taken


class CannotContinue(Exception):
    """A model cannot go on from prompts: why, for the report; no reason to end a run."""


def read_prompts(name: str) -> list[str]:
    """The prompts that ``--prompts`` means.

    Raises:
        EBFTError: ``name`` is neither ``builtin`` nor ``none`` nor a text file with a prompt a line.
    """
    if name in ("builtin", "none"):
        return list(BUILTIN) if name == "builtin" else []
    if not is_file(name):
        raise EBFTError(f"--prompts is {name!r}; expected builtin, none, or a text file with a prompt on each line")
    try:
        text = ordinary(Path(name).expanduser(), "--prompts").read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise EBFTError(f"--prompts {name} cannot be read: {on_one_line(error)}") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not 1 <= len(prompts) <= MOST:
        raise EBFTError(f"--prompts {name} holds {len(prompts)} prompts; expected 1 to {MOST}, one on each line")
    return prompts


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    tokens: int = TOKENS,
) -> list[str]:
    """What ``model`` writes after each of ``prompts``: its likeliest token each time, until it ends the text.

    All prompts go through the model together, padded on the left, with a cache of keys and values.

    Args:
        model: whole, in evaluation mode, on the device that it is to run on; its generation settings are replaced.
        tokens: for each prompt, at most; fewer where the model has too few positions.

    Raises:
        CannotContinue: the model cannot generate text.
    """
    if not model.can_generate():
        raise CannotContinue(f"{type(model).__name__} cannot generate text")
    ends = _ends(model, tokenizer)
    rows = [_encoded(tokenizer, prompt, ends) for prompt in prompts]
    width = max(map(len, rows))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or width + tokens
    tokens = min(tokens, positions - width)
    if tokens < 1:
        raise CannotContinue(f"a prompt has {width} tokens and the model {positions} positions")
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device)
    seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    model.generation_config = GenerationConfig()  # whatever generate() would take from it: sampling, a penalty …
    asked = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=ends or None, pad_token_id=0)
    try:
        with quiet():
            written = model.generate(ids, attention_mask=seen, generation_config=asked)[:, width:].tolist()
    except (RuntimeError, ValueError, LookupError, TypeError) as error:  # of the model's own forward
        raise CannotContinue(f"{type(model).__name__} cannot continue them: {first_line(error)}") from error
    return [_decoded(tokenizer, row, new, ends) for row, new in zip(rows, written, strict=True)]


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text."""
    own = getattr(model.generation_config, "eos_token_id", None) or tokenizer.eos_token_id
    return [] if own is None else list(own) if isinstance(own, list | tuple) else [int(own)]


def _encoded(tokenizer: PreTrainedTokenizerBase, prompt: str, ends: Sequence[int]) -> list[int]:
    row: list[int] = list(tokenizer(prompt, verbose=False)["input_ids"])[-LONGEST:]
    while len(row) > 1 and row[-1] in ends:  # which some tokenizers put after every text
        row.pop()
    return row or [0]


def _decoded(tokenizer: PreTrainedTokenizerBase, row: list[int], new: list[int], ends: Sequence[int]) -> str:
    """The text of ``new``, which is decoded with what is before it: some tokenizers drop a space that comes first."""
    count = next((place for place, token in enumerate(new) if token in ends), len(new))

    def text(tokens: list[int]) -> Any:
        return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return text(row + new[:count])[len(text(row)) :]
