"""--unit pair: a block and the next one towards the dense states after both, of which the first is kept."""

import copy

import pytest
import torch
from conftest import random_model
from faults import assert_same, job
from safetensors.torch import load_file
from several import on_ranks
from torch import nn

import ebft.pipeline.run
import ebft.pipeline.walk
from ebft import BlockReconstructor, EBFTConfig, EBFTError, run_ebft
from ebft.audit import main as audit
from ebft.data.streams import Streams
from ebft.model.decoder import Decoder
from ebft.plan.planner import make_plan
from ebft.recovery.ebft import reconstruct

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _light(monkeypatch):
    """No pictures: these runs are tiny."""
    monkeypatch.setattr(ebft.pipeline.run, "report_page", lambda summary, lines: "")


@pytest.fixture
def watched(monkeypatch):
    """The calibration tokens of a run, and of every block the task of tuning it, with copies of what changes later."""
    tokens, tasks, make = [], [], Streams.__init__

    class Watching(BlockReconstructor):
        def recover(self, task):
            tasks.append((task, copy.deepcopy(task.block), task.inputs.clone(), task.targets.clone()))
            return super().recover(task)

    def made(self, config, decoder, teacher, ids, *others, **named):
        tokens.append(ids)
        make(self, config, decoder, teacher, ids, *others, **named)

    monkeypatch.setattr(Streams, "__init__", made)
    monkeypatch.setattr(reconstruct, "BlockReconstructor", Watching)
    return tokens, tasks


@pytest.mark.parametrize(
    "given",
    [
        {"target": "dense-stream", "streams": "disk"},
        {"target": "dense-stream", "prune": "sparsegpt", "input": "mix", "teacher": "the model"},
        {"target": "sparse-stream", "recover": "layerwise+ebft", "holdout": 0.3},
    ],
)
def test_what_a_pair_is_given(given, watched, short_run, silent):
    """Targets against the dense blocks, applied here; the second block as it will be in its own turn."""
    if "teacher" in given:  # opened apart, so that statistics and targets are of passes of their own
        given = {**given, "teacher": short_run()["model"]}
    result = run_ebft(config=EBFTConfig.of(**short_run(unit="pair", **given)), reporter=silent)
    (ids,), tasks = watched
    dense = Decoder(random_model("llama-gqa"), CPU)

    def through(first, last, hidden):
        for index in range(first, last + 1):
            hidden = dense.run_block(index, dense.working_block(index), hidden)
        return hidden

    *pairs, (_, last, _, _) = tasks
    assert [len(list(pair)) for _, pair, _, _ in pairs] == [2, 2]
    assert not isinstance(last, nn.ModuleList)  # which is tuned alone
    alone = [pair[0] for _, pair, _, _ in pairs[1:]] + [last]
    for index, ((task, pair, inputs, targets), in_its_turn) in enumerate(zip(pairs, alone, strict=True)):
        of_dense = given["target"] == "dense-stream"
        expected = through(0, index + 1, dense.enter(ids)) if of_dense else through(index, index + 1, inputs)
        torch.testing.assert_close(targets, expected)
        out = dense.run_block(index + 1, pair[1], dense.run_block(index, pair[0], inputs))
        torch.testing.assert_close(task.forward(pair, inputs), out)
        assert list(task.masks) == [matrix.name for matrix in task.matrices]
        assert len(task.masks) == 14
        for name, mask in task.masks.items():
            assert 0.6 < 1 - mask.density() < 0.8
            assert torch.count_nonzero(pair.get_parameter(name)[~mask.dense()]) == 0
        if of_dense:
            for name, weight in in_its_turn.named_parameters():
                assert torch.equal(weight, pair[1].get_parameter(name)), name
    assert all(line["losses"][0] > 0 and line["epochs"] == 1 for line in result.blocks)


