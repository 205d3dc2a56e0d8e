"""Layers without the units that pruning removed: narrower, and with the same outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ebft.biases import fill_in_biases_
from ebft.config import EBFTConfig
from ebft.decoder import Decoder
from ebft.output import OutputFolder
from ebft.pruning.uniform import narrowed
from ebft.pruning.units import Units, bias_name, bias_of, find_units, removed_by
from ebft.weights import ShardedWeights
from ebft_kernels import PackedMask

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


def as_saved(
    config: EBFTConfig, decoder: Decoder, out: OutputFolder
) -> tuple[PreTrainedModel, list[dict[str, PackedMask]]]:
    """The model as it is saved, or a skeleton of it, and the masks of its blocks.

    Where the widths are the same in every layer (``--uniform``) it is narrower than the decoder's, which keeps its
    shape: finished blocks are rewritten without what was removed, and masks are those of what is left.
    """
    masks = [out.block_masks(index) for index in range(len(decoder))]
    if not config.uniform:
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
