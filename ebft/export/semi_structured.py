"""2:4 models as torch's semi-structured weights, which sparse tensor cores of a GPU (Ampere and later) multiply."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from ebft.compressed.layers import to_dense
from ebft.errors import EBFTError

_TILE = (32, 64)  # of outputs and inputs, in 16 bits: what torch's kernels take a multiple of


def to_semi_structured(model: nn.Module) -> list[str]:
    """Turn the weights of a 2:4 pruned model into ``torch.sparse.SparseSemiStructuredTensor``, in place, for inference.

    A layer is left as it is whose weight (N, K) keeps more than two of four consecutive inputs somewhere, or is no
    multiple of 32 x 64. Compressed layers are made dense before.

    Args:
        model: on a GPU, in float16 or bfloat16.

    Returns:
        the names of the layers whose weights were turned.

    Raises:
        EBFTError: the model lies elsewhere or has another dtype, or no layer of it is 2:4.
    """
    to_dense(model)
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
    for name, layer in layers.items():
        if layer.weight.dtype not in (torch.float16, torch.bfloat16) or not layer.weight.is_cuda:
            raise EBFTError(
                f"{name} is {layer.weight.dtype} on {layer.weight.device}; expected float16 or bfloat16 on a CUDA "
                "device for semi-structured weights"
            )
    turned = [name for name, layer in layers.items() if is_two_of_four(layer.weight)]
    if not turned:
        raise EBFTError(f"no layer of {type(model).__name__} is 2:4 and a multiple of {_TILE}; expected --pattern 2:4")
    for name in turned:
        weight: SparseSemiStructuredTensor = to_sparse_semi_structured(layers[name].weight.detach())
        layers[name].weight = nn.Parameter(weight, requires_grad=False)
    return turned


def is_two_of_four(weight: Tensor) -> bool:
    """Whether a weight (N, K) keeps at most two of every four inputs, and torch's kernels take its shape."""
    if weight.shape[0] % _TILE[0] or weight.shape[1] % _TILE[1]:
        return False
    return bool((weight.unflatten(1, (-1, 4)).count_nonzero(2) <= 2).all())