def test_only_the_first_is_kept(watched, short_run, silent, tmp_path):
    """What is saved of a block is what its own pair made of it; errors are its own."""
    result = run_ebft(config=EBFTConfig.of(**short_run(unit="pair", epochs=2, lr=3e-3)), reporter=silent)
    assert audit([str(tmp_path / "out")]) == 0
    _, tasks = watched
    saved = load_file(tmp_path / "out" / "model.safetensors")
    dense = Decoder(random_model("llama-gqa"), CPU)
    for index, ((task, before, inputs, _), line) in enumerate(zip(tasks, result.blocks, strict=True)):
        tuned = task.block[0] if index < 2 else task.block
        for name, weight in tuned.named_parameters():
            assert torch.equal(weight, saved[f"model.layers.{index}.{name}"])
        pruned = before[0] if index < 2 else before
        target = dense.run_block(index, dense.working_block(index), inputs)
        for block, which in ((pruned, "loss_before"), (tuned, "loss_after")):
            error = (dense.run_block(index, block, inputs) - target)[:1].square().mean()
            assert line[which] == pytest.approx(error.item(), rel=1e-4)
        through = task.forward(task.block, inputs), task.forward(before, inputs)
        after, at_first = (out.sub(tasks[index][3]).square().mean() for out in through)
        assert after < at_first


class Stop(Exception):
    """Ends a run in this process."""


def test_resumed(short_run, silent, tmp_path, monkeypatch):
    """After one block of three; the same bits."""

    def run(output, **more):
        given = short_run(output, unit="pair", target="dense-stream", streams="disk", eval="", **more)
        run_ebft(config=EBFTConfig.of(**given), reporter=silent)

    def stop_at_the_second(job, index, *others):
        if index == 1:
            raise Stop
        return line_of(job, index, *others)

    run("whole")
    line_of = ebft.pipeline.walk._block_line
    monkeypatch.setattr(ebft.pipeline.walk, "_block_line", stop_at_the_second)
    with pytest.raises(Stop):
        run("out")
    monkeypatch.setattr(ebft.pipeline.walk, "_block_line", line_of)
    assert len(list((tmp_path / "out.partial" / "commits").glob("block-*"))) == 1
    run("out", resume=True)
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_ranks_and_recomputation(short_run, silent, tmp_path):
    """Two ranks, one process, and one that recomputes its blocks in turn: the last two to the bit."""
    given = {"unit": "pair", "prune": "sparsegpt", "eval": "", "epochs": 2}
    for recompute in ("none", "halves"):
        run_ebft(
            config=EBFTConfig.preset("demo", **short_run(recompute, recompute=recompute, **given)), reporter=silent
        )
    assert on_ranks(2, job, short_run("ranks", **given)) == [0, 0]
    one, other, ranks = (load_file(tmp_path / name / "model.safetensors") for name in ("none", "halves", "ranks"))
    for name, weight in one.items():
        assert torch.equal(weight, other[name])
        torch.testing.assert_close(ranks[name], weight, rtol=1e-3, atol=1e-4)


def test_the_plan(short_run):
    """Twice the states and the best weights, half as many streams again, and the work of the blocks that are tuned."""
    one, two = (make_plan(EBFTConfig.of(**short_run(unit=unit, eval="", epochs=200))) for unit in ("block", "pair"))
    for row in ("weights", "optimizer states"):
        assert two.device[row] == 2 * one.device[row]
    assert two.device["activations"] > 1.5 * one.device["activations"]
    assert two.host["the best weights of a block"] == 2 * one.host["the best weights of a block"]
    assert two.host["streams"] == 1.5 * one.host["streams"]
    assert two.flops == pytest.approx(5 / 3 * one.flops, rel=0.01)  # of three blocks the last is tuned alone


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"recover": "layerwise"},
            "--unit is a setting of --recover ebft, and --recover is layerwise; expected --recover ebft",
        ),
        ({"input": "dense-stream"}, "does not go with --input dense-stream"),
        ({"epochs_where": "error", "holdout": 0.1}, "does not go with --epochs-where error"),
        ({"refresh_every": 10}, "does not go with --refresh-every"),
        ({"compile": True}, "does not go with --compile"),
    ],
)
def test_what_it_does_not_go_with(given, sentence):
    with pytest.raises(EBFTError, match=sentence):
        EBFTConfig.of(**{"unit": "pair", **given})
