"""Sparse models that are small: block linears stored, and run, without their zeros.

A compressed folder is a Hugging Face folder whose safetensors hold, in place of ``X.weight``, ``X.bitmap`` (words),
``X.values`` (kept weights, row by row) and with 8-bit values ``X.scales`` (docs/layouts.md); ``compressed.json`` lists
the layers. Heads and MLP channels of which nothing is left are cut out first (``pruning/structured/narrow.py``): layers
then have widths of their own, and one without zeros is stored, and run, as an ordinary linear layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ebft.errors import EBFTError, first_line, on_one_line
from ebft.files import read_json
from ebft.model.blocks import find_blocks
from ebft.model.checkpoint import load_config, load_model, load_tokenizer
from ebft.model.matrices import find_matrices
from ebft.model.tensors import make_buffers_real
from ebft.output.folder import OutputFolder
from ebft.pruning.structured.narrow import HEAD_COUNTS, narrow_
from ebft_kernels import CompressedLinear

INDEX = "compressed.json"
FORMAT = 1
_GENERATION = "generation_config.json"
# What transformers raises over files whose contents make no sense.
_BUILDING_FAILS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError, ImportError)
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8, "I32": torch.int32}
_DTYPES |= {"I64": torch.int64, "BOOL": torch.bool}  # buffers
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_KINDS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "int8"}
_FIELDS = {"in_features": int, "out_features": int, "kept": int, "bias": bool, "values": str}


def compress_model(model: PreTrainedModel, values: str | None = None) -> dict[str, dict[str, Any]]:
    """Replace the linear layers inside the blocks of ``model`` by ``CompressedLinear`` ones, in place.

    One without zeros becomes, or stays, an ``nn.Linear``, unless ``values`` are given.

    Args:
        model: pruned: the zeros of its weights are what is left out.
        values: ``"fp32"``, ``"bf16"``, ``"fp16"`` or ``"int8"``; by default each weight's own dtype, which is lossless.

    Returns:
        layer name -> what ``compressed.json`` holds of it. Fused experts (3-D parameters) stay as they are.
    """
    path, blocks = find_blocks(model)
    layers: dict[str, dict[str, Any]] = {}
    for number, block in enumerate(blocks):
        for matrix in find_matrices(block):
            place, _, attribute = matrix.name.rpartition(".")
            layer = block.get_submodule(place)
            if attribute != "weight" or not isinstance(layer, nn.Linear | Conv1D):
                continue
            weight = layer.weight.detach().T.contiguous() if isinstance(layer, Conv1D) else layer.weight.detach()
            bias = None if layer.bias is None else layer.bias.detach()
            kept = weight != 0
            dense = values is None and bool(kept.all())
            small = _linear(weight, bias) if dense else CompressedLinear.from_weight(weight, kept, bias, values=values)
            _replace(block, place, small)
            layers[f"{path}.{number}.{place}"] = {
                "in_features": matrix.inputs,
                "out_features": matrix.outputs,
                "kept": int(kept.sum()),
                "bias": bias is not None,
                "values": "dense" if dense else str(small.values.dtype).removeprefix("torch."),
            }
    return layers


def save_compressed(source: str, output: str, *, values: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write the compressed form of a model folder (or hub id); gives what was saved.

    Returns:
        ``{"layers": …, "dense_bytes": …, "bytes": …}``: of the layers that were compressed, before and after.

    Raises:
        EBFTError: the model cannot be loaded, or the folder cannot be written.
    """
    folder = OutputFolder(output, overwrite=overwrite, made_by=INDEX)
    model, tokenizer = load_model(source), load_tokenizer(source)
    dense = {name: module.weight.nbytes for name, module in model.named_modules() if hasattr(module, "weight")}
    heads = narrow_(model)
    layers = compress_model(model, values)
    small = {name: model.get_submodule(name) for name in layers}
    stored = sum(m.nbytes() if isinstance(m, CompressedLinear) else m.weight.nbytes for m in small.values())
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # of tied weights the first alone
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name in own}
    summary = {"dense_bytes": sum(dense[name] for name in layers), "bytes": stored}
    with folder as out:
        out.save(lambda path: save_torch_state_dict(tensors, path))
        out.save(lambda path: (model.config.save_pretrained(path), tokenizer.save_pretrained(path)))
        if model.generation_config is not None:
            out.save(lambda path: model.generation_config.save_pretrained(path))
        out.write_json(INDEX, {"format": FORMAT, **summary, "layers": layers, "heads": heads})
        out.commit()
    return {"layers": layers, **summary}


