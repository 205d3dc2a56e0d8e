"""What makes a good folder hostile: a model's, a finished run's, or a compressed model's."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.attack.trap import Trap

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_NESTED = "[" * 100_000
_HEAD, _NORM, _EMBEDDINGS = "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"
_UP = "model.layers.0.mlp.up_proj.weight"


@dataclass(frozen=True)
class Hostile:
    """A change to a folder.

    Attributes:
        name: what is hostile.
        make: changes the folder.
        refused: whether it must be refused; otherwise it may also be taken for what it is without the hostile part.
    """

    name: str
    make: Callable[[Path, Trap], object]
    refused: bool = False


# --- code ---------------------------------------------------------------------------------------------------------


def _own_code(folder: Path, trap: Trap) -> None:
    _edit(folder / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text(trap.module)


def _own_kind(folder: Path, trap: Trap) -> None:
    _own_code(folder, trap)
    _edit(folder / "config.json", model_type="evil", architectures=["Model"])


def _own_tokenizer(folder: Path, trap: Trap) -> None:
    auto_map = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    _edit(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Tokenizer")
    (folder / "evil.py").write_text(trap.module)


def _own_generation(folder: Path, trap: Trap) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(trap.module)
    _edit(folder / "generation_config.json", custom_generate="./custom_generate", trust_remote_code=True)


def _chat_template(folder: Path, trap: Trap) -> None:
    _edit(folder / "tokenizer_config.json", chat_template=trap.template)
    (folder / "chat_template.jinja").write_text(trap.template)


def _pickle(folder: Path, trap: Trap) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(trap.pickled)


def _pickle_beside(folder: Path, trap: Trap) -> None:
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(trap.pickled)


def _pickled_adapter(folder: Path, trap: Trap) -> None:
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**adapter, "base_model_name_or_path": str(folder)}))
    (folder / "adapter_model.bin").write_bytes(trap.pickled)


def _torch_pickle(folder: Path, trap: Trap) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"weights": torch.zeros(1), "more": trap.object}, folder / "pytorch_model.bin")


def _kernel_of_the_hub(folder: Path, trap: Trap) -> None:
    _edit(folder / "config.json", attn_implementation="evil/kernel:attention", _attn_implementation="evil/kernel")


CODE = (
    Hostile("auto_map and a module", _own_code),
    Hostile("an unknown kind of model and a module", _own_kind, refused=True),
    Hostile("a tokenizer of its own", _own_tokenizer),
    Hostile("a generate of its own", _own_generation),
    Hostile("a chat template that breaks out", _chat_template),
    Hostile("a pickle as weights", _pickle, refused=True),
    Hostile("a pickle in a torch archive as weights", _torch_pickle, refused=True),
    Hostile("pickles beside the weights", _pickle_beside),
    Hostile("a pickle called safetensors", lambda f, trap: (f / WEIGHTS).write_bytes(trap.pickled), refused=True),
    Hostile("an adapter that is a pickle", _pickled_adapter),
    Hostile("attention from the hub", _kernel_of_the_hub),
)


# --- shards -------------------------------------------------------------------------------------------------------


def _leads_out(absolute: bool) -> Callable[[Path, Trap], None]:
    def make(folder: Path, trap: Trap) -> None:
        outside = folder.parent / "outside.safetensors"
        (folder / WEIGHTS).rename(outside)
        name = str(outside.absolute()) if absolute else f"../{outside.name}"
        _write_index(folder, dict.fromkeys(load_file(outside), name))

    return make


def _twice(folder: Path, trap: Trap) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file(tensors, folder / first, metadata={"format": "pt"})
    save_file({_UP: tensors[_UP] + 1, _HEAD: tensors[_HEAD]}, folder / second, metadata={"format": "pt"})
    _write_index(folder, {name: second if name == _HEAD else first for name in tensors})


def _instead(make: Callable[[Path], object], name: str = WEIGHTS) -> Callable[[Path, Trap], None]:
    """Something that is no file, in the place of one."""

    def replace(folder: Path, trap: Trap) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return replace


def _as_shard(make: Callable[[Path], object]) -> Callable[[Path, Trap], None]:
    def replace(folder: Path, trap: Trap) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).rename(folder / "first.safetensors")
        _write_index(folder, {n: "second.safetensors" if n == _HEAD else "first.safetensors" for n in tensors})
        make(folder / "second.safetensors")

    return replace


def _header(text: str, length: int | None = None) -> Callable[[Path, Trap], None]:
    def make(folder: Path, trap: Trap) -> None:
        header = text.encode()
        (folder / WEIGHTS).write_bytes(
            struct.pack("<Q", len(header) if length is None else length) + header + bytes(64)
        )

    return make


def _index(content: str) -> Callable[[Path, Trap], None]:
    def make(folder: Path, trap: Trap) -> None:
        (folder / WEIGHTS).rename(folder / "first.safetensors")
        (folder / INDEX).write_text(content)

    return make


def _truncated(folder: Path, trap: Trap) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


def _slot(shape: list[int], dtype: str = "F32", offsets: tuple[int, int] = (0, 64)) -> str:
    return json.dumps({_UP: {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


FILES = (
    Hostile("an index that leads out of the folder", _leads_out(absolute=False), refused=True),
    Hostile("an index with absolute paths", _leads_out(absolute=True), refused=True),
    Hostile("the same tensor in two shards", _twice, refused=True),
    Hostile("a fifo as weights", _instead(os.mkfifo), refused=True),
    Hostile("a fifo as a shard", _as_shard(os.mkfifo), refused=True),
    Hostile("an endless device as weights", _instead(lambda f: f.symlink_to("/dev/zero")), refused=True),
    Hostile("an endless device as a shard", _as_shard(lambda f: f.symlink_to("/dev/zero")), refused=True),
    Hostile("a folder as weights", _instead(Path.mkdir), refused=True),
    Hostile("a link to itself as weights", _instead(lambda f: f.symlink_to(f.name)), refused=True),
    Hostile("a shard that is missing", _as_shard(lambda f: None), refused=True),
    Hostile("empty weights", lambda f, trap: (f / WEIGHTS).write_bytes(b""), refused=True),
    Hostile("half of the weights", _truncated, refused=True),
    Hostile("a header of 2^63 bytes", _header("{}", 2**63), refused=True),
    Hostile("a header of 100,000 brackets", _header(_NESTED), refused=True),
    Hostile("a tensor of 10^18 numbers in 64 bytes", _header(_slot([10**9, 10**9])), refused=True),
    Hostile("sizes whose product overflows", _header(_slot([2**32, 2**32])), refused=True),
    Hostile("offsets beyond the file", _header(_slot([4, 4], offsets=(2**40, 2**40 + 64))), refused=True),
    Hostile("a dtype that there is not", _header(_slot([4, 4], dtype="F13")), refused=True),
    Hostile("an index of 100,000 brackets", _index(_NESTED), refused=True),
    Hostile("an index that is a list", _index("[]"), refused=True),
    Hostile("an index of numbers", _index(json.dumps({"metadata": {}, "weight_map": {_HEAD: 7}})), refused=True),
    Hostile("an index of nothing", _index(json.dumps({"metadata": {}, "weight_map": {}})), refused=True),
)


# --- numbers ------------------------------------------------------------------------------------------------------


def _value(tensor: str, value: float) -> Callable[[Path, Trap], None]:
    def make(folder: Path, trap: Trap) -> None:
        tensors = load_file(folder / WEIGHTS)
        tensors[tensor].view(-1)[7] = value
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return make


def _more(**shapes: tuple[int, ...]) -> Callable[[Path, Trap], None]:
    def make(folder: Path, trap: Trap) -> None:
        extra = {name.replace("__", "."): torch.ones(shape) for name, shape in shapes.items()}
        save_file({**load_file(folder / WEIGHTS), **extra}, folder / WEIGHTS, metadata={"format": "pt"})

    return make


def _integers(folder: Path, trap: Trap) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({n: t.to(torch.int32) for n, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


NUMBERS = (
    Hostile("NaN in the head", _value(_HEAD, float("nan")), refused=True),
    Hostile("infinity in the final norm", _value(_NORM, float("inf")), refused=True),
    Hostile("NaN in a block", _value(_UP, float("nan")), refused=True),
    Hostile("NaN in the embeddings", _value(_EMBEDDINGS, float("nan")), refused=True),
    Hostile(
        "a bias that the model does not take", _more(model__layers__0__self_attn__o_proj__bias=(32,)), refused=True
    ),
    Hostile(
        "a layer that the model does not have", _more(model__layers__7__mlp__up_proj__weight=(48, 32)), refused=True
    ),
    Hostile("weights that are integers", _integers, refused=True),
)


def _config(**changes: Any) -> Callable[[Path, Trap], None]:
    return lambda folder, trap: _edit(folder / "config.json", **changes)


CONFIGURATIONS = (
    *(
        Hostile(f"{name} {value}", _config(**{name: value}), refused=True)
        for name, value in (
            ("hidden_size", 10**9),
            ("intermediate_size", 10**9),
            ("vocab_size", 10**9),
            ("num_hidden_layers", 10**5),
            ("num_attention_heads", 10**9),
            ("head_dim", 10**9),
            ("num_attention_heads", 0),
            ("num_key_value_heads", 3),
            ("head_dim", 7),
            ("hidden_size", -32),
            ("hidden_size", "32; import os"),
            ("num_hidden_layers", 0),
            ("vocab_size", 0),
            ("rope_parameters", "yes"),
            ("layer_types", ["full_attention"]),
            ("model_type", "../../evil"),
            ("quantization_config", {"quant_method": "evil"}),
        )
    ),
    Hostile(
        "a configuration of 100,000 brackets", lambda f, trap: (f / "config.json").write_text(_NESTED), refused=True
    ),
    Hostile("a configuration that is a list", lambda f, trap: (f / "config.json").write_text("[1]"), refused=True),
    Hostile("a configuration of nothing", lambda f, trap: (f / "config.json").write_bytes(b""), refused=True),
    Hostile("a fifo as the configuration", _instead(os.mkfifo, "config.json"), refused=True),
    Hostile("pad id 10^9", _config(pad_token_id=10**9)),
)

TOKENIZERS = (
    Hostile(
        "a tokenizer of 100,000 brackets", lambda f, trap: (f / "tokenizer.json").write_text(_NESTED), refused=True
    ),
    Hostile("a tokenizer of nothing", lambda f, trap: (f / "tokenizer.json").write_bytes(b""), refused=True),
    Hostile("a fifo as the tokenizer", _instead(os.mkfifo, "tokenizer.json"), refused=True),
)

MODELS = (*CODE, *FILES, *NUMBERS, *CONFIGURATIONS, *TOKENIZERS)


# --- finished outputs ---------------------------------------------------------------------------------------------


def _permission(folder: Path, trap: Trap) -> None:
    """The folder itself says that its code may run."""
    _own_code(folder, trap)
    _own_tokenizer(folder, trap)
    summary = json.loads((folder / "ebft_summary.json").read_text())
    summary["config"]["trust_remote_code"] = True
    (folder / "ebft_summary.json").write_text(json.dumps(summary))


def _summary(text: str) -> Callable[[Path, Trap], object]:
    return lambda folder, trap: (folder / "ebft_summary.json").write_text(text)


def _masks(make: Callable[[Path, Trap], object]) -> Callable[[Path, Trap], None]:
    def replace(folder: Path, trap: Trap) -> None:
        (folder / "masks.safetensors").unlink()
        make(folder / "masks.safetensors", trap)

    return replace


OUTPUTS = (
    *(hostile for hostile in (*CODE, *FILES) if hostile.name not in ("a chat template that breaks out",)),
    Hostile("a folder that gives itself leave to run code", _permission),
    Hostile("a summary of 100,000 brackets", _summary(_NESTED), refused=True),
    Hostile("a summary that is a list", _summary("[]"), refused=True),
    Hostile("a summary of a hostile configuration", _summary('{"config": {"pattern": "10:1"}}'), refused=True),
    Hostile("a pickle as masks", _masks(lambda f, trap: f.write_bytes(trap.pickled)), refused=True),
    Hostile("a fifo as masks", _masks(lambda f, trap: os.mkfifo(f)), refused=True),
    Hostile("no masks", _masks(lambda f, trap: None), refused=True),
    Hostile("NaN in a finished head", _value(_HEAD, float("nan")), refused=True),
)


# --- compressed models --------------------------------------------------------------------------------------------


def _layers(**changes: Any) -> Callable[[Path, Trap], None]:
    """The first layer is said to be another."""

    def make(folder: Path, trap: Trap) -> None:
        config = json.loads((folder / "config.json").read_text())
        first = next(iter(config["quantization_config"]["layers"].values()))
        first.update(changes)
        (folder / "config.json").write_text(json.dumps(config))

    return make


def _index(text: str) -> Callable[[Path, Trap], object]:
    """Another index of layers in the configuration."""

    def make(folder: Path, trap: Trap) -> None:
        config = json.loads((folder / "config.json").read_text())
        of_nothing = json.dumps(config | {"quantization_config": 0})
        (folder / "config.json").write_text(
            of_nothing.replace('"quantization_config": 0', f'"quantization_config": {text}')
        )

    return make


def _values(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path, Trap], None]:
    def make(folder: Path, trap: Trap) -> None:
        tensors = load_file(folder / WEIGHTS)
        name = min(name for name in tensors if name.endswith(".values"))
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return make


def _bitmap(folder: Path, trap: Trap) -> None:
    tensors = load_file(folder / WEIGHTS)
    for name in tensors:
        if name.endswith(".bitmap"):
            tensors[name].fill_(-1)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


_OURS = '{"quant_method": "ebft", "format": 2, '
_OF_PICKLES = {"a pickle as weights", "a pickle in a torch archive as weights", "a pickle called safetensors"}
COMPRESSED = (
    *(h for h in CODE if h.name in _OF_PICKLES | {"auto_map and a module", "pickles beside the weights"}),
    Hostile("a fifo as weights", _instead(os.mkfifo), refused=True),
    Hostile("empty weights", lambda f, trap: (f / WEIGHTS).write_bytes(b""), refused=True),
    Hostile("half of the weights", _truncated, refused=True),
    Hostile("a list of layers of 100,000 brackets", _index(_NESTED), refused=True),
    Hostile("a list of layers that is none", _index(_OURS + '"layers": []}'), refused=True),
    Hostile("no layers", _index(_OURS + '"heads": {}}'), refused=True),
    Hostile("a layer that is the model", _index(_OURS + '"layers": {"": {}}}'), refused=True),
    *(
        Hostile(f"a layer whose {name} is {value}", _layers(**{name: value}), refused=True)
        for name, value in (
            ("in_features", 31),
            ("in_features", 10**9),
            ("out_features", 2**62),
            ("kept", -1),
            ("kept", 10**18),
            ("values", "object"),
            ("bias", True),
        )
    ),
    Hostile("values that are fewer", _values(lambda t: t[:-1]), refused=True),
    Hostile("values of another dtype", _values(torch.Tensor.double), refused=True),
    Hostile("values that are NaN", _values(lambda t: t * float("nan")), refused=True),
    Hostile("a bitmap of more than is there", _bitmap, refused=True),
    Hostile("hidden_size 1000000000", _config(hidden_size=10**9), refused=True),
)


# --- helpers ------------------------------------------------------------------------------------------------------


def _edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **changes}))


def _write_index(folder: Path, where: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def copied(folder: Path, to: Path, hostile: Hostile, trap: Trap) -> Path:
    """A copy of a good folder, made hostile."""
    shutil.copytree(folder, to)
    hostile.make(to, trap)
    return to
