"""The same widths in every layer, so that a configuration of transformers can say them: which, and how it says them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from ebft.errors import EBFTError
from ebft.model.matrices import Matrix
from ebft.pruning.structured.units import Units, find_units

_CHANNELS = ("ffn_dim", "n_inner", "intermediate_size")  # what configurations call the number of MLP channels


def narrowed(config: PretrainedConfig, units: Sequence[Units], removed: Sequence[int]) -> PretrainedConfig:
    """A configuration with so many heads' groups and channels fewer in every layer; heads keep their width.

    Args:
        config: a decoder's own.
        units: the heads and the channels of a block.
        removed: how many of each go.
    """
    narrow, (heads, channels), (groups, gone) = copy.deepcopy(config), units, removed
    if groups:
        narrow.head_dim = config.head_dim if getattr(config, "head_dim", None) else _head_width(config, heads)
        narrow.num_attention_heads = config.num_attention_heads // len(heads) * (len(heads) - groups)
        if getattr(config, "num_key_value_heads", None) is not None:
            narrow.num_key_value_heads = len(heads) - groups
    name = next((name for name in _CHANNELS if hasattr(config, name)), None)
    if gone and name:
        setattr(narrow, name, len(channels) - gone)
    return narrow


def _head_width(config: PretrainedConfig, heads: Units) -> int:
    return heads.columns.shape[1] * len(heads) // config.num_attention_heads


def uniform_widths(
    names: Sequence[str], blocks: Sequence[nn.Module], matrices: Sequence[Sequence[Matrix]], sparsity: float
) -> list[int]:
    """How many groups of heads and how many channels every block loses.

    Of the numbers of groups that a configuration can say, the nearest to the share; channels make up the rest.

    Raises:
        EBFTError: the blocks differ in their widths, or no configuration can say what is left.
    """
    units = [find_units(*block) for block in zip(names, blocks, matrices, strict=True)]
    if len({tuple((len(of_kind), of_kind.parameters) for of_kind in of_block) for of_block in units}) > 1:
        raise EBFTError("--uniform: the blocks have different widths; expected the same in all, or no --uniform")
    heads, channels = units[0]
    wanted = sparsity * sum(matrix.outputs * matrix.inputs for matrix in matrices[0])
    config = next(module.config for module in blocks[0].modules() if hasattr(module, "config"))
    for groups in sorted(range(len(heads)), key=lambda groups: abs(groups - sparsity * len(heads))):
        gone = round((wanted - groups * heads.parameters) / channels.parameters)
        if 0 <= gone < len(channels) and _can_be_said(config, names, units[0], [groups, gone]):
            return [groups, gone]
    raise EBFTError(
        f"--uniform: no configuration of {type(config).__name__} says widths with {sparsity:.0%} of the blocks' "
        "parameters less; expected another --sparsity, or no --uniform"
    )


def _can_be_said(
    config: PretrainedConfig, names: Sequence[str], units: Sequence[Units], removed: Sequence[int]
) -> bool:
    """Whether transformers takes the configuration, and makes the widths of it that are meant."""
    narrow = narrowed(config, units, removed)
    try:
        narrow = type(narrow).from_dict(narrow.to_dict())  # as it will be read from the file
        with torch.device("meta"):
            made = dict(AutoModelForCausalLM.from_config(narrow, trust_remote_code=False).named_parameters())
    except (ValueError, StrictDataclassError):
        return False
    shapes = {}
    for of_kind, gone in zip(units, removed, strict=True):
        columns = of_kind.consumer.inputs - gone * of_kind.columns.shape[1]
        shapes[of_kind.consumer] = (of_kind.consumer.outputs, columns)
        for matrix, rows in of_kind.rows.items():
            shapes[matrix] = (matrix.outputs - gone * rows.shape[1], matrix.inputs)
    return all(
        f"{name}.{matrix.name}" in made and tuple(matrix.by_expert(made[f"{name}.{matrix.name}"])[0].shape) == shape
        for name in names
        for matrix, shape in shapes.items()
    )
