"""The text that the examples train on, as rows of equal length."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, tensor
from transformers import PreTrainedTokenizerBase


def windows(tokenizer: PreTrainedTokenizerBase, file: str, length: int = 64) -> list[dict[str, Tensor]]:
    """The text in ``file``, tokenised once and cut into rows of ``length`` tokens: ``input_ids`` and ``labels``."""
    ids = tensor(tokenizer(Path(file).read_text(encoding="utf-8"), verbose=False)["input_ids"])
    return [{"input_ids": row, "labels": row} for row in ids[: len(ids) // length * length].view(-1, length)]
