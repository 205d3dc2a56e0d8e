"""How long a sequence may be."""

from __future__ import annotations

from transformers import PretrainedConfig

from ebft.config import EBFTConfig
from ebft.errors import EBFTError


def check_lengths(config: EBFTConfig, model: PretrainedConfig) -> None:
    """``EBFTError`` if a sequence is longer than the model allows."""
    longest = getattr(model.get_text_config(), "max_position_embeddings", None)
    lengths = {
        "--seqlen": config.data.seqlen if config.uses_text else 0,
        "--eval-seqlen": config.evaluate.seqlen if config.evaluate.texts else 0,
    }
    for flag, length in lengths.items():
        if longest and length > longest:
            raise EBFTError(
                f"{flag} is {length}; expected at most {longest}, the model's longest sequence ({flag} {longest})"
            )
