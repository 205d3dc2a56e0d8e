"""Sizes that no model has: a configuration that asks for them is refused by arithmetic, before anything is built.

The limits lie far above every model that there is (126 layers, and 2e12 parameters in a few announced ones), so that
they can only meet a damaged or hostile file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from ebft.errors import EBFTError

LAYERS = 4096
SIZE = 2**26  # of one dimension
PARAMETERS = 10**14
_LAYERS = re.compile(r"(num|n)_(\w+_)?layers?")
_SIZES = re.compile(r"(\w+_)?(size|dim|heads|experts|embd|inner|rank|positions|d_model|ffn|d_ff)")


def check_settings(settings: Mapping[str, Any], source: str) -> None:
    """``EBFTError`` if what config.json holds asks for more than any model has; ``source``: how the error calls it."""
    layers, widths = 1, [1, 1]
    for name, value in _numbers(settings):
        of_layers = _LAYERS.fullmatch(name)
        limit = LAYERS if of_layers else SIZE if _SIZES.fullmatch(name) else None
        if limit is not None and value > limit:
            raise EBFTError(f"model {source}: its configuration has {name} {_short(value)}; expected at most {limit}")
        if of_layers:
            layers = max(layers, int(value))
        elif name in ("hidden_size", "d_model", "n_embd", "intermediate_size", "ffn_dim", "n_inner"):
            widths.append(int(value))
    *_, narrower, wider = sorted(widths)
    parameters = layers * narrower * wider
    if parameters > PARAMETERS:
        raise EBFTError(
            f"model {source}: its configuration asks for {parameters:.0e} parameters or more; expected at most "
            f"{PARAMETERS:.0e}"
        )


def check_against_files(config: PretrainedConfig, stored: Mapping[str, Tensor], source: str) -> None:
    """``EBFTError`` if a configuration has more layers than there are tensors in the files, or is wider than any."""
    text, largest = config.get_text_config(), max((tensor.numel() for tensor in stored.values()), default=0)
    for name, there, what in (
        ("num_hidden_layers", len(stored), f"{len(stored)} tensors"),
        ("hidden_size", largest, f"tensors of at most {largest} numbers"),
        ("vocab_size", largest, f"tensors of at most {largest} numbers"),
    ):
        asked = getattr(text, name, None)
        if isinstance(asked, int) and asked > there:
            raise EBFTError(f"model {source}: its configuration has {name} {asked}, and its files hold {what}")


def _numbers(settings: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):  # the text model's, beside those of images and sounds
            yield from _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield str(name), value


def _short(value: int | float) -> str:
    return f"{value}" if value < 10**15 else f"{float(min(value, 10**300)):.0e}"
