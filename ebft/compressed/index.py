"""What a compressed model says of its layers, and its files of their tensors: checked before anything is allocated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ebft.compressed.quantizer import FORMAT
from ebft.errors import EBFTError, first_line
from ebft.files import ordinary
from ebft.model.tensors import renamed
from ebft.pruning.structured.narrow import HEAD_COUNTS
from ebft_kernels import CompressedLinear

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8, "I32": torch.int32}
_DTYPES |= {"I64": torch.int64, "BOOL": torch.bool}  # buffers
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_KINDS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "int8"}
_FIELDS = {"in_features": int, "out_features": int, "kept": int, "bias": bool, "values": str}


def described(layer: nn.Module) -> dict[str, Any]:
    """What the index holds of a ``CompressedLinear``, or of an ordinary layer (``"values": "dense"``)."""
    if isinstance(layer, CompressedLinear):
        sizes, kept, values = (layer.in_features, layer.out_features), layer.values.numel(), layer.values.dtype
        return _entry(sizes, kept, layer.bias is not None, str(values).removeprefix("torch."))
    weight: Any = layer.weight
    sizes = tuple(weight.shape) if isinstance(layer, Conv1D) else tuple(weight.shape[::-1])
    return _entry(sizes, int(weight.count_nonzero()), layer.bias is not None, "dense")


def _entry(sizes: tuple[int, ...], kept: int, bias: bool, values: str) -> dict[str, Any]:
    return {"in_features": sizes[0], "out_features": sizes[1], "kept": kept, "bias": bias, "values": values}


def marker(layers: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The name of a tensor of one number, where a dense model has a weight; None where no layer is compressed.

    Whatever loads the files without knowing of ``ebft`` finds that it does not fit, in place of leaving out what the
    model lacks.
    """
    first = min((name for name, layer in layers.items() if layer["values"] != "dense"), default=None)
    return None if first is None else f"{first}.weight"


def check_index(index: Mapping[str, Any], where: str) -> None:
    """``EBFTError`` if a format, layers or numbers of heads are not those of a compressed model.

    Args:
        where: how the error calls the file.
    """
    if index.get("format") != FORMAT:
        raise EBFTError(f"{where} has a compressed model of format {index.get('format')!r}; expected {FORMAT}")
    layers, heads = index.get("layers"), index.get("heads", {})
    for key, value in (("layers", layers), ("heads", heads)):
        if not isinstance(value, dict) or not all(isinstance(of_one, dict) for of_one in value.values()):
            raise EBFTError(f"{where} is damaged: its {key} are not an object of objects")
    for name, layer in (layers or {}).items():
        for field, kind in _FIELDS.items():
            if type(layer.get(field)) is not kind:
                raise EBFTError(
                    f"{where} is damaged: {field} of {name} is {layer.get(field)!r}; expected {kind.__name__}"
                )
        if layer["values"] not in ("dense", *_KINDS):
            raise EBFTError(
                f"{where} is damaged: values of {name} are {layer['values']!r}; expected dense, {', '.join(_KINDS)}"
            )
    for name, counts in (heads or {}).items():
        for count, number in counts.items():
            if count not in HEAD_COUNTS or type(number) is not int or number < 1:
                raise EBFTError(f"{where} is damaged: {name} is told {count} = {number!r}; expected a number of heads")


def put_layers(model: PreTrainedModel, layers: Mapping[str, Mapping[str, Any]], where: Path) -> bool:
    """Layers without values, on the meta device, in place of the model's own. Are any smaller than those?

    Survivors get the dtype of the model, as dense weights would, but for 8-bit codes.

    Raises:
        EBFTError: the model has no such layer, or a smaller one.
    """
    narrow, modules = False, dict(model.named_modules())
    for name, layer in layers.items():
        own = modules.get(name)
        if not isinstance(own, nn.Linear | Conv1D):
            raise EBFTError(f"{where} is damaged: the model has no linear layer {name}")
        sizes, most = (layer["in_features"], layer["out_features"]), tuple(own.weight.shape)
        most = most if isinstance(own, Conv1D) else most[::-1]
        if not all(1 <= size <= limit for size, limit in zip(sizes, most, strict=True)):
            raise EBFTError(f"{where} is damaged: {name} has {sizes} inputs and outputs; expected at most {most}")
        narrow = narrow or sizes != most
        if layer["values"] == "dense":
            if sizes != most:
                replace(model, name, _narrower(own, *sizes))
            continue
        wanted = str(own.weight.dtype).removeprefix("torch.")
        kind = layer["values"] if layer["values"] == "int8" or wanted not in _KINDS else wanted
        try:
            put = CompressedLinear(*sizes, layer["kept"], layer["bias"], _KINDS[kind], "meta", own.weight.dtype)
        except ValueError as error:
            raise EBFTError(f"{where} is damaged: {name}: {error}") from None
        # The model's own initialisation, which from_pretrained calls for what is not in the files, may look at it.
        stand_in = torch.empty(sizes[::-1], device="meta")
        stand_in._is_hf_initialized = True
        put.__dict__["weight"] = stand_in
        replace(model, name, put.train(own.training))
    return narrow


