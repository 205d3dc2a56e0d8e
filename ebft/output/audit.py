"""Does a finished folder hold what a run promises?

Tensors are looked at one after another as they lie in the files. Only a checkpoint that cannot be streamed (GGUF,
``.bin``) is loaded whole, which is noted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from ebft.config.pattern import Pattern
from ebft.errors import EBFTError, on_one_line
from ebft.files import check_model_folder, indexed_files, ordinary, read_json
from ebft.model.blocks import find_blocks
from ebft.model.checkpoint import Source, load_model, open_model
from ebft.model.locate import DEFAULT_MODEL
from ebft.model.matrices import Matrix, find_matrices, router_paths
from ebft.output.records import SUMMARY, finished_folder
from ebft.registry import criteria
from ebft_kernels import PackedMask, load_masks

LOADED = 2 * 2**30  # bytes of a checkpoint that is also loaded by transformers; of larger ones shapes are compared


@dataclass
class Audit:
    """What was found.

    Attributes:
        layers: full parameter name -> pruned share.
        faults: a sentence each; none: the folder is sound.
        notes: what was not looked at, and why.
    """

    layers: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def audit(output: str, against: str | None = None, *, trust_remote_code: bool = False) -> Audit:
    """Look through the folder that a run has made.

    Args:
        output: the folder.
        against: hub id, folder or GGUF file of the model that was pruned; what no recovery may change is compared.
        trust_remote_code: let transformers run code that comes with either. Nothing in the folder can allow it.

    Raises:
        EBFTError: ``output`` is no run's folder, or ``against`` is not the model that it was made from.
    """
    folder = finished_folder(output)
    check_model_folder(folder)
    try:
        settings = read_json(folder / SUMMARY, SUMMARY)["config"]
        transposable = bool(settings.get("transposable"))
        pattern = Pattern.parse(settings["pattern"], transposable=transposable) if settings["pattern"] else None
        recovered = settings["recover"] != "none"
        structured, uniform = bool(settings.get("structured")), bool(settings.get("uniform"))
        updated = settings["prune"] in criteria and criteria[settings["prune"]].updates_weights
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EBFTError(f"{folder / SUMMARY} is not what a run writes: {type(error).__name__} {error}") from None
    found = Audit()
    files = _Files(folder, found.faults)
    for name in files.names:
        tensor = files.read(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            found.faults.append(f"{name} holds NaN or infinity")
    try:
        model = open_model(str(folder), trust_remote_code=trust_remote_code, say=found.notes.append)
        if files.size <= LOADED:
            load_model(str(folder), trust_remote_code=trust_remote_code)
        else:
            found.notes.append("too large to be loaded whole to see whether it can be: names and shapes were compared")
    except EBFTError as error:
        found.faults.append(str(error))
        found.notes.append("masks were not looked at, because the model cannot be loaded")
        return found
    masks = _masks(folder, found.faults)
    if masks is None:
        return found
    _check_masks(found, model, masks, pattern)
    if against is not None:
        named = None if against == DEFAULT_MODEL else against
        dense = open_model(named, trust_remote_code=trust_remote_code, ignore_unused=True, say=found.notes.append)
        _compare(found, model, dense, masks, recovered, structured, uniform, updated)
    return found


# --- files --------------------------------------------------------------------------------------------------------


class _Files:
    """The safetensors files of a folder, and whether they are what their index says.

    Attributes:
        names: of the tensors that can be read.
        size: bytes of all of them.
    """

    def __init__(self, folder: Path, faults: list[str]) -> None:
        self._where: dict[str, Any] = {}
        index = folder / "model.safetensors.index.json"
        listed = _index(index, faults) if index.is_file() else None
        names = sorted({"model.safetensors"} if listed is None else set(listed.values()))
        self.size = 0
        for name in names:
            try:
                opened = safe_open(ordinary(folder / name, name), framework="pt")
            except (OSError, SafetensorError, EBFTError) as error:
                faults.append(f"{name} cannot be read: {error}")
                continue
            held = set(opened.keys())
            twice = held & self._where.keys()
            faults += [f"{tensor} is in two files, {name} among them" for tensor in sorted(twice)]
            self._where |= dict.fromkeys(held, opened)
            self.size += sum(_bytes(opened.get_slice(tensor)) for tensor in held)
            if listed is not None:
                said = {tensor for tensor, file in listed.items() if file == name}
                faults += [
                    f"the index says that {tensor} is in {name}, which lacks it" for tensor in sorted(said - held)
                ]
                faults += [f"{name} holds {tensor}, and the index does not say so" for tensor in sorted(held - said)]
        stray = {file.name for file in folder.glob("model*.safetensors")} - set(names)
        faults += [f"{file} is in the folder, and not in the index" for file in sorted(stray)]
        self.names = sorted(self._where)

    def read(self, name: str) -> Tensor:
        """A tensor, by its name in the files."""
        return self._where[name].get_tensor(name)


def _index(file: Path, faults: list[str]) -> dict[str, str]:
    try:
        return indexed_files(file)
    except EBFTError as error:
        faults.append(str(error))
        return {}


def _bytes(part: Any) -> int:
    sizes = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}
    count = 1
    for size in part.get_shape():
        count *= size
    return count * sizes.get(part.get_dtype(), 1)


# --- masks --------------------------------------------------------------------------------------------------------


def _masks(folder: Path, faults: list[str]) -> dict[str, PackedMask] | None:
    try:
        return load_masks(folder / "masks.safetensors")
    except (OSError, ValueError) as error:
        faults.append(f"masks.safetensors cannot be read: {on_one_line(error)}")
        return None


def _read(source: Source, name: str) -> Tensor:
    return source.weights.read([name])[name]


def _matrices(model: PreTrainedModel) -> dict[str, Matrix]:
    """The prunable matrices of all blocks by their full names."""
    path, blocks = find_blocks(model)
    return {f"{path}.{i}.{m.name}": m for i, block in enumerate(blocks) for m in find_matrices(block)}


def _check_masks(found: Audit, model: Source, masks: dict[str, PackedMask], pattern: Pattern | None) -> None:
    """Zeros where the masks say so, masks for all that is pruned and for nothing else, and N:M."""
    matrices = _matrices(model.model)
    found.faults += [
        f"there is a mask for {name}, which is not pruned" for name in sorted(masks.keys() - matrices.keys())
    ]
    for name, matrix in matrices.items():
        weight, mask = _read(model, name), masks.get(name)
        if mask is None:
            found.faults.append(f"there is no mask for {name}")
            continue
        if mask.shape != weight.shape:
            found.faults.append(f"the mask of {name} has shape {tuple(mask.shape)}; expected {tuple(weight.shape)}")
            continue
        kept = mask.dense()
        found.layers[name] = 1 - mask.density()
        wrong = int(torch.count_nonzero(_bits(weight).masked_fill(kept, 0)))
        if wrong:
            found.faults.append(f"{name} has {wrong} weights that are not 0 where its mask prunes")
        if pattern is not None and not _is_pattern(matrix, kept, pattern):
            found.faults.append(f"the mask of {name} is not {pattern}")


def _is_pattern(matrix: Matrix, kept: Tensor, pattern: Pattern) -> bool:
    experts = matrix.by_expert(kept)
    sides = [experts, experts.mT] if pattern.transposable else [experts]
    return all(
        side.shape[-1] % pattern.group == 0
        and PackedMask.from_dense(side.contiguous()).is_nm(pattern.keep, pattern.group)
        for side in sides
    )


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers, so that -0 is not 0 and NaN is itself."""
    return tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


