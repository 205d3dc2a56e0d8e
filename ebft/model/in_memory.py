"""A model that is given in memory: taken out of what is around it, and refused where a run could not do it justice."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ebft.errors import EBFTError, first_line
from ebft.model.libraries import quiet
from ebft_kernels import MaskedLinear

_EXPECTED = "expected a hub id, a folder, a .gguf file or a causal language model of transformers"


def given_model(model: Any) -> str | PreTrainedModel | None:
    """What to prune, as a user gives it: a name or path, or the model inside of torch.compile, DataParallel or DDP.

    Raises:
        EBFTError: it is no model of transformers; its layers are not those that its class makes (adapters, wrappers,
            parametrisations, quantised weights), so that what is saved would not be it; or weights are not in memory.
    """
    if model is None or isinstance(model, str):
        return model
    if isinstance(model, os.PathLike):
        return os.fspath(model)
    while isinstance(model, _AROUND) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    if any(kind.__module__.startswith("peft.") for kind in type(model).__mro__):
        raise EBFTError(
            f"a {type(model).__name__} is given, whose adapters are not in the model's own weights; expected what its "
            "merge_and_unload() gives"
        )
    if not isinstance(model, PreTrainedModel):
        raise EBFTError(f"the model is a {type(model).__module__}.{type(model).__name__}; {_EXPECTED}")
    _check_weights(model)
    _check_layers(model)
    for module in model.modules():
        if isinstance(module, MaskedLinear):
            module.apply_mask_()
    return model


_AROUND = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def _check_weights(model: PreTrainedModel) -> None:
    """Weights are plain tensors of floats in memory, which can be written."""
    for name, parameter in model.named_parameters():
        said = f"the model's {name}"
        if parameter.is_meta:
            raise EBFTError(
                f"{said} is not in memory (it is on the meta device, as accelerate's offloading leaves it); expected a "
                "model that is loaded whole, without device_map, or its folder"
            )
        if type(parameter.data) is not torch.Tensor:
            raise EBFTError(f"{said} is a {type(parameter.data).__name__}; expected plain weights in floats")
        if not parameter.is_floating_point():
            raise EBFTError(f"{said} is {parameter.dtype}; expected float weights")
        if parameter.is_inference():
            raise EBFTError(
                f"{said} was made in torch.inference_mode(), and cannot be written outside of it; expected a model "
                "that is made outside of it (torch.no_grad() does no harm)"
            )


def _check_layers(model: PreTrainedModel) -> None:
    """Names and shapes are those that the class makes of the configuration, as whoever loads the output does."""
    kind = type(model).__name__
    try:
        with quiet(), torch.device("meta"):
            plain = type(model)._from_config(copy.deepcopy(model.config)).state_dict()
    except Exception as error:
        raise EBFTError(f"{kind} cannot be made from its own configuration: {first_line(error)}") from error
    own = model.state_dict()
    for name in sorted(own.keys() - plain.keys()):
        raise EBFTError(
            f"the model has {name}, which {kind} does not make; expected its own layers: merge adapters "
            "(merge_and_unload()), remove parametrisations, and take layers out of wrappers, before the run"
        )
    for name in sorted(plain.keys() - own.keys()):
        if not name.endswith(".bias"):  # which are 0 in what is saved
            raise EBFTError(
                f"the model lacks {name}, which {kind} makes of its configuration; expected a configuration that is "
                "changed with the model"
            )
    for name, value in own.items():
        if value.shape != plain[name].shape:
            raise EBFTError(
                f"the model's {name} is {tuple(value.shape)}, and its configuration makes it "
                f"{tuple(plain[name].shape)}; expected a configuration that is changed with the model"
            )
