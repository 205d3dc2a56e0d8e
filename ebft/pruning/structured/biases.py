"""Biases for layers that have none, where the architecture can have them: flags of the configuration say whether."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ebft.model.blocks import find_blocks
from ebft.model.checkpoint import Source
from ebft.model.matrices import find_matrices
from ebft.model.tensors import ModelWeights, ShardedWeights
from ebft.pruning.structured.units import find_units

_FLAGS = ("attention_bias", "mlp_bias")


def consumers(model: PreTrainedModel) -> list[str]:
    """Full names of the layers that take up what heads and channels make; ``EBFTError`` as in ``find_units``."""
    path, blocks = find_blocks(model)
    return [
        f"{path}.{index}.{units.consumer.name.removesuffix('.weight')}"
        for index, block in enumerate(blocks)
        for units in find_units(f"{path}.{index}", block, find_matrices(block))
    ]


def with_biases(source: Source, layers: Sequence[str], say: Callable[[str], object]) -> Source:
    """The model with biases of 0 in ``layers`` (full names), wherever a flag of its configuration gives them some.

    The flags are set. What else they ask for, and nothing uses, is 0 in the saved model and not in this one, so that no
    recovery changes it. A model in memory is changed in place.

    Args:
        say: is told, in a sentence, which layers cannot have a bias.
    """
    model = source.model
    own = {name for name, _ in model.named_parameters()}
    lacking = [layer for layer in layers if f"{layer}.bias" not in own]
    config = model.config.get_text_config()
    for flag in _FLAGS:
        if getattr(config, flag, None) is False and lacking:
            asked = _parameters(model, flag)
            gained = [layer for layer in lacking if f"{layer}.bias" in asked]
            if gained:
                setattr(config, flag, True)
            lacking = [layer for layer in lacking if layer not in gained]
            for layer in map(model.get_submodule, gained):
                bias = torch.zeros(layer.weight.shape[0], dtype=layer.weight.dtype, device=layer.weight.device)
                layer.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
    if lacking:
        what = sorted({layer.rpartition(".")[2] for layer in lacking})
        say(f"{type(model).__name__} has no bias in {' and '.join(what)}: nothing there stands in for what is removed")
    added = {name: p for name, p in _parameters(model).items() if name not in own}
    if not added:
        return source
    if isinstance(source.weights, ShardedWeights):
        zeros = {name: p.to(_dtype(model)) for name, p in added.items()}
        return Source(model, ShardedWeights(model, source.weights.tensors.with_zeros(zeros)))
    return Source(model, ModelWeights(model))


def fill_in_biases_(model: PreTrainedModel) -> None:
    """Give the model, in memory, the biases that its configuration asks for and it lacks: 0."""
    if not any(getattr(model.config.get_text_config(), flag, False) for flag in _FLAGS):
        return
    own = {name for name, _ in model.named_parameters()}
    for name, parameter in _parameters(model).items():
        layer, _, last = name.rpartition(".")
        if name not in own and last == "bias":
            bias = torch.zeros(parameter.shape, dtype=_dtype(model))
            model.get_submodule(layer).register_parameter("bias", nn.Parameter(bias, requires_grad=False))


def _parameters(model: PreTrainedModel, flag: str | None = None) -> dict[str, torch.Tensor]:
    """What the configuration asks for, without values; ``flag``: with this one set."""
    config = copy.deepcopy(model.config)
    if flag is not None:
        setattr(config.get_text_config(), flag, True)
    with torch.device("meta"):
        return {name: p.detach() for name, p in type(model)._from_config(config).named_parameters()}


def _dtype(model: PreTrainedModel) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
