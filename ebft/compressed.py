"""Sparse models that are small: block linears stored, and run, without their zeros.

A compressed folder is a Hugging Face folder whose safetensors hold, in place of ``X.weight``, ``X.bitmap`` (words),
``X.values`` (kept weights, row by row) and with 8-bit values ``X.scales`` (docs/layouts.md); ``compressed.json`` lists
the layers. Heads and MLP channels of which nothing is left are cut out first (``ebft/narrow.py``): layers then have
widths of their own, and one without zeros is stored, and run, as an ordinary linear layer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ebft.checkpoint import load_model, load_tokenizer
from ebft.decoder import find_blocks
from ebft.errors import EBFTError
from ebft.matrices import find_matrices
from ebft.narrow import HEAD_COUNTS, narrow_
from ebft.output import OutputFolder
from ebft.weights import make_buffers_real
from ebft_kernels import CompressedLinear

INDEX = "compressed.json"
FORMAT = 1


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
        EBFTError: the folder is none, or is torn.
    """
    folder = Path(folder).expanduser()
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise EBFTError(f"{folder} is no compressed model: {' '.join(str(error).split())}") from None
    if index.get("format") != FORMAT:
        raise EBFTError(f"{folder} is compressed in format {index.get('format')}; expected {FORMAT}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        for name, layer in index["layers"].items():
            kinds = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "int8"}
            sizes = (layer["in_features"], layer["out_features"])
            if layer["values"] == "dense":
                _replace(model, name, nn.Linear(*sizes, layer["bias"]))
            else:
                _replace(model, name, CompressedLinear(*sizes, layer["kept"], layer["bias"], kinds[layer["values"]]))
        for name, counts in index.get("heads", {}).items():
            for count in HEAD_COUNTS:
                if count in counts:
                    setattr(model.get_submodule(name), count, int(counts[count]))
    make_buffers_real(model, but=CompressedLinear)
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    _, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    lacking = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if lacking or unexpected:
        raise EBFTError(
            f"{folder} does not fit its {INDEX}: {(lacking or unexpected)[0]} is "
            f"{'missing' if lacking else 'not expected'}"
        )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


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
