"""Layers without the units that pruning removed: narrower, and with the same outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ebft.config import EBFTConfig
from ebft.errors import EBFTError, first_line
from ebft.model.blocks import find_blocks
from ebft.model.decoder import Decoder
from ebft.model.matrices import find_matrices
from ebft.model.tensors import ShardedWeights
from ebft.output.folder import OutputFolder
from ebft.pruning.structured.biases import fill_in_biases_
from ebft.pruning.structured.uniform import narrowed
from ebft.pruning.structured.units import Units, bias_name, bias_of, find_units, removed_by
from ebft_kernels import PackedMask

# What attention modules may know their number of heads by.
HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "split_size")

Cuts = dict[str, list[Tensor]]  # name in the block -> for each of its dimensions the places that are kept, int64


def cuts_of(block: nn.Module, units: Sequence[Units], removed: Sequence[Tensor]) -> Cuts:
    """What is kept of every parameter that loses something where the ``removed`` units of each kind go."""
    cuts: Cuts = {}

    def keep(name: str, dimension: int, gone: Tensor) -> None:
        shape = block.get_parameter(name).shape
        cuts.setdefault(name, [torch.arange(size) for size in shape])
        alive = torch.ones(shape[dimension], dtype=torch.bool)
        alive[gone] = False
        cuts[name][dimension] = alive.nonzero().flatten()

    for of_kind, gone in zip(units, removed, strict=True):
        if not len(gone):
            continue
        keep(of_kind.consumer.name, 0 if of_kind.consumer.transposed else 1, of_kind.columns[gone].flatten())
        for matrix, rows in of_kind.rows.items():
            keep(matrix.name, 1 if matrix.transposed else 0, rows[gone].flatten())
            if bias_of(block, matrix) is not None:
                keep(bias_name(matrix), 0, rows[gone].flatten())
    return cuts


def cut(tensor: Tensor, kept: Sequence[Tensor]) -> Tensor:
    """The kept places of a parameter, or of something in its shape."""
    for dimension, places in enumerate(kept):
        tensor = tensor.index_select(dimension, places.to(tensor.device))
    return tensor


def narrow_(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """Cut out of the blocks, in place, every unit of which all weights are 0, but for one of a kind in each.

    Returns:
        attention module -> what it has to be told of its number of heads. Blocks without known units stay as they are.

    Raises:
        EBFTError: the model then does not run, or has other outputs.
    """
    told: dict[str, dict[str, int]] = {}
    path, blocks = find_blocks(model)
    removed = {index: found for index, block in enumerate(blocks) if (found := _removed(f"{path}.{index}", block))}
    if not removed:
        return {}
    with torch.no_grad():
        ids = torch.arange(8).unsqueeze(0) % model.get_input_embeddings().weight.shape[0]
        before = model(ids, use_cache=False).logits.float()
        for index, (units, gone) in removed.items():
            told |= _narrow_block_(f"{path}.{index}", blocks[index], units, gone)
        try:
            change = (model(ids, use_cache=False).logits.float() - before).norm() / before.norm()
        except RuntimeError as error:
            raise EBFTError(f"{type(model).__name__} does not run with fewer heads: {first_line(error)}") from None
    if not change < 0.05:  # sums in another order, in bfloat16 perhaps
        raise EBFTError(f"{type(model).__name__} does not work with fewer heads: its outputs change by {change:.0%}")
    return told


def _removed(name: str, block: nn.Module) -> tuple[Sequence[Units], list[Tensor]] | None:
    """The units of a block, and which of each kind are 0, but for one; None where no units are known, or none is 0."""
    matrices = find_matrices(block)
    try:
        units = find_units(name, block, matrices)
    except EBFTError:
        return None
    kept = {matrix.name: block.get_parameter(matrix.name) != 0 for matrix in matrices}
    removed = [removed_by(of_kind, kept) for of_kind in units]
    removed = [gone[1:] if len(gone) == len(of_kind) else gone for of_kind, gone in zip(units, removed, strict=True)]
    return (units, removed) if any(map(len, removed)) else None


def _narrow_block_(
    name: str, block: nn.Module, units: Sequence[Units], removed: Sequence[Tensor]
) -> dict[str, dict[str, int]]:
    for parameter, places in cuts_of(block, units, removed).items():
        place, _, last = parameter.rpartition(".")
        layer = block.get_submodule(place)
        setattr(layer, last, nn.Parameter(cut(getattr(layer, last).detach(), places), requires_grad=False))
        if isinstance(layer, Conv1D):
            layer.nx, layer.nf = layer.weight.shape
        else:
            layer.out_features, layer.in_features = layer.weight.shape
    heads, gone = units[0], removed[0]
    place = heads.consumer.name.removesuffix(".weight").rpartition(".")[0]
    attention = block.get_submodule(place)
    counts = {
        count: getattr(attention, count) // len(heads) * (len(heads) - len(gone))
        for count in HEAD_COUNTS
        if len(gone) and isinstance(getattr(attention, count, None), int)
    }
    for count, value in counts.items():
        setattr(attention, count, value)
    return {f"{name}.{place}": counts} if counts else {}


def as_saved(
    config: EBFTConfig, decoder: Decoder, out: OutputFolder
) -> tuple[PreTrainedModel, list[dict[str, PackedMask]]]:
    """The model as it is saved, or a skeleton of it, and the masks of its blocks.

    Where the widths are the same in every layer (``--uniform``) it is narrower than the decoder's, which keeps its
    shape: finished blocks are rewritten without what was removed, and masks are those of what is left.
    """
    masks = [out.block_masks(index) for index in range(len(decoder))]
    if not config.prune.uniform:
        if not decoder.weights.on_disk:
            fill_in_biases_(decoder.model)
        return decoder.model, masks
    blocks = [decoder.stored_block(index) for index in range(len(decoder))]
    found = []
    for name, block, matrices, of_block in zip(decoder.names, blocks, decoder.matrices, masks, strict=True):
        units = find_units(name, block, matrices)
        kept = {full.removeprefix(f"{name}."): mask.dense() for full, mask in of_block.items()}
        found.append((units, [removed_by(of_kind, kept) for of_kind in units]))
    units, removed = found[0]
    narrow = narrowed(decoder.model.config, units, [len(gone) for gone in removed])
    on_disk = isinstance(decoder.weights, ShardedWeights)
    with torch.device("meta" if on_disk else "cpu"):
        model = type(decoder.model)._from_config(narrow, dtype=decoder.model.dtype).eval()
    model.generation_config = decoder.model.generation_config
    state = {} if on_disk else decoder.model.state_dict()
    for index, (name, block, (units, removed)) in enumerate(zip(decoder.names, blocks, found, strict=True)):
        cuts = {f"{name}.{parameter}": kept for parameter, kept in cuts_of(block, units, removed).items()}
        parameters = [f"{name}.{parameter}" for parameter, _ in block.named_parameters()]
        weights = _all_cut(decoder.weights.read(parameters, out.block(index)), cuts)
        unused = {  # biases that the configuration asks for
            f"{name}.{parameter}": torch.zeros(like.shape, dtype=decoder.model.dtype)
            for parameter, like in model.get_submodule(name).named_parameters()
            if f"{name}.{parameter}" not in weights
        }
        out.rewrite_block(index, decoder.weights.as_stored(weights) | unused, "narrow")
        masks[index] = {
            full: PackedMask.from_dense(cut(mask.dense(), cuts[full]) if full in cuts else mask.dense())
            for full, mask in masks[index].items()
        }
        if not on_disk:
            state |= weights | unused
    if not on_disk:
        model.load_state_dict(state)
    out.newest = "narrow"
    return model, masks


def _all_cut(weights: Mapping[str, Tensor], cuts: Cuts) -> dict[str, Tensor]:
    return {name: cut(weight, cuts[name]) if name in cuts else weight for name, weight in weights.items()}
