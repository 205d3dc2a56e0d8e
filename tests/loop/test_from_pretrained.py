"""transformers itself loads and saves compressed models: after ``import ebft``, and not without."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ebft
from ebft.compressed import registering
from ebft.compressed.layers import compress_model, save_compressed
from ebft.errors import EBFTError
from ebft.model.matrices import find_matrices
from ebft_kernels import CompressedLinear

IDS = torch.arange(12)[None]


def pruned_model(family="llama-gqa", **changes):
    """A random model, of whose block matrices every other weight is 0."""
    model = random_model(family, **changes)
    for block in ebft.model.decoder.find_blocks(model)[1]:
        for matrix in find_matrices(block):
            weight = block.get_parameter(matrix.name).data
            weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5)
    return model


@pytest.fixture(scope="module")
def root(tokenizer, tmp_path_factory) -> Path:
    """A pruned Llama: ``dense`` in bfloat16, ``small``, and ``again``, which transformers loaded and saved."""
    root = tmp_path_factory.mktemp("from_pretrained")
    pruned_model().bfloat16().save_pretrained(root / "dense")
    tokenizer.save_pretrained(root / "dense")
    save_compressed(str(root / "dense"), str(root / "small"))
    AutoModelForCausalLM.from_pretrained(root / "small").save_pretrained(root / "again")
    return root


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("folder", ["small", "again"])
def test_transformers_loads_what_it_and_ebft_have_saved(root, folder):
    model = AutoModelForCausalLM.from_pretrained(root / folder)
    layers = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    assert len(layers) == 3 * 7
    assert model.dtype == layers[0].values.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(ebft.load_compressed(root / folder)))
    assert not any("weight" in vars(layer) for layer in layers)
    stored, once = (load_file(root / name / "model.safetensors") for name in (folder, "small"))
    assert stored.keys() == once.keys()
    assert all(torch.equal(stored[name], once[name]) for name in stored)


@pytest.mark.parametrize("how", [{"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}])
def test_placed_as_any_model(root, how):
    model = AutoModelForCausalLM.from_pretrained(root / "small", **how)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(root / "small")))


def test_a_dtype_is_that_of_survivors_too(root):
    model = AutoModelForCausalLM.from_pretrained(root / "small", dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {m.values.dtype for m in model.modules() if isinstance(m, CompressedLinear)} == {torch.float32}
    expected = AutoModelForCausalLM.from_pretrained(root / "dense", dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)


def test_eight_bit_codes_stay_codes(root, tmp_path):
    save_compressed(str(root / "dense"), str(tmp_path / "int8"), values="int8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", dtype=torch.float16)
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.values.dtype, layer.scales.dtype, model.dtype) == (torch.int8, torch.float32, torch.float16)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


def test_transformers_alone_refuses_it_and_says_why(root):
    """In a process of its own, which imports ebft only then; what transformers saved is refused for its sizes."""
    code = f"""
from transformers import AutoModelForCausalLM
for folder in ("small", "again"):
    try:
        AutoModelForCausalLM.from_pretrained({str(root)!r} + "/" + folder)
    except (ValueError, RuntimeError) as error:
        print(str(error).splitlines()[-1])
import ebft
model = AutoModelForCausalLM.from_pretrained({str(root / "again")!r})
print(sum("Compressed" in type(module).__name__ for module in model.modules()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    by_note, by_size, layers = done.stdout.strip().splitlines()
    assert by_note.endswith("compressed by ebft; pip install ebft, and import ebft before this model is loaded")
    assert "ignore_mismatched_sizes" in by_size
    assert "Unknown quantization type, got ebft" in done.stderr
    assert int(layers) == 3 * 7


def test_registering_waits_for_the_import(tmp_path, monkeypatch):
    (tmp_path / "ebft_test_table.py").write_text("table = ['theirs']")
    entered = []
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registering, "WAITED_FOR", {"ebft_test_table": "ours"})
    monkeypatch.setattr(
        registering, "_register", lambda ours: entered.append([ours, *sys.modules["ebft_test_table"].table])
    )
    finders = list(sys.meta_path)
    registering.register_when_imported()
    registering.register_when_imported()
    assert (len(sys.meta_path), entered) == (len(finders) + 1, [])
    importlib.import_module("ebft_test_table")
    assert entered == [["ours", "theirs"]]  # after the module has run
    assert sys.meta_path == finders
    registering.register_when_imported()
    assert len(entered) == 2
    del sys.modules["ebft_test_table"]


# --- in memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "qwen3-moe"])
def test_a_model_compressed_in_memory_is_saved_and_made_dense_again(family, tmp_path):
    model = pruned_model(family)
    before, expected = {name: p.clone() for name, p in model.named_parameters()}, logits(model)
    compress_model(model)
    with pytest.raises(EBFTError, match="is compressed or quantised already"):
        compress_model(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(loaded), logits(model))
    for dense in (ebft.to_dense(model), loaded.dequantize()):
        after = dict(dense.named_parameters())
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
    loaded.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), expected)


def test_layers_whose_weight_others_read_stay_dense():
    class Reads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.called = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
            self.called.weight.data.zero_()  # at birth: does not count

        def forward(self, x):
            return self.called(x) @ self.read.weight

    assert ebft.compressed.readers.read_by_others(torch.nn.Sequential(Reads(), torch.nn.Linear(4, 4))) == {"0.read"}


# --- damage -------------------------------------------------------------------------------------------------------


def _config(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        layers = config["quantization_config"]["layers"]
        first = min(layers)
        for name, value in changes.items():
            place = layers[first] if name in layers[first] else config
            place[name] = value
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def _tensor(part, change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        name = min(name for name in tensors if name.endswith(part))
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_config(num_hidden_layers=4000), "has num_hidden_layers 4000, and lists 21 layers"),
        (_config(hidden_size=10**9), "has hidden_size 1000000000; expected at most"),
        (_config(out_features=2**62), "expected at most"),
        (_config(kept=10**9), "CompressedLinear got 1000000000 kept weights"),
        (_config(kept=3), r"down_proj.values is BF16 .*; expected bfloat16 \(3,\)"),
        (_config(values="object"), "are 'object'; expected dense"),
        (_config(bias=True), "bias is missing"),
        (_tensor(".values", lambda t: t * float("nan")), "values holds NaN or infinity"),
        (
            _tensor(".bitmap", lambda t: torch.full_like(t, -1)),
            "bits set past the end|values for a mask that keeps",
        ),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "is no safetensors file, in which alone a compressed model is stored",
        ),
    ],
)
def test_a_damaged_folder_is_refused_by_transformers_too(root, tmp_path, damage, says):
    folder = shutil.copytree(root / "again", tmp_path / "damaged")
    damage(folder)
    with pytest.raises(EBFTError, match=says) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_a_model_is_not_compressed_while_it_is_loaded(root):
    from ebft.compressed.quantizer import CompressedConfig

    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(root / "dense", quantization_config=CompressedConfig(layers={}))
