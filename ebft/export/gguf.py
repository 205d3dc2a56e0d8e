"""GGUF, the format of llama.cpp: metadata, vocabulary, and tensors as floats or in blocks of 32 that share a scale.

Zeros stay exactly zero in each of these types. llama.cpp multiplies them as it does other weights: the file of a pruned
model is as large, and as fast, as that of a dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType, get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES
from gguf.quants import quant_shape_to_byte_shape, quantize
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ebft.errors import EBFTError
from ebft.export.source import load_dense, written
from ebft.export.vocabulary import add_vocabulary

# model_type -> what llama.cpp calls it; the first two share their code there.
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
_OWN = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def export_gguf(source: str, output: str | Path, *, values: str | None = None, overwrite: bool = False) -> Path:
    """Write a GGUF file of a model: dense, with the zeros in it.

    Args:
        source: folder of a run, compressed folder, or any model of ``FAMILIES``.
        output: the file.
        values: ``"f32"``, ``"f16"``, ``"bf16"``, ``"q8_0"`` or ``"q4_0"`` (embedding and head then ``"q8_0"``); by
            default as the model's weights are stored. Vectors are always float32.

    Raises:
        EBFTError: the family or its tokenizer has no form there that is known here, or the file cannot be written.
    """
    output = Path(output).expanduser()
    model, tokenizer = load_dense(source)
    kind = values or _OWN.get(model.dtype, "f32")
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        raise EBFTError(f"model {source} is {model.config.model_type}; expected one of {', '.join(FAMILIES)} for GGUF")
    with written(output, overwrite) as partial:
        writer = GGUFWriter(partial, family)
        _add_settings(writer, model, kind)
        add_vocabulary(writer, tokenizer, model.config)
        tensors = list(_tensors(model, family, kind))
        for name, shape, of_kind, _ in tensors:
            bytes_of = quant_shape_to_byte_shape(shape, of_kind)
            writer.add_tensor_info(name, bytes_of, np.dtype(np.uint8), int(np.prod(bytes_of)), of_kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, of_kind, values_of in tensors:  # one after another: none of them is held
            writer.write_tensor_data(quantize(values_of(), of_kind))
        writer.close()
    return output


def _add_settings(writer: GGUFWriter, model: PreTrainedModel, kind: str) -> None:
    config = model.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(str(config.name_or_path).rstrip("/").rpartition("/")[2] or config.model_type)
    writer.add_file_type(_TYPES[kind][1])
    writer.add_quantization_version(2)
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings  # of which llama.cpp knows none
    writer.add_context_length(min(window, config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] not in ("default", "llama3"):  # llama3: a tensor of its own
        raise EBFTError(f"rope_type {rope['rope_type']!r} is not written to GGUF; expected default, linear or llama3")


def _tensors(
    model: PreTrainedModel, family: str, kind: str
) -> Iterator[tuple[str, tuple[int, ...], GGMLQuantizationType, Callable[[], Any]]]:
    """Name, shape and type of each tensor of the file, and what gives its float32 values."""
    architecture = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family)
    names = get_tensor_name_map(architecture, model.config.num_hidden_layers)
    heads, groups = model.config.num_attention_heads, getattr(model.config, "num_key_value_heads", None)
    if model.config.rope_parameters["rope_type"] == "llama3":
        factors = _rope_factors(model)
        yield "rope_freqs.weight", tuple(factors.shape), GGMLQuantizationType.F32, factors.numpy
    for name, parameter in model.named_parameters():  # a tied head is not among them
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if called is None:
            raise EBFTError(f"{type(model).__name__} has {name}, which {family} of llama.cpp does not know")
        of_heads = {"q_proj": heads, "k_proj": groups or heads}.get(name.split(".")[-2]) if family == "llama" else None
        outside = called.startswith(("token_embd", "output"))
        of_kind = _type_of(parameter, "q8_0" if kind == "q4_0" and outside else kind)
        yield called, tuple(parameter.shape), of_kind, _reader(parameter, of_heads)


def _type_of(parameter: Tensor, kind: str) -> GGMLQuantizationType:
    """As asked for; a vector is float32, and rows that are no whole number of blocks are float16."""
    if parameter.ndim == 1:
        return GGMLQuantizationType.F32
    wanted = _TYPES[kind][0]
    return wanted if parameter.shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.F16


def _reader(parameter: Tensor, heads: int | None) -> Callable[[], Any]:
    """Gives float32 values; of a Llama's queries and keys in llama.cpp's order.

    transformers rotates place i of a head with place i + width / 2, llama.cpp place 2 i with place 2 i + 1.
    """

    def read() -> Any:
        tensor = parameter.detach().float()
        if heads is not None:
            halves = tensor.unflatten(0, (heads, 2, tensor.shape[0] // heads // 2))
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        return tensor.contiguous().numpy()

    return read


def _rope_factors(model: PreTrainedModel) -> Tensor:
    """By how much Llama 3 divides each frequency."""
    rope = model.config.rope_parameters
    width = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    return plain / scaled
