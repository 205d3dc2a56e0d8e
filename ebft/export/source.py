"""What is exported: a folder of a run, a compressed one, or any model, as an ordinary model with its zeros."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ebft.compressed.layers import is_compressed, load_compressed, to_dense
from ebft.errors import EBFTError
from ebft.model.checkpoint import load_model, load_tokenizer


def load_dense(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with weights in all layers, and its tokenizer.

    Raises:
        EBFTError: it cannot be loaded, or its layers have widths that no other program has words for.
    """
    if not is_compressed(source):
        return load_model(source), load_tokenizer(source)
    model = to_dense(load_compressed(source))
    if getattr(model, "hf_quantizer", None) is not None:
        raise EBFTError(
            f"model {source} has layers with widths of their own, which only ebft loads; export the folder that it was "
            "compressed from"
        )
    return model, load_tokenizer(source)


@contextmanager
def written(output: Path, overwrite: bool) -> Iterator[Path]:
    """Where to write a file or a folder, which becomes ``output`` once it is whole.

    Raises:
        EBFTError: ``output`` is there and not to be replaced, or cannot be written.
    """
    if output.exists() and not overwrite:
        raise EBFTError(f"{output} is there; give --overwrite to replace it")
    partial = output.with_name(f"{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        yield partial
        _remove(output)
        partial.rename(output)
    except OSError as error:
        raise EBFTError(f"{output} cannot be written: {error.strerror or error}") from None
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