def load_compressed(folder: str | Path) -> PreTrainedModel:
    """A Hugging Face model from a folder of ``save_compressed``; its block linears are ``CompressedLinear`` layers, or
    ordinary ones where nothing is left to leave out.

    Raises:
        EBFTError: the folder is none, or something in it is damaged; the sentence names the file.
    """
    folder = Path(folder).expanduser()
    layers, heads = _read_index(folder / INDEX)
    config = load_config(str(folder))
    files = [_Shard(file) for file in sorted(folder.glob("*.safetensors"))]
    stored = {name: shard for shard in files for name in shard.entries}
    twice = [name for shard in files for name in shard.entries if stored[name] is not shard]
    if twice:
        raise EBFTError(f"{folder} is damaged: {twice[0]} is in two of its files")
    if getattr(config.get_text_config(), "num_hidden_layers", 0) > len(stored):
        raise EBFTError(f"{folder / 'config.json'} has more layers than there are tensors in {folder}")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except _BUILDING_FAILS as error:
        raise EBFTError(f"{folder / 'config.json'} describes no model that can be built: {first_line(error)}") from None
    narrow = _put_layers(model, layers, folder / INDEX)
    _tell_heads(model, heads, folder / INDEX)
    make_buffers_real(model, but=CompressedLinear)
    expected = model.state_dict()
    torn = [name for name in expected if name not in stored and name.rpartition(".")[0] in layers]
    if torn:
        raise EBFTError(f"{folder} does not fit its {INDEX}: {torn[0]} is missing")
    for name, shard in stored.items():
        shard.check(name, expected.get(name), INDEX)
    try:
        model.load_state_dict({name: shard.tensor(name) for name, shard in stored.items()}, strict=False, assign=True)
    except RuntimeError as error:  # the parts of a layer do not fit together: torch says which layer in the last line
        raise EBFTError(f"{folder} is damaged: {str(error).splitlines()[-1].strip()}") from None
    model.tie_weights()
    lacking = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if lacking:
        raise EBFTError(f"{folder} does not fit its {INDEX}: {lacking[0]} is missing")
    if (folder / _GENERATION).is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except _BUILDING_FAILS as error:
            raise EBFTError(f"{folder / _GENERATION} cannot be read: {first_line(error)}") from None
    if narrow:
        _try_out(model.eval(), folder / INDEX)
    return model.eval()


