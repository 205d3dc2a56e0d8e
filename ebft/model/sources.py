"""Which files of a model hold weights, and what must not lie beside them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
)
from transformers.utils.hub import get_checkpoint_shard_files

from ebft.errors import EBFTError
from ebft.files import check_model_folder, indexed_files
from ebft.model.libraries import by_libraries
from ebft.model.locate import shown
from ebft.model.tensors import Tensors

_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def checked(where: dict[str, str]) -> dict[str, str]:
    """``where``, if it is a hub id, a GGUF file, or a folder in which everything may be opened."""
    folder = Path(where["pretrained_model_name_or_path"])
    if folder.is_dir() and "gguf_file" not in where:
        check_model_folder(folder)
    return where


def files_of(name: str, whole: str, index: str) -> list[Path]:
    """A checkpoint's file of that name, or the files that its index lists; none where it has neither."""
    if found := find(name, whole):
        return [Path(found)]
    listed = find(name, index)
    if listed is None:
        return []
    indexed_files(Path(listed))
    return [Path(file) for file in get_checkpoint_shard_files(name, listed)[0]]


def find(name: str, file: str) -> str | None:
    """A file of a checkpoint, in its folder or in the hub's cache; None where it has none of that name."""
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False)


def pickled(name: str) -> dict[str, Tensor]:
    """What a checkpoint's ``.bin`` files hold where it has no others, without values and without running what they say.

    Raises:
        EBFTError: one holds anything but tensors by name.
    """
    with by_libraries(name):
        safe = files_of(name, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
        files = [] if safe else files_of(name, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
        if safe:
            Tensors(safe)  # refuses a tensor that is there twice
    tensors: dict[str, Tensor] = {}
    for file in files:
        with by_libraries(name, pickle=file.name), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols
            held = torch.load(file, map_location="meta", weights_only=True)
        others = [v for v in held.values() if not isinstance(v, Tensor)] if isinstance(held, Mapping) else [held]
        if others:
            raise EBFTError(
                f"model {name} cannot be loaded: {file.name} holds {type(others[0]).__name__}; expected tensors by "
                "name, as torch.save(model.state_dict()) writes them"
            )
        tensors |= held
    return tensors


def refuse_adapters(source: str | None, name: str) -> None:
    """``EBFTError`` if an adapter lies beside the model: transformers would add some of it, and shards alone none."""
    if Path(name).is_dir():
        found = [file for file in _ADAPTERS if (Path(name) / file).exists()]
    else:
        found = [_ADAPTERS[0]] if find_adapter_config_file(name) else []
    if found:
        raise EBFTError(
            f"model {shown(source)} has {found[0]} beside it, an adapter that is no part of its weights; expected it "
            "to be merged (peft: AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload().save_pretrained(…)) or "
            "taken away"
        )
