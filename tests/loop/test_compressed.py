"""Compressed models: what is stored, what is loaded, and that it speaks as the dense-stored one does."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import ebft
from ebft.compress import main
from ebft.compressed.layers import compress_model, load_compressed, save_compressed
from ebft.data.calibration import builtin_documents
from ebft.errors import EBFTError
from ebft.model.matrices import find_matrices
from ebft_kernels import CompressedLinear, PackedMask

DENSITY = 0.3


@pytest.fixture(scope="module")
def pruned(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained Llama, 70 % of every block matrix pruned by magnitude, stored in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.bfloat16)
    for block in model.model.layers:
        for matrix in find_matrices(block):
            weight = block.get_parameter(matrix.name).data
            PackedMask.from_topk(weight.abs(), round(DENSITY * weight.shape[1])).zero_pruned_(weight)
    folder = tmp_path_factory.mktemp("pruned") / "model"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(trained).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compressed(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compressed") / "model"
    assert main([str(pruned), str(folder)]) == 0
    return folder


def test_the_folder_holds_bits_and_survivors_and_no_dense_weight(pruned, compressed):
    stored, dense = load_file(compressed / "model.safetensors"), load_file(pruned / "model.safetensors")
    config = json.loads((compressed / "config.json").read_text())
    index = config.pop("quantization_config")
    assert (index["quant_method"], index["format"]) == ("ebft", 2)
    assert len(index["layers"]) == 3 * 7
    assert stored.pop("model.layers.0.mlp.down_proj.weight").shape == (1,)  # the marker
    for name in index["layers"]:
        weight = dense.pop(f"{name}.weight")
        words, values = stored.pop(f"{name}.bitmap"), stored.pop(f"{name}.values")
        assert torch.equal(PackedMask(words, weight.shape).dense(), weight != 0)
        assert torch.equal(values, weight[weight != 0])
    assert stored.keys() == dense.keys()  # embeddings and norms, untouched
    assert all(torch.equal(stored[name], dense[name]) for name in stored)
    assert config.pop("transformers_weights").startswith("compressed by ebft")
    assert config == json.loads((pruned / "config.json").read_text())
    assert "ebft.to_dense(model)" in (compressed / "README.md").read_text()


def test_bytes_fall_with_the_density(pruned, compressed):
    model = load_compressed(compressed)
    layers = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    dense = sum(2 * layer.in_features * layer.out_features for layer in layers)
    kept = sum(layer.values.numel() for layer in layers) * 2
    offsets = sum(layer.row_offsets.nbytes for layer in layers)  # 8 a row: much in a model as narrow as this one
    assert sum(layer.nbytes() for layer in layers) == kept + dense // 16 + offsets
    index = json.loads((compressed / "compressed.json").read_text())
    assert index["left"] == []
    assert (index["bytes"], index["dense_bytes"]) == (kept + dense // 16 + offsets, dense)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (compressed, pruned)]
    assert abs((sizes[1] - sizes[0]) - (dense - kept - dense // 16)) < 8192  # all but the headers


def test_greedy_generation_gives_the_same_tokens(pruned, compressed):
    """But where the two best logits are nearer than the rounding of bfloat16 decides."""
    tokenizer = AutoTokenizer.from_pretrained(compressed)
    dense, small = AutoModelForCausalLM.from_pretrained(pruned, dtype="auto"), load_compressed(compressed)
    assert small.dtype == dense.dtype == torch.bfloat16
    same = 0
    for text in builtin_documents("evaluation")[:6]:
        prompt = tokenizer(text[:200], return_tensors="pt")
        length = prompt["input_ids"].shape[1]
        ours, theirs = (m.generate(**prompt, max_new_tokens=32, do_sample=False)[0] for m in (small, dense))
        apart = (ours != theirs).nonzero() if ours.shape == theirs.shape else torch.tensor([[length]])
        if not len(apart):
            same += len(ours) - length
            continue
        first = int(apart[0])
        same += first - length
        with torch.no_grad():
            ours_logits, theirs_logits = (m(theirs[None, :first]).logits[0, -1].float() for m in (small, dense))
        best, second = theirs_logits.topk(2).values
        assert best - second <= 2 * (ours_logits - theirs_logits).abs().max()
    assert same >= 32  # and the texts do not fall apart at once


def test_the_error_of_the_logits_is_that_of_the_dtype(pruned, compressed):
    ids = torch.arange(40)[None] % 500
    exact = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float64)
    dense, small = AutoModelForCausalLM.from_pretrained(pruned, dtype="auto"), load_compressed(compressed)
    with torch.no_grad():
        truth = exact(ids[:, :12]).logits
        errors = [(m(ids[:, :12]).logits.double() - truth).square().mean().sqrt() for m in (small, dense)]
    assert errors[0] <= 1.25 * errors[1]


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt-neox", "qwen3-moe"])
def test_other_families(family, tmp_path, tokenizer):
    """Biases, Conv1D layers (stored the other way round), experts (left as they are): the same logits."""
    model = random_model(family)
    for block in ebft.model.decoder.find_blocks(model)[1]:
        for matrix in find_matrices(block):
            weight = block.get_parameter(matrix.name).data
            weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    saved = save_compressed(str(tmp_path / "dense"), str(tmp_path / "small"))
    assert saved["layers"]
    small = load_compressed(tmp_path / "small")
    assert sum(isinstance(module, CompressedLinear) for module in small.modules()) == len(saved["layers"])
    ids = torch.arange(24)[None]
    with torch.no_grad():
        torch.testing.assert_close(small(ids[:, :12]).logits, model(ids[:, :12]).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(small(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_eight_bit_survivors(pruned, tmp_path):
    saved = save_compressed(str(pruned), str(tmp_path / "int8"), values="int8")
    small, dense = load_compressed(tmp_path / "int8"), AutoModelForCausalLM.from_pretrained(pruned, dtype="auto")
    assert saved["bytes"] < 0.35 * saved["dense_bytes"]  # 0.15 of codes, 1/16 of bits; scales and offsets of short rows
    ids = torch.arange(12)[None]
    with torch.no_grad():
        ours, theirs = small(ids).logits.float(), dense(ids).logits.float()
    assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_in_place_and_back(pruned):
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype="auto")
    before = {name: p.clone() for name, p in model.named_parameters()}
    for name in compress_model(model):
        linear = model.get_submodule(name).to_linear()
        assert torch.equal(linear.weight, before[f"{name}.weight"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no-such-model", "{out}"], "model no-such-model"),
        (["{model}", "{model}"], "holds no compressed.json"),
    ],
)
def test_bad_input_gets_one_sentence(pruned, tmp_path, capsys, arguments, says):
    places = {"model": str(pruned), "out": str(tmp_path / "out")}
    assert main([argument.format(**places) for argument in arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("ebft: ")
    assert says in said
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_none_or_torn(pruned, compressed, tmp_path):
    with pytest.raises(EBFTError, match="is no compressed model"):
        load_compressed(pruned)
    torn = tmp_path / "torn"
    torn.mkdir()
    for file in compressed.iterdir():
        if file.suffix == ".json":
            (torn / file.name).write_bytes(file.read_bytes())
    with pytest.raises(EBFTError, match=r"config\.json has more layers than there are tensors in"):
        load_compressed(torn)


def _of_index(change):
    """Damage to the index in ``config.json``: a function of what it holds."""

    def damage(folder):
        config = json.loads((folder / CONFIG).read_text())
        config["quantization_config"] = change(config["quantization_config"]) or config["quantization_config"]
        (folder / CONFIG).write_text(json.dumps(config))

    return damage


def _of_layer(**changes):
    """Damage to the first layer that it lists; a change to None takes the field away."""

    def change(index):
        layer = index["layers"][FIRST.replace("\\", "")]
        layer |= changes
        for field in [field for field, value in layer.items() if value is None]:
            del layer[field]

    return _of_index(change)


def _of_tensors(change):
    """Damage to the tensors of the file: a function of the first layer's name and the dict of all."""

    def damage(folder):
        name = FIRST.replace("\\", "")
        tensors = load_file(folder / WEIGHTS)
        change(name, tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)

    return damage


