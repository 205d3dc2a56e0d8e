"""EBFT: effective block-wise fine-tuning for sparse LLMs (arXiv 2402.12419)."""

from ebft.compressed.layers import load_compressed
from ebft.config.config import EBFTConfig
from ebft.errors import EBFTError
from ebft.pipeline.run import RunResult, run_ebft
from ebft.recovery.ebft.reconstruct import BlockReconstructor
from ebft.recovery import BlockResult
from ebft.version import __version__

__all__ = [
    "BlockReconstructor",
    "BlockResult",
    "EBFTConfig",
    "EBFTError",
    "RunResult",
    "__version__",
    "load_compressed",
    "run_ebft",
]
