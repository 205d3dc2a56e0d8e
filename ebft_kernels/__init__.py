"""Masked linear layers and masked optimizer steps for sparse networks; it knows tensors and masks, no LLMs."""

from importlib.metadata import PackageNotFoundError, version

from ebft_kernels.compressed import CompressedLinear
from ebft_kernels.dispatch import Choice, explain, use_impl
from ebft_kernels.functional import (
    masked_adamw_step,
    masked_grad_norm,
    masked_linear,
    reconstruction_loss,
    reconstruction_loss_and_gradient,
)
from ebft_kernels.mask import PackedMask, load_masks, masks_of, save_masks
from ebft_kernels.nn import MaskedLinear, assert_masked, is_masked, mask_linears_, unmask_linears_
from ebft_kernels.optim import MaskedAdamW

try:
    __version__ = version("ebft")  # both packages are in that one distribution (ebft/version.py)
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "Choice",
    "CompressedLinear",
    "MaskedAdamW",
    "MaskedLinear",
    "PackedMask",
    "__version__",
    "assert_masked",
    "explain",
    "is_masked",
    "load_masks",
    "mask_linears_",
    "masked_adamw_step",
    "masked_grad_norm",
    "masked_linear",
    "masks_of",
    "reconstruction_loss",
    "reconstruction_loss_and_gradient",
    "save_masks",
    "unmask_linears_",
    "use_impl",
]
