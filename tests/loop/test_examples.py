"""Every example runs, on a tiny model, and what it saves is as sparse as what it was given."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from several import on_ranks, script
from transformers import AutoModelForCausalLM

from ebft_kernels import PackedMask, load_masks, save_masks

EXAMPLES = Path(__file__).parents[2] / "examples"
HELPERS = {"windows.py"}


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory) -> Path:
    """A folder with a random Llama, dense and pruned, and a text."""
    folder = tmp_path_factory.mktemp("examples")
    for name in ("dense", "pruned"):
        shutil.copytree(tiny / "model", folder / name)
    model, masks = AutoModelForCausalLM.from_pretrained(folder / "dense"), {}
    for path, layer in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(layer, torch.nn.Linear):
            masks[f"{path}.weight"] = PackedMask.from_scores(layer.weight.abs(), 2, 4)
            masks[f"{path}.weight"].zero_pruned_(layer.weight)
    model.save_pretrained(folder / "pruned")
    save_masks(masks, folder / "pruned" / "masks.safetensors")
    (folder / "text.txt").write_text((tiny / "text.txt").read_text()[:3000])
    return folder


def check(place: Path, output: Path) -> None:
    """What ``output`` holds is tuned, and zero where the masks say so."""
    before, after = (load_file(folder / "model.safetensors") for folder in (place / "pruned", output))
    assert before.keys() == after.keys()
    masks, kept = (load_masks(folder / "masks.safetensors") for folder in (place / "pruned", output))
    assert kept == masks
    for name, mask in masks.items():
        assert torch.count_nonzero(after[name][~mask.dense()]) == 0
        assert not torch.equal(after[name], before[name])


@pytest.mark.parametrize(
    "example",
    ["plain_loop", "hf_trainer", "peft_merge", pytest.param("trl_sft", marks=pytest.mark.slow)],  # trl: extra compat
)
def test_it_tunes_and_keeps_the_zeros(example, place, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [example, str(place / "pruned"), str(place / "text.txt"), str(tmp_path / "out")])
    runpy.run_path(str(EXAMPLES / f"{example}.py"))
    check(place, tmp_path / "out")


def test_fsdp2(place, tmp_path):
    """Two processes, as torchrun starts them."""
    given = [str(place / "pruned"), str(place / "text.txt"), str(tmp_path / "out")]
    assert on_ranks(2, script, EXAMPLES / "accelerate_fsdp2.py", given) == [0, 0]
    check(place, tmp_path / "out")


def test_own_criterion(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", str(place / "dense"), str(place / "text.txt"), str(tmp_path / "out")])
    runpy.run_path(str(EXAMPLES / "own_criterion.py"))
    assert "50.0% of the blocks' weights are zero" in capsys.readouterr().out
    assert all(mask.density() == 0.5 for mask in load_masks(tmp_path / "out" / "masks.safetensors").values())


def test_notebook(place, tmp_path, monkeypatch):
    """Its code cells in order, with other parameters."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in cells)
    small = {"samples": 4, "seqlen": 16, "epochs": 1, "batch_size": 2, "eval_seqlen": 32, "eval_tokens": 64}
    namespace = {"source": str(place / "dense"), "preset": {"sparsity": 0.5, **small}, "output": str(tmp_path / "out")}
    for cell in code[1:]:  # the first has the parameters
        exec(compile(cell, "notebook.ipynb", "exec"), namespace)
    assert {round(1 - mask.density(), 2) for mask in namespace["masks"].values()} == {0.5}


def test_every_example_is_listed_and_run():
    files = {file.name for file in EXAMPLES.iterdir() if file.suffix in (".py", ".ipynb")} - HELPERS
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    here = Path(__file__).read_text(encoding="utf-8")
    for name in files:
        assert f"[{name}]({name})" in listed
        assert name.removesuffix(".py") in here
