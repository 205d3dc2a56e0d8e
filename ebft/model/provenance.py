"""Where a model comes from: what its own card says that the card of a model made from it must say too."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load
from transformers.utils import cached_file

from ebft.errors import EBFTError
from ebft.files import ordinary
from ebft.model.locate import DEFAULT_CARD, locate

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
_WORD = re.compile(r"[\w.+:-]{1,60}", re.ASCII)
_LINK = re.compile(r"https://[\w./%+-]{1,200}|[\w.-]{1,60}", re.ASCII)
_ONE = {"license": _WORD, "license_name": _WORD, "license_link": _LINK}
_SEVERAL = {"language": _WORD, "tags": _WORD}
_MOST = 20  # of tags or languages
_LARGEST = 2**20  # bytes of a card


def provenance(source: str | None) -> dict[str, Any]:
    """``base_model``, ``license``, ``license_name``, ``license_link``, ``language``, ``tags``: those that are known.

    Args:
        source: hub id, folder or GGUF file; None: the default model.
    """
    if source is None:
        return dict(DEFAULT_CARD)
    found = _taken(_card(source))
    if is_hub_id(source):
        found["base_model"] = source
    return found


def is_hub_id(source: str) -> bool:
    """Whether a model's name is that of a repository on the hub, and no path."""
    return _HUB_ID.fullmatch(source) is not None and not Path(source).exists()


def _card(source: str) -> dict[str, Any]:
    """The metadata of the model's card; nothing where there is no card that can be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError, yaml.YAMLError, EBFTError):
        where = locate(source)["pretrained_model_name_or_path"]
        file = cached_file(where, "README.md", _raise_exceptions_for_missing_entries=False)
        if file and ordinary(Path(file), "README.md").stat().st_size <= _LARGEST:
            return metadata_load(file) or {}
    return {}


def _taken(card: dict[str, Any]) -> dict[str, Any]:
    """What of somebody else's metadata is in the form that it has to have."""
    texts = {name: value for name, value in card.items() if isinstance(value, str)}
    found: dict[str, Any] = {n: texts[n] for n, form in _ONE.items() if n in texts and form.fullmatch(texts[n])}
    for name, form in (*_SEVERAL.items(), ("base_model", _HUB_ID)):
        given = card.get(name)
        listed = [given] if isinstance(given, str) else given if isinstance(given, list) else []
        if taken := [item for item in listed[:_MOST] if isinstance(item, str) and form.fullmatch(item)]:
            found[name] = taken[0] if len(taken) == 1 and name == "base_model" else taken
    return found
