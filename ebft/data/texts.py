"""The texts that there are by name, and the files that one may come in: what is known without reading any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ebft.config import EBFTConfig
from ebft.config.fields import is_file
from ebft.errors import EBFTError, first_line
from ebft.model.locate import fault_of_hub

BUILTIN, SELF = "builtin", "self"
HUB_TEXTS: dict[str, dict[str, Any]] = {
    # name -> the dataset, and the split that each use takes
    "c4": {"path": "allenai/c4", "name": "en", "calibration": "train", "evaluation": "validation"},
    "wikitext2": {
        "path": "Salesforce/wikitext",
        "name": "wikitext-2-raw-v1",
        "calibration": "train",
        "evaluation": "test",
    },
}
# Suffix of a file -> what reads it: ``datasets``' name for the format, or None for plain text.
FILES = {".txt": None, ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def check_texts(config: EBFTConfig) -> None:
    """``EBFTError`` if a calibration or evaluation text has no name that is known, and is no file of a known kind."""
    if config.uses_text:
        for name in config.data.parts:
            check_text(name, "calibration")
    for name in config.evaluate.texts:
        check_text(name, "evaluation")


def check_hub(config: EBFTConfig) -> None:
    """``EBFTError`` if texts come from the hub and it does not answer: ``datasets`` would ask it for half a minute."""
    for name in dict.fromkeys((*(config.data.parts if config.uses_text else ()), *config.evaluate.texts)):
        path = HUB_TEXTS[name]["path"] if name in HUB_TEXTS else None
        if path and (fault := fault_of_hub(path, "README.md", "dataset")):
            raise EBFTError(
                f"text {name} ({path}) cannot be read from the hub: {first_line(fault).rstrip('.')}; expected a "
                f"connection, {BUILTIN}, or a file"
            )


def check_text(name: str, use: str) -> None:
    """The same of one text; ``use`` is ``calibration`` or ``evaluation``."""
    named = (*HUB_TEXTS, BUILTIN, *((SELF,) if use == "calibration" else ()))
    if name not in named and not (is_file(name) and Path(name).suffix in FILES):
        raise EBFTError(f"text {name!r}: expected {', '.join(named)}, or an existing .txt, .jsonl or .parquet file")
