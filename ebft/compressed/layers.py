"""Sparse models that are small: block linears stored, and run, without their zeros.

A compressed folder is a Hugging Face folder whose safetensors hold, in place of ``X.weight``, ``X.bitmap`` (words),
``X.values`` (kept weights, row by row) and with 8-bit values ``X.scales``; ``quantization_config`` in its config.json
lists the layers (docs/layouts.md), and transformers loads it once ``ebft`` is imported (``quantizer.py``). Heads and
MLP channels of which nothing is left are cut out first (``pruning/structured/narrow.py``): layers then have widths of
their own, and one without zeros is stored, and run, as an ordinary layer.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ebft.compressed.index import check_index, described, header, replace
from ebft.compressed.quantizer import FORMAT, METHOD, NOTE, CompressedConfig, CompressedQuantizer
from ebft.compressed.readers import read_by_others
from ebft.errors import EBFTError, on_one_line
from ebft.files import read_json
from ebft.model.blocks import find_blocks
from ebft.model.checkpoint import load_config, load_model, load_tokenizer
from ebft.model.libraries import by_libraries
from ebft.model.matrices import find_matrices
from ebft.model.sources import files_of
from ebft.output.card import compressed_card
from ebft.output.folder import OutputFolder
from ebft.pruning.structured.narrow import narrow_
from ebft_kernels import CompressedLinear

SUMMARY = "compressed.json"
M = TypeVar("M", bound=nn.Module)


def compress_model(
    model: PreTrainedModel, values: str | None = None, heads: dict[str, dict[str, int]] | None = None
) -> dict[str, dict[str, Any]]:
    """Replace the linear layers inside the blocks of ``model`` by ``CompressedLinear`` ones, in place.

    One without zeros stays as it is, unless ``values`` are given, and so does one whose weight another module reads.
    ``save_pretrained`` then writes a folder that loads again.

    Args:
        model: pruned: the zeros of its weights are what is left out.
        values: ``"fp32"``, ``"bf16"``, ``"fp16"`` or ``"int8"``; by default each weight's own dtype, which is lossless.
        heads: what ``narrow_`` has told its attention modules.

    Returns:
        layer name -> what the index holds of it. Fused experts (3-D parameters) stay as they are.

    Raises:
        EBFTError: the model is compressed or quantised already, or not a decoder.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise EBFTError(f"{type(model).__name__} is compressed or quantised already; expected float weights")
    path, blocks = find_blocks(model)
    read, layers = read_by_others(model), dict[str, dict[str, Any]]()
    for number, block in enumerate(blocks):
        for matrix in find_matrices(block):
            place, _, attribute = matrix.name.rpartition(".")
            layer, name = block.get_submodule(place), f"{path}.{number}.{place}"
            if attribute != "weight" or type(layer).forward not in (nn.Linear.forward, Conv1D.forward):
                continue
            weight = layer.weight.detach().T.contiguous() if isinstance(layer, Conv1D) else layer.weight.detach()
            kept = weight != 0
            if name not in read and not (values is None and bool(kept.all())):
                bias = None if layer.bias is None else layer.bias.detach()
                small = CompressedLinear.from_weight(weight, kept, bias, values=values)
                replace(block, place, small.train(layer.training))
            layers[name] = described(block.get_submodule(place))
    model.config.quantization_config = CompressedConfig(layers, heads)
    model.hf_quantizer = CompressedQuantizer(model.config.quantization_config)
    model.is_quantized, model.quantization_method = True, METHOD
    return layers


