"""Several processes give what one gives; one that dies ends the run, which another number of them goes on with."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import with_effect
from faults import job
from safetensors.torch import load_file
from several import CPU, dies, on_ranks, tune

from ebft import EBFTConfig, EBFTError
from ebft.audit import main as audit
from ebft.distributed import Ranks
from ebft.output.folder import OutputFolder
from ebft.recovery.ebft.reconstruct import BlockReconstructor


@pytest.fixture
def settings(short_run):
    """Of a run of samples that two or three ranks cannot share evenly."""

    def make(output="out", **changes):
        usual = {"samples": 7, "batch_size": 3, "epochs": 2, "target": "sparse-stream"}
        return short_run(output, **with_effect(usual, changes))

    return make


# --- sequences shared -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "changes"),
    [
        (2, {}),
        (3, {}),
        (3, {"loss": "channel", "token_weights": "norm", "refresh_every": 4, "refresh_share": 0.2}),
        (2, {"loss": "cosine", "optimizer": "sign"}),
    ],
)
def test_twenty_steps_in_float64(count, changes, tmp_path):
    assert on_ranks(1, tune, tmp_path / "one", changes) == [0]
    assert on_ranks(count, tune, tmp_path / "several", changes) == [0] * count
    one, several = (json.loads((tmp_path / name).read_text()) for name in ("one", "several"))
    assert len(one[0]) == 21
    for mine, theirs in zip(one[:2], several[:2], strict=True):  # kept in float32
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-6, atol=0)
    for mine, theirs in zip(one[2:], several[2:], strict=True):
        torch.testing.assert_close(
            torch.tensor(mine, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64), rtol=1e-9, atol=1e-9
        )


OPTIONS = {"unit": "halves", "optimizer": "muon", "input": "mix", "target": "dense-stream", "holdout": 0.3}


@pytest.mark.parametrize(
    ("count", "given"), [(2, {"streams": "host"}), (3, {"streams": "disk"}), (3, {**OPTIONS, "loss": "channel"})]
)
def test_a_run_with_shared_sequences(count, given, settings, tmp_path):
    """The same masks; losses and perplexities within one per cent; sound files, written once."""
    assert on_ranks(1, job, settings("one", **given)) == [0]
    assert on_ranks(count, job, settings("several", **given)) == [0] * count
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(
        p.name for p in (tmp_path / "several").iterdir()
    )
    one, several = (load_file(tmp_path / name / "masks.safetensors") for name in ("one", "several"))
    assert all(torch.equal(words, several[name]) for name, words in one.items())
    for mine, theirs in zip(lines(tmp_path / "one"), lines(tmp_path / "several"), strict=True):
        assert theirs["losses"][0] == pytest.approx(mine["losses"][0], rel=1e-4)
        assert theirs["gradient_norms"][0] == pytest.approx(mine["gradient_norms"][0], rel=1e-3)
        assert theirs["loss_after"] == pytest.approx(mine["loss_after"], rel=1e-2)
    for text, values in perplexity(tmp_path / "one").items():
        for stage, value in values.items():
            assert perplexity(tmp_path / "several")[text][stage] == pytest.approx(value, rel=1e-2)
    assert audit([str(tmp_path / "several")]) == 0


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "blocks.jsonl").read_text().splitlines()]


def perplexity(folder: Path) -> dict:
    return json.loads((folder / "ebft_summary.json").read_text())["perplexity"]


def test_refused():
    with pytest.raises(EBFTError, match="2 ranks share the sequences"):
        BlockReconstructor(EBFTConfig.of(update_in_backward=True, clip=0.0), CPU, ranks=Ranks(0, 2))


# --- blocks apart -----------------------------------------------------------------------------------------------------

APART = {"input": "dense-stream", "target": "dense-stream"}


def test_ranks_may_try_the_output_at_the_same_moment(tmp_path, monkeypatch):
    real = os.path.lexists
    (tmp_path / "out.partial").mkdir()  # by another one, since this one has looked
    monkeypatch.setattr(os.path, "lexists", lambda path: Path(path).name != "out.partial" and real(path))
    OutputFolder(str(tmp_path / "out"), overwrite=False)


@pytest.mark.parametrize("count", [2, 3])
def test_blocks_apart_are_those_of_one_process(count, settings, tmp_path):
    assert on_ranks(1, job, settings("one", **APART)) == [0]
    assert on_ranks(count, job, settings("several", **APART)) == [0] * count
    same_blocks(tmp_path / "one", tmp_path / "several")
    assert audit([str(tmp_path / "several")]) == 0


def same_blocks(one: Path, other: Path) -> None:
    """The same weights and losses, bit for bit; perplexities are sums over batches that differ, in float32."""
    for file in ("model.safetensors", "masks.safetensors"):
        mine, theirs = load_file(one / file), load_file(other / file)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items()), file
    assert [line["losses"] for line in lines(one)] == [line["losses"] for line in lines(other)]
    for text, values in perplexity(one).items():
        assert perplexity(other)[text] == pytest.approx(values, rel=1e-5)


# --- ranks that die ---------------------------------------------------------------------------------------------------


def test_a_rank_is_killed_where_sequences_are_shared(settings, tmp_path):
    """The others end; what was committed is gone on with by another number of ranks."""
    ends = on_ranks(2, dies, settings("several"), "block-00000")
    assert ends[1] == -signal.SIGKILL
    assert ends[0] != 0
    assert (tmp_path / "several.partial" / "commits" / "block-00000.json").is_file()
    assert on_ranks(3, job, settings("several", resume=True)) == [0, 0, 0]
    assert on_ranks(1, job, settings("one")) == [0]
    for mine, theirs in zip(lines(tmp_path / "one"), lines(tmp_path / "several"), strict=True):
        assert theirs["loss_after"] == pytest.approx(mine["loss_after"], rel=1e-2)
    assert audit([str(tmp_path / "several")]) == 0


def test_a_rank_is_killed_where_blocks_are_apart(settings, tmp_path):
    """Blocks that any rank had committed are kept; one process goes on, and gives what it gives alone."""
    ends = on_ranks(2, dies, settings("out", **APART), "block-00001")
    assert ends[1] == -signal.SIGKILL
    assert (tmp_path / "out.partial" / "commits" / "block-00001.json").is_file()
    assert on_ranks(1, job, settings("out", resume=True, **APART)) == [0]
    assert on_ranks(1, job, settings("one", **APART)) == [0]
    same_blocks(tmp_path / "one", tmp_path / "out")


def test_torchrun(settings, tmp_path):
    """The command of the README; bad input is said once, and ends all ranks with the launcher's failure."""
    given = settings("several", recover="none", eval="")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ebft.run"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("calibration:") == 1
    assert (tmp_path / "several" / "ebft_summary.json").is_file()