def _of_tensor(part, change):
    return _of_tensors(lambda name, tensors: tensors.update({f"{name}.{part}": change(tensors[f"{name}.{part}"])}))


def _of_file(name, content):
    """A file with other bytes: a function of its own."""
    return lambda folder: (folder / name).write_bytes(content((folder / name).read_bytes()))


def _with(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[1] = value
    return tensor


CONFIG, WEIGHTS = "config.json", "model.safetensors"
FIRST = r"model\.layers\.0\.self_attn\.q_proj"
DAMAGES = {
    "no index": (_of_index(lambda index: {"none": 1}), "is no compressed model: its config.json has no quantization"),
    "of another method": (_of_index(lambda index: index | {"quant_method": "awq"}), "is no compressed model"),
    "an index that is a list": (_of_index(lambda index: [index]), "is no compressed model"),
    "a configuration of brackets": (_of_file(CONFIG, lambda old: b"[" * 100_000), "is no compressed model"),
    "a configuration that is not text": (_of_file(CONFIG, lambda old: b"\xff\xfe" + old), "is no compressed model"),
    "another version": (_of_index(lambda index: index | {"format": 1}), "a compressed model of format 1; expected 2"),
    "no version": (_of_index(lambda index: index | {"format": None}), "a compressed model of format None; expected 2"),
    "no layers": (_of_index(lambda index: index.pop("layers") and None), "its layers are not an object of objects"),
    "layers as a list": (_of_index(lambda index: index | {"layers": [1]}), "its layers are not an object of objects"),
    "a layer as a number": (
        _of_index(lambda index: index | {"layers": {"a": 1}}),
        "layers are not an object of objects",
    ),
    "a layer less": (
        _of_index(lambda index: index["layers"].pop(FIRST.replace("\\", "")) and None),
        f"does not fit its config.json: {FIRST}.weight is missing",
    ),
    "a layer that is none": (
        _of_index(lambda index: index["layers"].update({"model.norm": next(iter(index["layers"].values()))})),
        "the model has no linear layer model.norm",
    ),
    "heads of nobody": (
        _of_index(lambda index: index | {"heads": {"model.layers.9": {"num_heads": 2}}}),
        "the model has no model.layers.9 with num_heads",
    ),
    "heads in words": (
        _of_index(lambda index: index | {"heads": {"model.layers.0.self_attn": {"num_heads": "two"}}}),
        "is told num_heads = 'two'",
    ),
    "a missing field": (_of_layer(kept=None), f"kept of {FIRST} is None; expected int"),
    "a number in words": (_of_layer(in_features="64"), f"in_features of {FIRST} is '64'; expected int"),
    "a fraction": (_of_layer(kept=1.5), f"kept of {FIRST} is 1.5; expected int"),
    "a bias that is a number": (_of_layer(bias=1), f"bias of {FIRST} is 1; expected bool"),
    "unknown values": (_of_layer(values="float64"), f"values of {FIRST} are 'float64'; expected dense, float32"),
    "an input less": (_of_layer(in_features=47), r"its layers do not fit each other .*got x \(1, 2, 48\)"),
    "two inputs less": (_of_layer(in_features=46), f"{FIRST}: .*bits set past the end of a row of 46"),
    "an input more": (_of_layer(in_features=49), r"has \(49, 48\) inputs and outputs; expected at most \(48, 48\)"),
    "an output less": (_of_layer(out_features=47), r"q_proj.bitmap is I32 \(48, 2\); expected int32 \(47, 2\)"),
    "a size of 10^18": (_of_layer(out_features=10**18), "expected at most"),
    "a size below 0": (_of_layer(in_features=-64), "expected at most"),
    "more kept than there are": (_of_layer(kept=48 * 48 + 1), f"{FIRST}: CompressedLinear got 2305 kept"),
    "fewer kept": (_of_layer(kept=3), rf"{FIRST}.values is BF16 .*; expected bfloat16 \(3,\)"),
    "other values": (_of_layer(values="float16"), f"{FIRST}.values is BF16 .*; expected float16"),
    "a bias that is not stored": (_of_layer(bias=True), f"does not fit its config.json: {FIRST}.bias is missing"),
    "codes without scales": (_of_layer(values="int8"), f"{FIRST}.scales is missing"),
    "a torn file": (_of_file(WEIGHTS, lambda old: old[: len(old) // 2]), "model.safetensors cannot be read"),
    "an empty file": (_of_file(WEIGHTS, lambda old: b""), "model.safetensors cannot be read"),
    "a header of nothing": (_of_file(WEIGHTS, lambda old: b"\xff" * 64), "model.safetensors cannot be read"),
    "a folder for a file": (
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()),
        "has more layers ",
    ),
    "a pickle for a file": (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), "has more layers "),
    "a missing tensor": (
        _of_tensors(lambda name, tensors: tensors.pop(f"{name}.values")),
        f"{FIRST}.values is missing",
    ),
    "a tensor more": (
        _of_tensors(lambda name, tensors: tensors.update({f"{name}.weight": torch.ones(48, 48)})),
        f"does not fit its config.json: {FIRST}.weight is not expected",
    ),
    "values in float64": (_of_tensor("values", lambda t: t.double()), f"{FIRST}.values is F64"),
    "a norm in float64": (
        _of_tensors(lambda name, tensors: tensors.update({"model.norm.weight": torch.ones(48).double()})),
        "model.norm.weight is F64",
    ),
    "a NaN": (_of_tensor("values", lambda t: _with(t, float("nan"))), f"{FIRST}.values holds NaN or infinity"),
    "an infinite norm": (
        _of_tensors(lambda name, tensors: tensors["model.norm.weight"].view(-1).__setitem__(1, float("inf"))),
        "model.norm.weight holds NaN or infinity",
    ),
    "a value less": (_of_tensor("values", lambda t: t[1:]), f"{FIRST}.values is BF16"),
    "a bit less": (
        _of_tensor("bitmap", lambda t: torch.where(t == t.view(-1)[0], 0, t)),
        f"{FIRST}: CompressedLinear got .* values for a mask that keeps",
    ),
    "a bitmap of another width": (_of_tensor("bitmap", lambda t: t[:, :1]), rf"{FIRST}.bitmap is I32 \(48, 1\)"),
    "a bitmap in int64": (_of_tensor("bitmap", lambda t: t.long()), f"{FIRST}.bitmap is I64"),
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), "is no compressed model: .*No such file"),
    "a configuration that is not JSON": (_of_file(CONFIG, lambda old: old[:-9]), "is no compressed model"),
    "another configuration": (
        _of_file(CONFIG, lambda old: old.replace(b'"vocab_size": ', b'"vocab_size": 1')),
        r"is BF16 \(512, 48\); expected .* \(1512, 48\)",
    ),
    "thousands of layers": (
        _of_file(CONFIG, lambda old: old.replace(b'"num_hidden_layers": 3', b'"num_hidden_layers": 4000')),
        "has more layers than there are tensors",
    ),
    "generation settings that are not JSON": (
        lambda folder: (folder / "generation_config.json").write_text("{"),
        "generation_config.json",
    ),
}


