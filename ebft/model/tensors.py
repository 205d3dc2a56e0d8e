"""Where a model's parameters come from: a model in memory, or safetensors shards, read when they are asked for.

A checkpoint's names and shapes are not always the module's (fused experts are stored one by one). How they are turned
into each other is transformers' knowledge, and its own converters do it here, a few tensors at a time.

Long, because the two sources are one interface, read side by side.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import mmap
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from ebft.errors import EBFTError
from ebft.files import checksum, ordinary

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Tensors:
    """Tensors by name in safetensors files, memory-mapped: ``tensors[name]`` is a view, read when it is touched.

    Args:
        zeros: shapes and dtypes of tensors that are in no file, and are 0.
    """

    def __init__(self, files: Iterable[Path], zeros: Mapping[str, Tensor] | None = None) -> None:
        self.files, self._zeros = list(files), dict(zeros or {})
        self._where: dict[str, Any] = {}
        for file in self.files:
            opened = safe_open(ordinary(file, str(file)), framework="pt")
            twice = self._where.keys() & set(opened.keys())
            if twice:
                raise EBFTError(f"{file} holds {min(twice)}, which another file of the same model holds too")
            self._where |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._zeros:
            return torch.zeros_like(self._zeros[name], device="cpu")
        return self._where[name].get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._where or name in self._zeros

    def leave_out(self, names: Iterable[str]) -> None:
        """From now on these are not there."""
        for name in names:
            del self._where[name]

    def let_go(self, names: Iterable[str]) -> None:
        """Take the pages of these out of this process's memory until they are touched again.

        The system keeps them cached as long as it likes; but pages of a mapped file that were once read stay resident,
        and in the end that is the whole checkpoint.
        """
        for name in names:
            if name in self._where:
                _drop_pages(self._where[name].get_tensor(name))

    def with_zeros(self, zeros: Mapping[str, Tensor]) -> Tensors:
        """The same and ``zeros``, which are in no file."""
        more = copy.copy(self)
        more._zeros = {**self._zeros, **zeros}
        return more

    def names(self) -> list[str]:
        """All names, layers and experts in the order of their numbers."""
        return sorted([*self._where, *self._zeros], key=dot_natural_key)

    def shapes(self) -> dict[str, Tensor]:
        """Every tensor without its values (on the meta device)."""
        return {name: torch.empty_like(self[name], device="meta") for name in self.names()}


def _drop_pages(tensor: Tensor) -> None:
    """Tell the system that the pages that lie wholly in a tensor of a mapped file are done with (Linux)."""
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    past = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if _LIBC is not None and past > first and _is_mapped(first, past):
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(past - first), mmap.MADV_DONTNEED)


def _is_mapped(first: int, past: int) -> bool:
    """Whether these addresses are a file's, whose pages can be had again."""
    with contextlib.suppress(OSError), Path("/proc/self/maps").open(encoding="utf-8") as maps:
        for line in maps:
            addresses, _, rest = line.partition(" ")
            start, stop = (int(address, 16) for address in addresses.split("-"))
            if start <= first and past <= stop:
                return "/" in rest
    return False


