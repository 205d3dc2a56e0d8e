"""``ebft export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ebft.cli.heavy import importing
from ebft.errors import EBFTError
from ebft.model.locate import locate

_ENDINGS = {"gguf": ".gguf", "dense": "-dense"}


def export(
    model: Annotated[str, Parameter(help="folder of a run, compressed folder, or any model", metavar="MODEL")],
    output: Annotated[
        str | None,
        Parameter(help="file (gguf) or folder to write (default: named after MODEL, beside it)", metavar="OUT"),
    ] = None,
    /,
    *,
    to: Annotated[
        Literal["gguf", "dense"],
        Parameter(help="gguf: a file for llama.cpp; dense: a folder for whatever reads models of transformers"),
    ],
    values: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q4_0"] | None,
        Parameter(help="gguf: how weights are stored (default: as they are)"),
    ] = None,
    overwrite: Annotated[bool, Parameter(help="replace OUT if it is there", negative=())] = False,
) -> int:
    """Write a model in the format of another program."""
    place = Path(locate(model)["pretrained_model_name_or_path"])
    written = Path(output) if output else (place if place.is_dir() else Path(place.name))
    if output is None:
        written = written.with_name(written.name + _ENDINGS[to])
    if to == "dense" and values:
        raise EBFTError(f"--values {values} is for --to gguf; a dense folder has the weights as they are")
    with importing():
        from ebft.export.dense import export_dense
        from ebft.export.gguf import export_gguf

    if to == "dense":
        export_dense(model, written, overwrite=overwrite)
        print(f"{written}: an ordinary model of transformers, with the zeros in it")
    else:
        export_gguf(model, written, values=values, overwrite=overwrite)
        print(f"{written}: {written.stat().st_size / 2**20:.1f} MiB for llama.cpp, with the zeros in it")
    return 0
