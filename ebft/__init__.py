"""EBFT: effective block-wise fine-tuning for sparse LLMs (arXiv 2402.12419)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ebft.compressed.registering import register_when_imported
from ebft.errors import EBFTError
from ebft.version import __version__

if TYPE_CHECKING:
    from ebft.compressed.layers import compress_model, load_compressed, to_dense
    from ebft.config import Data, EBFTConfig, Evaluate, Model, Output, Prune, Recover, Runtime
    from ebft.export.semi_structured import to_semi_structured
    from ebft.pipeline.run import RunResult, run_ebft
    from ebft.recovery.ebft.reconstruct import BlockReconstructor
    from ebft.recovery.task import BlockResult

# Where each of the public names is, which is imported when it is first asked for (PEP 562).
_WHERE = {
    "BlockReconstructor": "ebft.recovery.ebft.reconstruct",
    "BlockResult": "ebft.recovery.task",
    "RunResult": "ebft.pipeline.run",
    "run_ebft": "ebft.pipeline.run",
    "to_semi_structured": "ebft.export.semi_structured",
    **dict.fromkeys(("compress_model", "load_compressed", "to_dense"), "ebft.compressed.layers"),
    **dict.fromkeys(
        ("Data", "EBFTConfig", "Evaluate", "Model", "Output", "Prune", "Recover", "Runtime"), "ebft.config"
    ),
}

__all__ = [
    "BlockReconstructor",
    "BlockResult",
    "Data",
    "EBFTConfig",
    "EBFTError",
    "Evaluate",
    "Model",
    "Output",
    "Prune",
    "Recover",
    "RunResult",
    "Runtime",
    "__version__",
    "compress_model",
    "load_compressed",
    "run_ebft",
    "to_dense",
    "to_semi_structured",
]

register_when_imported()  # with transformers, whenever that is imported


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_WHERE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
