"""A model's blocks: which they are, and how the model calls them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers import PreTrainedModel

from ebft.errors import EBFTError


@dataclass(frozen=True)
class BlockCall:
    """How the model calls a block: what it gives besides hidden states, which come first or as ``hidden_states``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
        """The hidden states among a call's arguments, and the rest."""
        if args:
            return args[0], cls(args[1:], kwargs)
        if "hidden_states" not in kwargs:
            raise EBFTError(f"a block is called with {', '.join(kwargs) or 'nothing'}; expected its hidden_states")
        rest = dict(kwargs)
        return rest.pop("hidden_states"), cls((), rest)

    def __call__(self, block: nn.Module, hidden: Tensor, compute: torch.dtype) -> Tensor:
        """Run ``block`` on ``hidden``, products in ``compute``, and give its hidden states in float32."""
        with autocast(hidden.device, compute):
            return first_output(block(hidden, *self.args, **self.kwargs)).float()

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> BlockCall:
        """The same call with every tensor in it changed."""
        args, kwargs = tree_map_only(Tensor, change, (self.args, self.kwargs))
        return BlockCall(args, kwargs)

    def has_nan(self) -> bool:
        """Whether an argument has values that are no numbers."""
        tensors = [leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Tensor)]
        return any(bool(tensor.isnan().any()) for tensor in tensors if not tensor.is_meta)

    def equals(self, other: BlockCall) -> bool:
        """Whether all arguments are the same, tensors by value."""
        mine, theirs = (tree_flatten((call.args, call.kwargs)) for call in (self, other))
        return mine[1] == theirs[1] and all(map(_same, mine[0], theirs[0]))


def find_blocks(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """Path and modules of the model's blocks: the ``ModuleList`` with one entry a layer and the most parameters."""
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if not all(getattr(config, "return_dict", True) for config in (model.config, model.config.get_text_config())):
        raise EBFTError(
            f"{type(model).__name__} has a configuration with return_dict {model.config.return_dict}; expected true"
        )
    lists = {path: list(module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    stacks = {path: blocks for path, blocks in lists.items() if blocks and len(blocks) == layers}
    if not stacks or model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise EBFTError(f"{type(model).__name__} is not a decoder with a stack of blocks and a language-model head")
    path = max(stacks, key=lambda path: sum(p.numel() for block in stacks[path] for p in block.parameters()))
    return path, stacks[path]


def autocast(device: torch.device, compute: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Products in the compute dtype, sums and norms in float32."""
    return torch.autocast(device.type, dtype=compute, enabled=compute != torch.float32)


def first_output(output: Any) -> Tensor:
    """The hidden states among what a block returns: itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def forwards_replaced(
    blocks: list[nn.Module], instead: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
) -> Iterator[None]:
    """While inside, ``instead(index, args, kwargs)`` is what every block's forward does."""

    def forward_of(index: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: instead(index, args, kwargs)

    for index, block in enumerate(blocks):
        block.forward = forward_of(index)  # on the instance: shadows the class's own until it is deleted below
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _same(one: Any, other: Any) -> bool:
    """Whether arguments are equal: tensors (by shape where they have no values) and plain ones by value."""
    if isinstance(one, Tensor):
        same_shape = isinstance(other, Tensor) and one.shape == other.shape
        return same_shape and (one.is_meta or bool(torch.equal(one, other)))
    plain = isinstance(one, bool | int | float | str)
    return type(one) is type(other) and (not plain or one == other)
