"""``ebft sample``: what models write after the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from ebft.errors import EBFTError
from ebft.evaluation.continuations import CannotContinue, continuations
from ebft.model.checkpoint import load_model, load_tokenizer
from ebft.model.device import choose_device
from ebft.model.locate import shown


def sample_models(
    models: Sequence[str | None], prompts: Sequence[str], *, tokens: int, device: str, trust_remote_code: bool = False
) -> list[list[str]]:
    """What each of ``models`` writes after ``prompts``; one is in memory at a time.

    Args:
        models: hub ids, folders or GGUF files; None: the default model.
        tokens: after each prompt, at most.

    Raises:
        EBFTError: a model cannot be had, or cannot generate.
    """
    place, _ = choose_device(device, "float32")
    found = []
    for source in models:
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        model = load_model(source, trust_remote_code=trust_remote_code).float().to(place)
        try:
            found.append(continuations(model, tokenizer, prompts, tokens))
        except CannotContinue as error:
            raise EBFTError(f"model {shown(source)}: {error}") from None
        del model
    return found
