"""Gradual pruning: every share from what the last one recovered, towards the first dense model."""

import copy
import json

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file

import ebft.pipeline.run
from ebft import EBFTConfig, EBFTError, run_ebft
from ebft.model.decoder import Decoder
from ebft.output.audit import audit
from ebft.output.folder import OutputFolder
from ebft_kernels import load_masks


@pytest.fixture(autouse=True)
def _without_a_page(monkeypatch):
    """matplotlib takes longer than a run."""
    monkeypatch.setattr(ebft.pipeline.run, "report_page", lambda summary, lines: "")


def same_weights(one, other) -> bool:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("prune", ["wanda", "magnitude"])
def test_the_runs_by_hand(prune, short_run, silent, tmp_path):
    """The same bits; and what was pruned stays pruned."""
    usual = {"prune": prune, "target": "dense-stream", "lr": 1e-2}
    result = run_ebft(config=EBFTConfig.of(**short_run(schedule="0.3,0.5, 0.7", **usual)), reporter=silent)
    folders = [tmp_path / "out.schedule" / "0.3", tmp_path / "out.schedule" / "0.5", tmp_path / "out"]
    dense = short_run()["model"]
    for share, folder, model in zip((0.3, 0.5, 0.7), folders, (dense, *map(str, folders)), strict=False):
        by_hand = short_run(f"hand-{share}", sparsity=share, **usual)
        teacher = None if model == dense else dense
        assert same_weights(
            run_ebft(config=EBFTConfig.of(**{**by_hand, "model": model, "teacher": teacher})).output, folder
        )
        assert audit(str(folder), dense).faults == []
    masks = [load_masks(folder / "masks.safetensors") for folder in folders]
    for name, last in masks[-1].items():
        kept = [of_step[name].dense() for of_step in masks]
        assert not (kept[1] & ~kept[0]).any()
        assert not (kept[2] & ~kept[1]).any()
        assert last.density() == pytest.approx(0.3, abs=0.02)
    summary = json.loads((tmp_path / "out" / "ebft_summary.json").read_text())
    assert summary["model"] == dense
    assert summary["config"]["teacher"] == dense
    assert summary["config"]["sparsity"] == 0.7
    assert summary["config"]["schedule"] == [0.3, 0.5, 0.7]
    first = json.loads((folders[0] / "ebft_summary.json").read_text())
    assert first["perplexity"].values() != summary["perplexity"].values()
    assert [run["dense"] for run in first["perplexity"].values()] == [
        run["dense"] for run in summary["perplexity"].values()
    ]
    assert result.output == tmp_path / "out"


def test_where_no_run_looks_at_the_dense_model(short_run, silent, tmp_path):
    """Nothing to recover, nothing to measure: no run has a teacher."""
    given = short_run(schedule="0.3,0.6", prune="magnitude", recover="none", eval="")
    run_ebft(config=EBFTConfig.of(**given), reporter=silent)
    first, last = (
        load_masks(folder / "masks.safetensors") for folder in (tmp_path / "out.schedule/0.3", tmp_path / "out")
    )
    assert all((last[name].dense() <= mask.dense()).all() for name, mask in first.items())
    assert all(mask.density() == pytest.approx(0.4, abs=0.02) for mask in last.values())


def test_a_model_in_memory(short_run, silent, tokenizer, tmp_path):
    """It takes the recovered weights, and is its own teacher as it was."""
    settings = short_run("file", schedule="0.4,0.6")
    run_ebft(config=EBFTConfig.of(**settings), reporter=silent)
    given = copy.deepcopy(Decoder(random_model("llama-gqa"), torch.device("cpu")).model)
    settings = short_run("memory", schedule="0.4,0.6") | {"model": None}
    result = run_ebft(given, EBFTConfig.of(**settings), tokenizer=tokenizer, text=None, reporter=silent)
    assert same_weights(tmp_path / "memory", tmp_path / "file")
    assert result.model is given
    weights = load_file(tmp_path / "memory" / "model.safetensors")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in given.named_parameters())


def test_resumed(short_run, silent, tmp_path, monkeypatch):
    """Interrupted in the second run: the first is not run again, and the second goes on."""
    whole = run_ebft(config=EBFTConfig.of(**short_run("whole", schedule="0.4,0.6")), reporter=silent)
    settings, committed, commit = short_run("out", schedule="0.4,0.6"), [], OutputFolder.commit_part

    def stop(self, name, *rest):
        commit(self, name, *rest)
        committed.append((self.path.name, name))
        if committed.count(("out.partial", "block-00001")) == 1 and not resuming:
            raise KeyboardInterrupt

    resuming = False
    monkeypatch.setattr(OutputFolder, "commit_part", stop)
    with pytest.raises(KeyboardInterrupt):
        run_ebft(config=EBFTConfig.of(**settings), reporter=silent)
    assert ("0.4.partial", "save") in committed
    resuming = True
    committed.clear()
    resumed = run_ebft(config=EBFTConfig.of(**settings, resume=True), reporter=silent)
    assert ("out.partial", "block-00002") in committed
    assert ("out.partial", "block-00001") not in committed
    assert {folder for folder, _ in committed} == {"out.partial"}
    assert same_weights(resumed.output, whole.output)
    committed.clear()
    run_ebft(config=EBFTConfig.of(**settings, resume=True), reporter=silent)
    assert committed == []
    with pytest.raises(EBFTError, match="give --overwrite to replace it"):
        run_ebft(config=EBFTConfig.of(**settings), reporter=silent)