# --- against the dense model --------------------------------------------------------------------------------------


def _compare(
    found: Audit,
    model: Source,
    dense: Source,
    masks: dict[str, PackedMask],
    recovered: bool,
    structured: bool,
    uniform: bool,
    updated: bool,
) -> None:
    """Whatever the run had no business with is as it was, bit for bit (in the dtype of the output).

    Structured pruning may put something into biases of blocks, those among them that the dense model has not got; with
    uniform widths the parameters of blocks have other shapes, and are not compared.

    Args:
        recovered: blocks were tuned.
        structured: heads and channels were pruned.
        uniform: they were cut away.
        updated: the criterion changed kept weights.
    """
    path, blocks = find_blocks(model.model)
    tuned = {
        f"{path}.{i}.{name}"
        for i, block in enumerate(blocks)
        for name, _ in block.named_parameters()
        if (recovered and name.rpartition(".")[0] not in router_paths(block)) or (structured and name.endswith(".bias"))
    }
    tuned |= set(masks) if updated else set()
    inside = {f"{path}.{i}.{name}" for i, block in enumerate(blocks) for name, _ in block.named_parameters()}
    if uniform:
        found.notes.append("blocks are narrower than the dense model's: what is outside of them was compared")
    theirs = {name: tuple(p.shape) for name, p in dense.model.named_parameters()}
    for name, parameter in model.model.named_parameters():
        if structured and name in tuned and name not in theirs:
            continue
        if uniform and name in inside and name in theirs:
            continue
        if theirs.get(name) != tuple(parameter.shape):
            raise EBFTError(
                f"--against has {theirs.get(name, 'nothing')} for {name}; expected {tuple(parameter.shape)}, as the "
                "output has"
            )
        if name in tuned:
            continue
        ours, before = _read(model, name), _read(dense, name)
        before = before.to(ours.dtype)
        if name in masks and masks[name].shape == before.shape:
            before = masks[name].zero_pruned_(before.clone())
        if not torch.equal(_bits(ours), _bits(before)):
            found.faults.append(f"{name} is not what it was, and nothing should have changed it")