class Weights(Protocol):
    """A model's parameters by their names in the module, and under the checkpoint's names.

    Attributes:
        on_disk: they are read from files, so that reading ahead is worth it.
    """

    on_disk: bool

    def read(self, names: Iterable[str], tensors: Tensors | None = None) -> dict[str, Tensor]:
        """Copies of parameters, as stored; ``tensors``: from these, which ``as_stored`` made, and not the model's."""

    def as_stored(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters (whole blocks) under the checkpoint's names and in its shapes."""

    @property
    def fingerprint(self) -> str:
        """A digest of names, shapes, dtypes and all of the values."""


class ModelWeights:
    """The parameters of a model in memory; the checkpoint's names are the module's."""

    on_disk = False

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def read(self, names: Iterable[str], tensors: Tensors | None = None) -> dict[str, Tensor]:
        """Copies of the parameters; ``tensors``: as they were saved."""
        get = self._model.get_parameter if tensors is None else tensors.__getitem__
        return {name: get(name).detach().clone() for name in names}

    def as_stored(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same: its names are the module's."""
        return dict(named)

    @property
    def fingerprint(self) -> str:
        """Of the parameters and buffers as they are now."""
        digest = xxhash.xxh3_128()
        for name, tensor in (*self._model.named_parameters(), *self._model.named_buffers()):
            values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(values.numpy())
        return digest.hexdigest()


class NotStreamable(Exception):
    """Why a checkpoint has to be loaded whole."""


class Misshapen(NotStreamable):
    """What a checkpoint holds in another shape than the model's, so that it cannot be loaded in any way."""


class Lacking(Exception):
    """Names of parameters that a checkpoint lacks, and of all that it holds."""


class ShardedWeights:
    """The parameters of a model in safetensors files.

    Args:
        model: its skeleton on the meta device. Parameters take the dtypes of the files, persistent buffers their
            values.
        tensors: the files.

    Attributes:
        unused: names of tensors that the model does not take, and that it should not be without.
        on_part_read: called with the share of the files that ``fingerprint`` has read.

    Raises:
        EBFTError: weights are stored as integers.
        NotStreamable: names or shapes in the files are not the model's, and no converter makes them so both ways.
        Lacking: parameters are not in the files.
    """

    on_disk = True
    on_part_read: Callable[[float], object] = staticmethod(lambda share: None)

    def __init__(self, model: PreTrainedModel, tensors: Tensors) -> None:
        self._model, self._tensors = model, tensors
        self._made_by = _groups(model, tensors)
        used = {key for group in self._made_by.values() for key in group.keys}
        self.unused = meant_to_be_used(model, [name for name in tensors.names() if name not in used])
        self._check_shapes()
        self._share()
        self._check_converters()
        put(model, {name: self._shape(name) for name, _ in model.named_parameters()})
        persistent = {name: buffer for name, buffer in model.named_buffers() if name in self._made_by}
        for name, value in self.read(persistent).items():
            place, _, last = name.rpartition(".")
            model.get_submodule(place)._buffers[last] = value

    @property
    def tensors(self) -> Tensors:
        """The files, under the checkpoint's names."""
        return self._tensors

    def read(self, names: Iterable[str], tensors: Tensors | None = None) -> dict[str, Tensor]:
        """Copies of the parameters; ``tensors``: from blocks that were saved under the checkpoint's names."""
        found: dict[str, Tensor] = {}
        for name in names:
            if name not in found:
                group, source = self._made_by[name], self._tensors if tensors is None else tensors
                made = group.read(source, self._model)
                found |= {other: tensor.clone(memory_format=torch.contiguous_format) for other, tensor in made.items()}
                source.let_go(group.keys)
                found.setdefault(name, found[self._made_by[name].names[0]])  # a tied one, stored under its other name
        return {name: found[name] for name in names}

    def as_stored(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters (of whole blocks) under the checkpoint's names; ``EBFTError`` if they would not come back."""
        stored: dict[str, Tensor] = {}
        for group in {id(group): group for group in map(self._made_by.__getitem__, named)}.values():
            of_group = {name: named[name] for name in group.names}
            parts = {name: part.contiguous() for name, part in group.write(of_group, self._model).items()}
            if group.converter is not None:
                again = group.read(parts, self._model)
                if not all(torch.equal(again[name], tensor) for name, tensor in of_group.items()):
                    raise EBFTError(f"{group.names[0]} does not survive transformers' conversion to {group.keys[0]}")
            stored |= parts
        return stored

    @cached_property
    def fingerprint(self) -> str:
        """Of every byte of the files, read once. Their sizes and times would not do: a copy can keep both."""
        return checksum(self._tensors.files, self.on_part_read)

    # --- checks -------------------------------------------------------------------------------------------------

    def _shape(self, name: str) -> Tensor:
        group = self._made_by[name]
        return group.shapes.get(name, group.shapes[group.names[0]])

    def _check_shapes(self) -> None:
        wanted = self._model.state_dict()
        for name, group in self._made_by.items():
            shape = group.shapes[name]
            if shape.shape != wanted[name].shape:
                kind = Misshapen if group.converter is None else NotStreamable
                raise kind(f"{name} is stored as {tuple(shape.shape)}, not {tuple(wanted[name].shape)}")
            if wanted[name].is_floating_point():
                check_floats({name: shape})
            if wanted[name].is_floating_point() and shape.dtype not in _FLOATS:
                raise NotStreamable(f"{name} is stored as {shape.dtype}")

    def _share(self) -> None:
        """Tied parameters: read under whichever name is stored, and apart where two differ; then: is any missing?"""
        aliases: dict[int, list[str]] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(name)
        missing = []
        for names in aliases.values():
            stored = [name for name in names if name in self._made_by]
            if not stored:
                missing.append(names[0])
                continue
            first = self.read([stored[0]])[stored[0]] if len(stored) > 1 else None
            for name in names:
                if name not in self._made_by:
                    self._made_by[name] = self._made_by[stored[0]]
                elif first is not None and name != stored[0] and not torch.equal(self.read([name])[name], first):
                    place, _, last = name.rpartition(".")  # the configuration ties what the checkpoint does not
                    own = nn.Parameter(torch.empty_like(first, device="meta"), requires_grad=False)
                    self._model.get_submodule(place)._parameters[last] = own
        buffers = set(self._model.state_dict()) - {name for names in aliases.values() for name in names}
        missing += sorted(buffers - self._made_by.keys())
        ignorable = self._model._keys_to_ignore_on_load_missing or ()
        if missing and ignorable:
            raise NotStreamable(f"{missing[0]} is not stored, and has to be made")
        if missing:
            raise Lacking(missing, self._tensors.names())

    def _check_converters(self) -> None:
        """Whether what converters make turns back into what was read, in names and shapes."""
        stored = self._tensors.shapes()
        for group in {id(group): group for group in self._made_by.values() if group.converter is not None}.values():
            back = group.write(group.shapes, self._model)
            expected = {key: (stored[key].shape, stored[key].dtype) for key in group.keys}
            if {key: (part.shape, part.dtype) for key, part in back.items()} != expected:
                raise NotStreamable(f"transformers does not turn {group.names[0]} back into what is stored")


@dataclass
class _Group:
    """Tensors of the checkpoint, and the parameters or buffers that are made of them together.

    Attributes:
        keys: the checkpoint's names, in the order that the converter wants them in.
        patterns: what in the converter each of them matched.
        converter: None where the one tensor is the one parameter, under whatever name.
        target: the first of what is made.
        shapes: what is made, without values.
    """

    target: str
    converter: WeightConverter | None
    keys: list[str] = field(default_factory=list)
    patterns: list[str | None] = field(default_factory=list)
    shapes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return list(self.shapes)

    def read(self, tensors: Tensors | Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        if self.converter is None:
            return {self.target: tensors[self.keys[0]]}
        converter = copy.deepcopy(self.converter)
        for key, pattern in zip(self.keys, self.patterns, strict=True):
            converter.add_tensor(self.target, key, pattern, tensors[key])
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: part[0] if isinstance(part, list) else part for name, part in made.items()}

    def write(self, named: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        if self.converter is None:
            return {self.keys[0]: named[self.target]}
        return revert_weight_conversion(model, dict(named))


def _groups(model: PreTrainedModel, tensors: Tensors) -> dict[str, _Group]:
    """Which tensors of the checkpoint make which parameter or buffer of ``model``, by the names of the latter."""
    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    wanted = model.state_dict()
    groups: dict[str, _Group] = {}
    for key, name, pattern in renamed(model, tensors.names(), transforms):
        if name in wanted:
            converter = None if pattern is None else by_pattern[pattern]
            group = groups.setdefault(name, _Group(name, converter))
            group.keys.append(key)
            group.patterns.append(pattern)
    # What transformers notes when it loads a model, for the way back.
    model._weight_conversions = [transform for transform in transforms if transform.was_used()]
    shapes = tensors.shapes()
    for group in groups.values():
        if group.converter is None and len(group.keys) > 1:
            raise NotStreamable(f"{' and '.join(group.keys[:2])} both are {group.target}")
        group.shapes = group.read(shapes, model)
    made_by = {name: group for group in groups.values() for name in group.names}
    strange = made_by.keys() - wanted.keys()
    if strange:
        raise NotStreamable(f"transformers makes {min(strange)} of it, which the model does not have")
    return made_by


def renamed(
    model: PreTrainedModel, keys: Iterable[str], transforms: Sequence[WeightTransform] | None = None
) -> Iterator[tuple[str, str, str | None]]:
    """Names in a checkpoint, those in ``model`` that transformers makes of them, and what of a converter matched.

    Args:
        transforms: ``get_model_conversion_mapping(model)``.
    """
    transforms = get_model_conversion_mapping(model) if transforms is None else transforms
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    wanted = model.state_dict()
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
        if name not in wanted and key in wanted:  # a name that only looks as if it had to be changed
            name, pattern = key, None
        yield key, name, pattern


def check_floats(weights: Mapping[str, Tensor]) -> None:
    """``EBFTError`` if one of them holds integers or truth values, as those of a quantised model do."""
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise EBFTError(f"{name} is stored as {weight.dtype}; expected floating-point weights")


# What checkpoints of old versions hold, and models make themselves: tables of positions, and causal masks.
_MADE_ANEW = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.attn(\.attention)?\.(masked_)?bias$")


def meant_to_be_used(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Of names in a checkpoint that ``model`` has no parameter for, those that transformers would wonder at too.

    It lists for every architecture what may be ignored, such as the layers of multi-token prediction.
    """
    ignored = "|".join(f"({pattern})" for pattern in (*_MADE_ANEW, *(model._keys_to_ignore_on_load_unexpected or ())))
    buffers = {name for name, _ in model.named_buffers()}
    prefix = f"{model.base_model_prefix}."
    return [
        name for name in names if not any(re.search(ignored, said) or said in buffers for said in (name, prefix + name))
    ]


def put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make ``tensors`` the parameters of these names, in every place that shares them."""
    new = {
        id(module.get_parameter(name)): nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()
    }
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and id(parameter) in new:
                owner._parameters[name] = new[id(parameter)]


def make_buffers_real(model: PreTrainedModel, but: type[nn.Module] | tuple[()] = ()) -> None:
    """Give buffers that no checkpoint holds (rotary tables …) their values, as ``from_pretrained`` does.

    Args:
        model: on the meta device: weights that are there already would be made anew.
        but: modules whose buffers are somebody else's.

    Raises:
        EBFTError: the model's initialisation leaves a buffer as it is, so that nobody could know its values.
    """
    made: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set if not isinstance(module, but) else ():
            if (buffer := module._buffers[name]) is not None:
                made[f"{path}.{name}"] = module._buffers[name] = _poisoned(buffer)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        _initialise(model, model)
    for place, buffer in made.items():
        if buffer.numel() and buffer.dtype != torch.bool and torch.allclose(buffer, _poisoned(buffer), equal_nan=True):
            raise EBFTError(
                f"{place} has no values: it is in no file, and {type(model).__name__} does not initialise it; expected "
                "a model whose buffers transformers initialises"
            )


def _initialise(module: nn.Module, nearest: PreTrainedModel) -> None:
    """Every module as the ``nearest`` model around it initialises its own, those within before those around them."""
    nearest = module if isinstance(module, PreTrainedModel) else nearest
    for child in module.children():
        _initialise(child, nearest)
    nearest._init_weights(module)


def _poisoned(buffer: Tensor) -> Tensor:
    """A tensor of that shape on the host that shows where nothing was written: NaN, or the lowest integer."""
    tensor = torch.empty_like(buffer, device="cpu")
    if tensor.dtype == torch.bool:
        return tensor.zero_()
    floats = tensor.is_floating_point() or tensor.is_complex()
    return tensor.fill_(torch.nan if floats else torch.iinfo(tensor.dtype).min)
