"""An ordinary Hugging Face folder, with the zeros in it, for whatever knows nothing of compressed ones: vLLM, say."""

from __future__ import annotations

from pathlib import Path

from ebft.export.source import load_dense, written


def export_dense(source: str, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write a model that was compressed as it was before; weights of 8-bit survivors are what those were rounded to.

    Raises:
        EBFTError: the model cannot be loaded, or the folder cannot be written.
    """
    output = Path(output).expanduser()
    model, tokenizer = load_dense(source)
    with written(output, overwrite) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return output
