"""Compressed models: what is stored, what is loaded, and that it speaks as the dense-stored one does."""

import json
from pathlib import Path

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import ebft
from ebft.data.calibration import builtin_documents
from ebft.compress import main
from ebft.compressed.layers import compress_model, load_compressed, save_compressed
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
    index = json.loads((compressed / "compressed.json").read_text())
    assert index["format"] == 1
    assert len(index["layers"]) == 3 * 7
    for name in index["layers"]:
        weight = dense.pop(f"{name}.weight")
        words, values = stored.pop(f"{name}.bitmap"), stored.pop(f"{name}.values")
        assert torch.equal(PackedMask(words, weight.shape).dense(), weight != 0)
        assert torch.equal(values, weight[weight != 0])
    assert stored.keys() == dense.keys()  # embeddings and norms, untouched
    assert all(torch.equal(stored[name], dense[name]) for name in stored)
    assert json.loads((compressed / "config.json").read_text()) == json.loads((pruned / "config.json").read_text())


def test_bytes_fall_with_the_density(pruned, compressed):
    model = load_compressed(compressed)
    layers = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    dense = sum(2 * layer.in_features * layer.out_features for layer in layers)
    kept = sum(layer.values.numel() for layer in layers) * 2
    offsets = sum(layer.row_offsets.nbytes for layer in layers)  # 8 a row: much in a model as narrow as this one
    assert sum(layer.nbytes() for layer in layers) == kept + dense // 16 + offsets
    index = json.loads((compressed / "compressed.json").read_text())
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
    with pytest.raises(EBFTError, match="is missing"):
        load_compressed(torn)