def _narrower(own: nn.Linear | Conv1D, inputs: int, outputs: int) -> nn.Module:
    bias, dtype = own.bias is not None, own.weight.dtype
    if isinstance(own, Conv1D):
        with torch.device("meta"):
            return Conv1D(outputs, inputs).to(dtype)
    return nn.Linear(inputs, outputs, bias, device="meta", dtype=dtype)


def replace(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``root`` has another of that name."""
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, module)


def tell_heads(model: PreTrainedModel, heads: Mapping[str, Mapping[str, int]], where: Path) -> None:
    """Tell attention modules how many heads they have left."""
    modules = dict(model.named_modules())
    for name, counts in heads.items():
        for count, number in counts.items():
            if type(getattr(modules.get(name), count, None)) is not int:
                raise EBFTError(f"{where} is damaged: the model has no {name} with {count}")
            setattr(modules[name], count, number)


def check_files(model: PreTrainedModel, files: Iterable[Path], layers: Mapping[str, Mapping[str, Any]]) -> None:
    """``EBFTError`` if the headers of safetensors files do not have what ``put_layers`` has made room for."""
    stored: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    files = list(files)
    for file in files:
        entries = header(file)
        for key, name, pattern in renamed(model, entries):
            if pattern is None:  # or else it is a part of a parameter, as an expert's matrix is
                stored[name] = (file, *entries[key])
    folder, expected = files[0].parent, model.state_dict()
    for name, layer in layers.items():
        for part in ("bitmap", "values", *(["scales"] if layer["values"] == "int8" else []), "bias"):
            full = f"{name}.{part}"
            if layer["values"] != "dense" and full in expected and full not in stored:
                raise EBFTError(f"{folder} does not fit its config.json: {full} is missing")
    for name, (file, dtype, shape) in stored.items():
        wanted = expected.get(name)
        if wanted is None:
            continue  # transformers says of it that it has no use for it
        layer_name, _, part = name.rpartition(".")
        dtypes: tuple[torch.dtype | None, ...] = _FLOATS if wanted.is_floating_point() else (wanted.dtype,)
        if part == "values" and layer_name in layers:
            dtypes = (getattr(torch, layers[layer_name]["values"]),)
        elif part == "scales" and layer_name in layers:
            dtypes = (torch.float32,)
        if _DTYPES.get(dtype) not in dtypes or shape != tuple(wanted.shape):
            raise EBFTError(
                f"{file} is damaged: {name} is {dtype} {shape}; expected "
                f"{' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)} {tuple(wanted.shape)}"
            )


def header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype (as safetensors writes it) and shape, of the tensors of a file."""
    if file.suffix != ".safetensors":
        raise EBFTError(f"{file} is no safetensors file, in which alone a compressed model is stored")
    try:
        with safe_open(ordinary(file, str(file)), framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: (entry.get_dtype(), tuple(entry.get_shape())) for name, entry in slices.items()}
    except (OSError, SafetensorError) as error:
        raise EBFTError(f"{file} cannot be read: {first_line(error)}") from None


def check_loaded(model: PreTrainedModel, folder: Path) -> None:
    """Finish what ``put_layers`` began; ``EBFTError`` if a bitmap does not fit its values, or a value is no number."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise EBFTError(f"{folder} is damaged: {name} holds NaN or infinity")
    for name, layer in model.named_modules():
        if isinstance(layer, CompressedLinear) and not layer.bitmap.is_meta:
            layer.__dict__.pop("weight", None)
            try:
                layer.index_()
            except ValueError as error:
                raise EBFTError(f"{folder} is damaged: {name}: {error}") from None


def try_out(model: PreTrainedModel, where: Path) -> None:
    """Widths that no configuration says may not fit each other: two tokens tell."""
    try:
        with torch.no_grad():
            model(torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    except (RuntimeError, ValueError, IndexError) as error:
        raise EBFTError(f"{where} is damaged: its layers do not fit each other ({first_line(error)})") from None


def name_pattern(name: str) -> str:
    """As transformers takes names that may be ignored."""
    return f"^{re.escape(name)}$"
