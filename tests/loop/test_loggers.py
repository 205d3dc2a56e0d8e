"""Loggers: any object with three methods, TensorBoard and Weights & Biases (both played here)."""

import sys
from types import SimpleNamespace

import pytest

from ebft import EBFTConfig, EBFTError, run_ebft


class Kept:
    """Keeps what it is told."""

    def __init__(self):
        self.told = []

    def on_step(self, part, step, figures):
        self.told.append((part, step, sorted(figures)))

    def on_block(self, line):
        self.told.append(("block", line["block"]))

    def on_end(self, summary):
        self.told.append(("end", summary["sparsity"]))


def test_any_object_is_told_of_steps_blocks_and_the_end(short_run, silent):
    kept = Kept()
    result = run_ebft(config=EBFTConfig.of(**short_run()), reporter=silent, loggers=[kept])
    steps = [
        (line["name"], place + 1, ["gradient_norm", "loss"])
        for line in result.blocks[:1]
        for place in range(len(line["losses"]))
    ]
    assert steps
    assert kept.told[: len(steps) + 1] == [*steps, ("block", 0)]
    assert [said for said in kept.told if said[0] == "block"] == [("block", 0), ("block", 1), ("block", 2)]
    assert kept.told[-1] == ("end", result.summary["sparsity"])


def test_tensorboard_and_weights_and_biases(short_run, silent, monkeypatch):
    said = []
    writer = SimpleNamespace(
        add_text=lambda *of: said.append(of),
        add_scalar=lambda *of: said.append(of),
        close=lambda: said.append("closed"),
    )
    run = SimpleNamespace(log=said.append, summary={}, finish=lambda: said.append("finished"))
    board = SimpleNamespace(SummaryWriter=lambda folder: said.append(folder) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **of: said.append(of["name"]) or run))
    run_ebft(config=EBFTConfig.of(**short_run(log="tensorboard,wandb")), reporter=silent)
    assert {"runs/out", "out", "closed", "finished"} <= {of for of in said if isinstance(of, str)}
    assert any(of[0] == "model.layers.0/loss" and of[2] == 1 for of in said if isinstance(of, tuple))
    assert any("model.layers.0/loss" in of for of in said if isinstance(of, dict))
    assert any(name.startswith("perplexity/") for name in run.summary)


def test_a_logger_that_is_not_there(short_run, silent, monkeypatch):
    with pytest.raises(EBFTError, match="--log is 'mlflow'; expected tensorboard or wandb"):
        EBFTConfig.of(**short_run(log="mlflow"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(EBFTError, match="--log wandb needs wandb, which is not installed"):
        run_ebft(config=EBFTConfig.of(**short_run(log="wandb")), reporter=silent)
