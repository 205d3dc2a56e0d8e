"""What can be known to be wrong with a run from its settings, its model and its masks, before any work is done."""

from __future__ import annotations

import operator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ebft.config import EBFTConfig
from ebft.config.pattern import Pattern
from ebft.errors import EBFTError
from ebft.model.decoder import Decoder
from ebft.model.matrices import Matrix
from ebft.pruning.allocation import make_allocation
from ebft.pruning.masker import Masker
from ebft.pruning.pattern import mask_of_best
from ebft.pruning.structured.units import bias_name, find_units, removed_by


def check_ends(decoder: Decoder, called: str) -> None:
    """``EBFTError`` for NaN or infinity in what is in no block, so that no block's outputs would show it."""
    if name := decoder.not_finite():
        raise EBFTError(f"{called}: {name} holds NaN or infinity; expected finite weights")


def check_teacher(decoder: Decoder, teacher: Decoder) -> None:
    """``EBFTError`` if ``teacher`` is not the model that ``decoder``'s was made of.

    Structured pruning may have left the model less of every matrix and its bias; all else is the same in both.
    """
    if len(teacher) != len(decoder):
        raise EBFTError(f"--teacher has {len(teacher)} blocks; expected {len(decoder)}, as the model has")
    for index, name in enumerate(decoder.names):
        shapes, theirs = (
            {n: tuple(p.shape) for n, p in of.stored_block(index).named_parameters()} for of in (decoder, teacher)
        )
        may_be_less = {n for m in decoder.matrices[index] for n in (m.name, bias_name(m))}
        for parameter in sorted(shapes.keys() | theirs.keys()):
            own, its = shapes.get(parameter), theirs.get(parameter)
            if own != its and not (parameter in may_be_less and _is_part_of(own, its)):
                raise EBFTError(f"--teacher has {its} for {name}.{parameter}; expected {own}, as the model has")
    ours, of_teacher = (_shape_settings(either.model) for either in (decoder, teacher))
    for setting, value in ours.items():
        if of_teacher[setting] != value:
            raise EBFTError(f"--teacher has {setting} {of_teacher[setting]}; expected {value}, as the model has")


def _is_part_of(shape: tuple[int, ...] | None, whole: tuple[int, ...] | None) -> bool:
    return shape is not None and whole is not None and len(shape) == len(whole) and all(map(operator.le, shape, whole))


def _shape_settings(model: PreTrainedModel) -> dict[str, Any]:
    """What two models can differ in although all their blocks are alike in shape, or one's a part of the other's."""
    config = model.config.get_text_config()
    settings = {name: getattr(config, name, None) for name in ("model_type", "hidden_size", "max_position_embeddings")}
    settings["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"vocabulary": model.get_input_embeddings().weight.shape[0], **settings}


def check_masks(config: EBFTConfig, masker: Masker, decoder: Decoder, teacher: Decoder) -> None:
    """``EBFTError`` for what can be known of the masks: widths, names, shapes, and that there is something to do."""
    masker.check(decoder.names, [decoder.stored_block(index) for index in range(len(decoder))], decoder.matrices)
    allocation, prunes = make_allocation(config.prune.allocation, config.prune.mask_pattern), False
    changes = masker.surveyor is not None and not config.prune.structured  # which shares it gives is not known yet
    for index, (name, matrices) in enumerate(zip(decoder.names, decoder.matrices, strict=True)):
        block = decoder.copy_of_block(index)
        if masker.given:
            for matrix, mask in masker(name, block, matrices, {}).masks.items():
                pruned = block.get_parameter(matrix)[~mask.dense()]
                prunes, changes = prunes or bool(pruned.numel()), changes or bool((pruned != 0).any())
        else:
            asked = [allocation.of(name, m.name) for m in matrices]
            prunes = prunes or any(pattern.sparsity for pattern in asked)
            changes = changes or _zeros_are_not_enough(config, name, block, matrices, asked)
        if prunes and changes:
            return
    if not prunes and _parameters(decoder) == _parameters(teacher):
        raise EBFTError(f"--prune {config.prune.criterion} prunes nothing: it keeps every weight of every block")
    if config.block_recoveries and teacher is decoder:
        raise EBFTError(
            f"--prune {config.prune.criterion} prunes only weights that are zero already, so against the model itself "
            "the loss would be 0; give the dense model with --teacher"
        )


def _parameters(decoder: Decoder) -> int:
    """Of all matrices of all blocks."""
    return sum(m.experts * m.outputs * m.inputs for matrices in decoder.matrices for m in matrices)


def _zeros_are_not_enough(
    config: EBFTConfig, name: str, block: nn.Module, matrices: list[Matrix], asked: list[Pattern]
) -> bool:
    """Whether a criterion, which takes zeros first, needs more than ``block`` has."""
    weights = {matrix.name: block.get_parameter(matrix.name) for matrix in matrices}
    if config.prune.structured:
        kept = {of_matrix: weight != 0 for of_matrix, weight in weights.items()}
        gone = sum(len(removed_by(units, kept)) * units.parameters for units in find_units(name, block, matrices))
        return gone < 0.99 * config.prune.sparsity * sum(matrix.outputs * matrix.inputs for matrix in matrices)

    def lacks(matrix: Matrix, pattern: Pattern) -> bool:
        weight = weights[matrix.name]
        if not pattern.group:
            return float((weight == 0).float().mean()) < 0.99 * pattern.sparsity
        experts = matrix.by_expert(weight)
        return any(bool(expert[~mask_of_best(expert.abs(), pattern, per_row=True)].any()) for expert in experts)

    return any(map(lacks, matrices, asked))