def _read_index(file: Path) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, int]]]:
    """The layers and the numbers of heads that ``compressed.json`` lists, each of the right type."""
    try:
        index = read_json(file, str(file))
    except (OSError, ValueError) as error:
        raise EBFTError(f"{file.parent} is no compressed model: {on_one_line(error)}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        given = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise EBFTError(f"{file} has format {given!r}; expected {FORMAT}")
    layers: Any = index.get("layers")
    heads: Any = index.get("heads", {})
    for key, value in (("layers", layers), ("heads", heads)):
        if not isinstance(value, dict) or not all(isinstance(of_one, dict) for of_one in value.values()):
            raise EBFTError(f"{file} is damaged: its {key} are not an object of objects")
    for name, layer in layers.items():
        for field, kind in _FIELDS.items():
            if type(layer.get(field)) is not kind:
                raise EBFTError(
                    f"{file} is damaged: {field} of {name} is {layer.get(field)!r}; expected {kind.__name__}"
                )
        if layer["values"] not in ("dense", *_KINDS):
            raise EBFTError(
                f"{file} is damaged: values of {name} are {layer['values']!r}; expected dense, {', '.join(_KINDS)}"
            )
    for name, counts in heads.items():
        for count, number in counts.items():
            if count not in HEAD_COUNTS or type(number) is not int or number < 1:
                raise EBFTError(f"{file} is damaged: {name} is told {count} = {number!r}; expected a number of heads")
    return layers, heads


def _put_layers(model: PreTrainedModel, layers: dict[str, dict[str, Any]], file: Path) -> bool:
    """Layers without values, on the meta device, in place of the model's own. Are any smaller than those?"""
    narrow, modules = False, dict(model.named_modules())
    for name, layer in layers.items():
        own = modules.get(name)
        if not isinstance(own, nn.Linear | Conv1D):
            raise EBFTError(f"{file} is damaged: the model has no linear layer {name}")
        sizes, most = (layer["in_features"], layer["out_features"]), tuple(own.weight.shape)
        most = most if isinstance(own, Conv1D) else most[::-1]
        if not all(1 <= size <= limit for size, limit in zip(sizes, most, strict=True)):
            raise EBFTError(f"{file} is damaged: {name} has {sizes} inputs and outputs; expected at most {most}")
        narrow = narrow or sizes != most
        try:
            with torch.device("meta"):
                if layer["values"] == "dense":
                    _replace(model, name, nn.Linear(*sizes, layer["bias"]))
                else:
                    kind = _KINDS[layer["values"]]
                    _replace(model, name, CompressedLinear(*sizes, layer["kept"], layer["bias"], kind))
        except ValueError as error:
            raise EBFTError(f"{file} is damaged: {name}: {error}") from None
    return narrow


def _tell_heads(model: PreTrainedModel, heads: dict[str, dict[str, int]], file: Path) -> None:
    modules = dict(model.named_modules())
    for name, counts in heads.items():
        for count, number in counts.items():
            if type(getattr(modules.get(name), count, None)) is not int:
                raise EBFTError(f"{file} is damaged: the model has no {name} with {count}")
            setattr(modules[name], count, number)


def _try_out(model: PreTrainedModel, file: Path) -> None:
    """Widths that no configuration says may not fit each other: two tokens tell."""
    try:
        with torch.no_grad():
            model(torch.zeros(1, 2, dtype=torch.long))
    except (RuntimeError, ValueError, IndexError) as error:
        raise EBFTError(f"{file} is damaged: its layers do not fit each other ({first_line(error)})") from None


class _Shard:
    """A safetensors file: what its header says, and its tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise EBFTError(f"{path} is not a file")
        try:
            self._file = safe_open(path, framework="pt")
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise EBFTError(f"{path} cannot be read: {first_line(error)}") from None
        self.entries = {name: (entry.get_dtype(), tuple(entry.get_shape())) for name, entry in slices.items()}

    def check(self, name: str, wanted: Tensor | None, index: str) -> None:
        """What the header says of a tensor, against what the model takes under this name."""
        if wanted is None:
            raise EBFTError(f"{self.path} does not fit its {index}: {name} is not expected")
        kind, shape = self.entries[name]
        exactly = name.endswith((".values", ".scales")) or not wanted.is_floating_point()
        dtypes = (wanted.dtype,) if exactly else _FLOATS
        if _DTYPES.get(kind) not in dtypes or shape != tuple(wanted.shape):
            raise EBFTError(
                f"{self.path} is damaged: {name} is {kind} {shape}; expected "
                f"{' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)} {tuple(wanted.shape)}"
            )

    def tensor(self, name: str) -> Tensor:
        """A tensor of the file, every value of it a number."""
        tensor: Tensor = self._file.get_tensor(name)
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise EBFTError(f"{self.path} is damaged: {name} holds NaN or infinity")
        return tensor


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, module)