@pytest.fixture(scope="module")
def sound(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed Llama of 3 blocks with random weights in bfloat16, every other input pruned, which loads."""
    model = random_model("llama-gqa", hidden_size=48).bfloat16()
    for block in model.model.layers:
        for matrix in find_matrices(block):
            block.get_parameter(matrix.name).data[:, 1::2] = 0
    folder = tmp_path_factory.mktemp("sound")
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    save_compressed(str(folder / "dense"), str(folder / "model"))
    load_compressed(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_gets_one_sentence(sound, tmp_path, damage):
    """That names the folder and what is wrong."""
    folder = tmp_path / "damaged"
    shutil.copytree(sound, folder)
    do, says = DAMAGES[damage]
    do(folder)
    with pytest.raises(EBFTError, match=says) as error:
        load_compressed(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_an_eight_bit_folder_with_other_scales(sound, tmp_path):
    folder = tmp_path / "int8"
    save_compressed(str(sound.parent / "dense"), str(folder), values="int8")
    load_compressed(folder)
    _of_tensor("scales", lambda t: _with(t, float("inf")))(folder)
    with pytest.raises(EBFTError, match=f"{FIRST}.scales holds NaN or infinity"):
        load_compressed(folder)
    _of_tensor("scales", lambda t: torch.ones_like(t, dtype=torch.float16))(folder)
    with pytest.raises(EBFTError, match=f"{FIRST}.scales is F16"):
        load_compressed(folder)
