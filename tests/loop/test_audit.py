"""``python -m ebft.audit``: a run's folder is sound, and whatever is done to it is found."""

import json
import shutil

import pytest
import torch
from conftest import random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ebft import run_ebft
from ebft.audit import main
from ebft.output.audit import audit
from ebft_kernels import PackedMask, load_masks, save_masks

UP, EMBEDDING = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("audit") / "dense"
    random_model("llama").save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sound(dense, tmp_path_factory, tokenizer):
    """A finished 2:4 run in several shards, which no test touches."""
    from ebft import EBFTConfig

    out = tmp_path_factory.mktemp("audit") / "out"
    small = {"samples": 4, "seqlen": 16, "epochs": 1, "batch_size": 2, "eval": "", "pattern": "2:4"}
    result = run_ebft(config=EBFTConfig.preset("demo", model=str(dense), output=str(out), **small))
    result.model.save_pretrained(out, max_shard_size="40KB")
    (out / "model.safetensors").unlink(missing_ok=True)
    return out


@pytest.fixture
def out(sound, tmp_path):
    """A copy to break."""
    return shutil.copytree(sound, tmp_path / "out")


def shard_of(folder, name):
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def change(folder, name, edit, file=None):
    file = file or shard_of(folder, name)
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}  # the file is mapped until then
    edit(tensors[name])
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_sound_folder(sound, dense, capsys):
    assert main([str(sound), "--against", str(dense)]) == 0
    said = capsys.readouterr().out
    assert said.count("50.00%") == 3 * 7
    assert said.strip().endswith("sound")
    assert len(list(sound.glob("model-*.safetensors"))) > 3


def a_pruned_place(folder):
    return tuple((~load_masks(folder / "masks.safetensors")[UP].dense()).nonzero()[5].tolist())


def test_a_bit_in_a_pruned_place(out):
    def flip(weight):
        weight.view(torch.int32)[a_pruned_place(out)] ^= 1 << 31  # -0, which equals 0

    change(out, UP, flip)
    assert audit(str(out)).faults == [f"{UP} has 1 weights that are not 0 where its mask prunes"]


def test_a_changed_embedding(out, dense):
    change(out, EMBEDDING, lambda weight: weight.view(torch.int32)[3, 4].bitwise_xor_(1))
    assert audit(str(out)).faults == []
    assert audit(str(out), str(dense)).faults == [f"{EMBEDDING} is not what it was, and nothing should have changed it"]


def test_nan(out):
    def spoil(weight):
        weight[0, 0] = float("nan")

    change(out, EMBEDDING, spoil)
    assert f"{EMBEDDING} holds NaN or infinity" in audit(str(out)).faults


def test_a_missing_shard(out, capsys):
    shard_of(out, UP).unlink()
    assert main([str(out)]) == 1
    said = capsys.readouterr().out
    assert f"fault: {shard_of(out, UP).name} cannot be read" in said
    assert "note: masks were not looked at" in said


def test_a_truncated_shard(out):
    file = shard_of(out, UP)
    file.write_bytes(file.read_bytes()[:-64])
    assert any(fault.startswith(f"{file.name} cannot be read") for fault in audit(str(out)).faults)


def test_a_wrong_index(out):
    index = out / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    right = content["weight_map"][UP]
    wrong = next(file for file in content["weight_map"].values() if file != right)
    content["weight_map"][UP] = wrong
    index.write_text(json.dumps(content))
    faults = audit(str(out)).faults
    assert f"the index says that {UP} is in {wrong}, which lacks it" in faults
    assert f"{right} holds {UP}, and the index does not say so" in faults
    index.write_text("{")
    assert any("model.safetensors.index.json is no index" in fault for fault in audit(str(out)).faults)


def test_a_stray_shard(out):
    save_file({"x": torch.zeros(1)}, out / "model-stray.safetensors")
    assert audit(str(out)).faults == ["model-stray.safetensors is in the folder, and not in the index"]


def test_wrong_masks(out):
    file = out / "masks.safetensors"
    masks = load_masks(file)
    transposed = PackedMask.from_dense(masks[UP].dense().T.contiguous())
    for changed, says in (
        ({**masks, UP: transposed}, f"the mask of {UP} has shape (32, 48); expected (48, 32)"),
        ({name: mask for name, mask in masks.items() if name != UP}, f"there is no mask for {UP}"),
        ({**masks, EMBEDDING: PackedMask.ones((512, 32))}, f"there is a mask for {EMBEDDING}, which is not pruned"),
        ({**masks, UP: PackedMask.ones((48, 32))}, f"the mask of {UP} is not 2:4"),
    ):
        save_masks(changed, file)
        assert audit(str(out)).faults == [says]
    file.write_bytes(b"nothing")
    assert audit(str(out)).faults[0].startswith("masks.safetensors cannot be read")


def test_without_recovery_kept_weights_are_as_they_were(config, silent, tmp_path):
    model = random_model("llama")
    model.save_pretrained(tmp_path / "dense")
    out = run_ebft(model, config(prune="magnitude", recover="none"), reporter=silent).output
    assert audit(str(out), str(tmp_path / "dense")).faults == []
    for name in (UP, "model.layers.0.input_layernorm.weight"):
        change(out, name, lambda weight: weight.mul_(1.001), out / "model.safetensors")
    assert len(audit(str(out), str(tmp_path / "dense")).faults) == 2


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen2-moe", "gemma3"])
def test_other_families(family, config, silent, tokenizer, tmp_path):
    """Conv1D, fused experts that are stored one by one, routers, tied heads; a dense model in another dtype."""
    model = random_model(family)
    model.to(torch.bfloat16).float().save_pretrained(tmp_path / "dense")
    model.to(torch.bfloat16)
    out = run_ebft(
        model, config(pattern="2:4", epochs=1, samples=4, dtype="float32"), tokenizer=tokenizer, reporter=silent
    ).output
    found = audit(str(out), str(tmp_path / "dense"))
    assert found.faults == []
    assert len(found.layers) >= 12
    with safe_open(out / "model.safetensors", framework="pt") as file:
        router = [name for name in file.keys() if ".gate.weight" in name]  # noqa: SIM118
    if router:
        change(out, router[0], lambda weight: weight[0, 0].add_(1), out / "model.safetensors")
        assert "nothing should have changed it" in audit(str(out), str(tmp_path / "dense")).faults[0]


def test_bad_input(out, dense, tmp_path, capsys):
    random_model("llama", hidden_size=16).save_pretrained(tmp_path / "narrow")
    (tmp_path / "empty").mkdir()
    for argv, says in (
        ([tmp_path / "nowhere"], "expected the folder of a finished run"),
        ([dense], "expected the folder of a finished run"),
        ([out, "--against", tmp_path / "narrow"], "as the output has"),
        ([out, "--against", tmp_path / "empty"], "cannot be loaded"),
    ):
        assert main([str(part) for part in argv]) == 2
        assert says in capsys.readouterr().err
    (out / "ebft_summary.json").write_text("[]")
    assert main([str(out)]) == 2
    assert "is not what a run writes" in capsys.readouterr().err
