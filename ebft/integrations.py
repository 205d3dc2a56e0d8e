"""For other people's trainers: a callback of transformers that keeps a pruned model pruned while it is tuned."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from ebft.errors import EBFTError, first_line
from ebft.model.matrices import find_matrices
from ebft_kernels import MaskedLinear, PackedMask, assert_masked, is_masked, load_masks, mask_linears_, masks_of

MASKS = "masks.safetensors"


class KeepSparsity(TrainerCallback):
    """Pruned weights stay zero through any run of transformers' Trainer, and of trainers built on it (TRL and others).

        Trainer(model=model, args=args, train_dataset=rows, callbacks=[KeepSparsity("ebft-output")])

    When the trainer is made, linear layers become masked ones in place (``mask_linears_``); under peft these are the
    base layers, so that a merge is masked too. What is no linear layer (GPT-2's Conv1D, fused experts) is set to zero
    again after every step. After every step ``assert_masked`` looks at the masked layers. If something has written to
    pruned weights, a warning names the layers and says whether it was the optimizer or something between two steps,
    once for each; the weights are zero again before anybody uses them.

    Args:
        masks: a folder that holds ``masks.safetensors``, such a file, or weight name -> PackedMask or bool tensor
            (True = kept); by default the masks of the layers that are masked already, or, if none is, what is zero
            in the model now.
        strict: raise an error in place of the warning.
        every: look at every so many steps; a look reads each masked weight once, and waits for the GPU.

    Raises:
        EBFTError: the masks cannot be read or do not fit the model, nothing in it is pruned, a masked layer has been
            replaced by another one, or, if ``strict``, something wrote to pruned weights.
    """

    def __init__(
        self,
        masks: str | os.PathLike[str] | Mapping[str, PackedMask | Tensor] | None = None,
        *,
        strict: bool = False,
        every: int = 1,
    ) -> None:
        if every < 1:
            raise EBFTError(f"KeepSparsity got every={every}; expected at least 1")
        self._given, self._strict, self._every = masks, strict, every
        self._layers: dict[str, MaskedLinear] = {}  # by the name in the model that is trained
        self._others: dict[str, tuple[nn.Parameter, PackedMask]] = {}
        self._told: set[str] = set()

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Mask the model, before an optimizer is made for it and before it is sharded."""
        self._mask(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """The same for a callback that was added later, and for a model that was made anew (``model_init``)."""
        held = {id(part) for part in (*model.modules(), *model.parameters())}
        ours = (*self._layers.values(), *(weight for weight, _ in self._others.values()))
        if not any(id(part) in held for part in ours):
            self._mask(model)
        self._look("something before the first step", model)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Look for what was written since the last step."""
        if state.global_step % self._every == 0:
            self._look("something between two steps (a callback, an evaluation, a save)", model, state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Look for what the optimizer has written."""
        for weight, mask in self._others.values():
            mask.zero_pruned_(weight)
        if state.global_step % self._every == 0:
            optimizer = others.get("optimizer")
            optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
            self._look(f"the optimizer, {type(optimizer).__name__},", model, state.global_step + 1)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Look once more."""
        self._look("something after the last step", model, state.global_step)

    # --- masks ------------------------------------------------------------------------------------------------------

    def _mask(self, model: nn.Module) -> None:
        given = self._given
        masks = _named_in(model, _read(given)) if given is not None else masks_of(model) or _zeros_of(model)
        modules, self._others = dict(model.named_modules()), {}
        linear = {name: mask for name, mask in masks.items() if isinstance(modules[_path(name)], nn.Linear)}
        try:
            mask_linears_(model, linear)
            for name in masks.keys() - linear.keys():
                weight, mask = model.get_parameter(name), _packed(masks[name])
                self._others[name] = weight, mask
                mask.zero_pruned_(weight)
        except ValueError as error:
            raise EBFTError(f"KeepSparsity cannot mask this model: {first_line(error)}") from None
        self._layers = {name: modules[_path(name)] for name in linear}

    def _look(self, who: str, model: nn.Module, step: int = 0) -> None:
        """Say what ``who`` has done to the pruned weights, if anything."""
        there = {id(module) for module in model.modules()}
        for name, layer in self._layers.items():
            if id(layer) not in there or not isinstance(layer, MaskedLinear):
                raise EBFTError(
                    f"KeepSparsity: {_path(name)} is no longer the masked layer that it was; expected nothing to "
                    "replace layers after the trainer is made (wrap them before, merge or quantise them afterwards)"
                )
        if not self._layers or is_masked(model):
            return
        try:
            assert_masked(model)
        except ValueError as error:
            found = str(error).partition(";")[0]
            said = f"KeepSparsity: {who} wrote to pruned weights by step {step}: {found}"
            if self._strict:
                raise EBFTError(said) from None
            if who not in self._told:
                self._told.add(who)
                warnings.warn(f"{said}; they are set to zero again", stacklevel=2)
        for layer in self._layers.values():
            layer.apply_mask_()


def _read(given: str | os.PathLike[str] | Mapping[str, PackedMask | Tensor]) -> Mapping[str, PackedMask | Tensor]:
    if isinstance(given, Mapping):
        return given
    file = Path(given)
    file = file / MASKS if file.is_dir() else file
    try:
        return load_masks(file)
    except (OSError, ValueError) as error:
        raise EBFTError(f"KeepSparsity cannot read the masks {file}: {first_line(error)}") from None


def _named_in(model: nn.Module, masks: Mapping[str, Any]) -> dict[str, Any]:
    """The masks by the names that their weights have in ``model``: wrappers put words before them, peft one within."""
    names = {f".{name}".replace(".base_layer.", "."): name for name, _ in model.named_parameters()}
    found = {}
    for wanted, mask in masks.items():
        fitting = [name for plain, name in names.items() if plain.endswith(f".{wanted}")]
        if len(fitting) != 1:
            raise EBFTError(
                f"KeepSparsity got a mask for {wanted!r}, of which a {type(model).__name__} has {len(fitting)}; "
                "expected the masks of this model"
            )
        found[fitting[0]] = mask
    return found


def _zeros_of(model: nn.Module) -> dict[str, PackedMask]:
    """Masks of the matrices that have zeros in them: not the head, and none that is all zero, as new adapters are."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    found = {}
    for matrix in find_matrices(model):
        weight = model.get_parameter(matrix.name)
        zeros = weight.numel() - int(torch.count_nonzero(weight))
        if 0 < zeros < weight.numel() and weight is not getattr(head, "weight", None):
            found[matrix.name] = PackedMask.from_nonzero(weight)
    if not found:
        raise EBFTError(
            f"KeepSparsity found no zeros in the matrices of a {type(model).__name__}; expected a pruned model, or "
            "masks"
        )
    return found


def _packed(mask: PackedMask | Tensor) -> PackedMask:
    return mask if isinstance(mask, PackedMask) else PackedMask.from_dense(mask)


def _path(name: str) -> str:
    return name.rpartition(".")[0]