def to_dense(model: M) -> M:
    """Make a compressed model an ordinary one again, in place: its layers have weights, with the zeros in them.

    Whatever works on dense models works on it: merging adapters, other quantizers, ``save_pretrained``. 8-bit
    survivors keep the values that they were rounded to. A model from which heads or channels were cut out stays narrow,
    and what ``save_pretrained`` writes of it needs ``import ebft`` still.

    Args:
        model: a model of transformers, or peft's around it.

    Returns:
        the same model.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's, around it
    config = copy.deepcopy(inner.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        full = type(inner)(config)
    for name, module in list(inner.named_modules()):
        if isinstance(module, CompressedLinear):
            own = full.get_submodule(name.replace(".base_layer", ""))
            replace(inner, name, _ordinary(module, type(own), inner.dtype))
    shapes = {name: parameter.shape for name, parameter in full.named_parameters()}
    named = ((name.replace(".base_layer", ""), parameter.shape) for name, parameter in inner.named_parameters())
    narrow = any(shape != shapes.get(name, shape) for name, shape in named)
    quantizer = getattr(inner, "hf_quantizer", None)
    if quantizer is not None and not narrow:
        quantizer.remove_quantization_config(inner)
    return model


def save_compressed(source: str, output: str, *, values: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write the compressed form of a model folder (or hub id); gives what was saved.

    Returns:
        ``{"layers": …, "left": …, "dense_bytes": …, "bytes": …}``: the layers, as the index has them; names of those
        that have zeros and were left as they are, because other modules read their weights; bytes of all, before and
        after.

    Raises:
        EBFTError: the model cannot be loaded, or the folder cannot be written.
    """
    folder = OutputFolder(output, overwrite=overwrite, made_by=SUMMARY)
    model, tokenizer = load_model(source), load_tokenizer(source)
    dense = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    heads = narrow_(model)
    layers = compress_model(model, values, heads)
    small = [model.get_submodule(name) for name in layers]
    summary = {
        "dense_bytes": sum(dense[f"{name}.weight"] for name in layers),
        "bytes": sum(m.nbytes() if isinstance(m, CompressedLinear) else m.weight.nbytes for m in small),
    }
    left = [name for name, of in layers.items() if of["values"] == "dense" and of["kept"] < _places(of)]
    with folder as out:
        out.save(lambda path: (model.save_pretrained(path, max_shard_size="5GB"), tokenizer.save_pretrained(path)))
        config = json.loads((out.path / CONFIG_NAME).read_text(encoding="utf-8"))
        out.write_json(CONFIG_NAME, config | {"transformers_weights": NOTE})
        out.write_text("README.md", compressed_card(source, layers, summary))
        out.write_json(SUMMARY, {"format": FORMAT, "model": source, **summary, "left": left})
        out.commit()
    return {"layers": layers, "left": left, **summary}


def load_compressed(folder: str | Path) -> PreTrainedModel:
    """A Hugging Face model from a folder of ``save_compressed``, or of a compressed model's ``save_pretrained``.

    Its block linears are ``CompressedLinear`` layers, or ordinary ones where nothing is left to leave out. It is what
    ``AutoModelForCausalLM.from_pretrained(folder, dtype="auto")`` gives once ``ebft`` is imported, and refuses what
    that would only warn of.

    Raises:
        EBFTError: the folder is none, or something in it is damaged; the sentence names the file.
    """
    folder = Path(folder).expanduser()
    where = folder / CONFIG_NAME
    check_index(_index_of(folder), str(where))
    config = load_config(str(folder))
    files = files_of(str(folder), SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if getattr(config.get_text_config(), "num_hidden_layers", 0) > sum(len(header(file)) for file in files):
        raise EBFTError(f"{where} has more layers than there are tensors in {folder}")
    with by_libraries(str(folder), config):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    if (folder / GENERATION_CONFIG_NAME).is_file():  # which transformers passes over if it makes no sense
        with by_libraries(str(folder), what=f"{GENERATION_CONFIG_NAME} of"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    for kind, said_of_it in (("missing", "is missing"), ("unexpected", "is not expected")):
        if names := report[f"{kind}_keys"]:
            raise EBFTError(f"{folder} does not fit its {CONFIG_NAME}: {min(names)} {said_of_it}")
    return model.eval()


def is_compressed(source: str | Path) -> bool:
    """Whether ``source`` is a compressed folder, by its config.json."""
    try:
        return bool(_index_of(Path(source).expanduser()))
    except EBFTError:
        return False


def _index_of(folder: Path) -> dict[str, Any]:
    where = folder / CONFIG_NAME
    try:
        said = read_json(where, str(where))
    except (OSError, ValueError) as error:
        raise EBFTError(f"{folder} is no compressed model: {on_one_line(error)}") from None
    index = said.get("quantization_config") if isinstance(said, dict) else None
    if not isinstance(index, dict) or index.get("quant_method") != METHOD:
        raise EBFTError(f"{folder} is no compressed model: its {CONFIG_NAME} has no quantization_config of {METHOD}")
    return index


def _ordinary(layer: CompressedLinear, kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    """The layer with a weight, of the model's own kind: ``nn.Linear``, or ``Conv1D``, which is stored transposed."""
    linear = layer.to_linear().to(dtype)
    if not issubclass(kind, Conv1D):
        return linear
    with torch.device("meta"):
        transposed = Conv1D(layer.out_features, layer.in_features)
    transposed.weight = nn.Parameter(linear.weight.T.contiguous(), requires_grad=False)
    transposed.bias = linear.bias
    return transposed.train(layer.training)


def _places(layer: dict[str, Any]) -> int:
    return int(layer["in_features"] * layer["out_features"])
