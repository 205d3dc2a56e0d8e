"""Runs that survive: whatever ends a run, ``--resume`` gives what the run would have given, bit for bit."""

import io
import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import random_model
from faults import assert_same, command, in_child, job, refused
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

import ebft.output.folder
import ebft.pipeline.summary
from ebft import BlockReconstructor, EBFTError, run_ebft
from ebft.config import EBFTConfig
from ebft.errors import MemoryRanOut
from ebft.output.folder import OutputFolder
from ebft.output.terminal import Reporter
from ebft.run import main


@pytest.fixture
def settings(short_run):
    """Of a run of half a second."""
    return short_run


MODES = {
    "sparse targets, host": {"target": "sparse-stream", "streams": "host"},
    "dense targets, disk": {"target": "dense-stream", "streams": "disk"},
    "dense inputs, disk": {"target": "dense-stream", "input": "dense-stream", "streams": "disk"},
    "sparse targets, disk": {"target": "sparse-stream", "streams": "disk"},
}


@pytest.mark.parametrize(
    ("mode", "every"),
    [
        ("sparse targets, host", 0),
        ("dense targets, disk", 4),
        pytest.param("dense targets, disk", 1, marks=pytest.mark.slow),
    ],
)
def test_killed_at_every_commit_point(mode, every, settings, tmp_path):
    """SIGKILL before every fsync and rename in turn, over an earlier run's output; a resumed run gives the same."""
    assert in_child(job, settings("earlier", recover="none")) == 0
    assert in_child(job, settings("whole", **MODES[mode]), 0, tmp_path / "calls") == 0
    calls = json.loads((tmp_path / "calls").read_text())
    assert len(calls) > 40
    # All points with the mode that writes the most, but for the middle of many fsyncs, between which nothing changes;
    # with the other mode some of those around blocks' commits, which differ.
    points = [n for n in range(1, len(calls) + 1) if set(calls[max(0, n - 3) : n + 2]) != {"fsync"} or n < 3]
    points = points[::every] if every else range(5, 30, 5)

    def killed_at(point):
        folder = tmp_path / str(point)
        shutil.copytree(tmp_path / "earlier", folder / "out")
        given = settings(f"{point}/out", overwrite=True, **MODES[mode])
        assert in_child(job, given, point) == -signal.SIGKILL, f"point {point}"
        assert in_child(job, {**given, "resume": True}) == 0, f"point {point}"
        assert_same(folder / "out", tmp_path / "whole")
        assert [path.name for path in folder.iterdir()] == ["out"], f"litter after point {point}"

    with ThreadPoolExecutor(2) as at_once:
        list(at_once.map(killed_at, points))


def test_killed_again_and_again(settings, tmp_path):
    mode = MODES["dense inputs, disk"]
    assert in_child(job, settings("whole", **mode)) == 0
    ends = []
    while not ends or ends[-1] != 0:
        ends.append(in_child(job, settings(resume=True, **mode), 21))
        assert len(ends) < 20
    assert len(ends) > 3
    assert_same(tmp_path / "out", tmp_path / "whole")


class Stop(Exception):
    """Ends a run in this process."""


@pytest.fixture
def interrupted(settings, monkeypatch):
    """Leaves a run behind that ended after the commit of a part."""

    def make(after, **changes):
        commit = OutputFolder.commit_part

        def commit_part(self, name, content, files=()):
            commit(self, name, content, files)
            if name == after:
                raise Stop

        monkeypatch.setattr(OutputFolder, "commit_part", commit_part)
        with pytest.raises(Stop):
            run(settings(**changes))
        monkeypatch.setattr(OutputFolder, "commit_part", commit)

    return make


@pytest.fixture(autouse=True)
def _light(monkeypatch):
    """One thread, as the children have, and no pictures: these runs are tiny."""
    monkeypatch.setattr("ebft.pipeline.run.report_page", lambda summary, lines: "")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(given, reporter=None, **more):
    return run_ebft(config=EBFTConfig.preset("demo", **given), reporter=reporter, **more)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-9])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The output of a run of a mode that nothing interrupts."""
    made = {}

    def of(mode, given):
        if mode not in made:
            made[mode] = tmp_path_factory.mktemp("whole") / "out"
            run({**given, "output": str(made[mode])}, Reporter(Console(file=io.StringIO())))
        return made[mode]

    return of


@pytest.mark.parametrize("harm", [truncate, flip])
@pytest.mark.parametrize(
    ("mode", "file"),
    [
        ("dense targets, disk", "blocks/00001.safetensors"),
        ("dense targets, disk", "blocks/00001.masks.safetensors"),
        ("dense targets, disk", "commits/block-00001.json"),
        ("sparse targets, host", "blocks/00001.safetensors"),
        # what the last commit names …
        ("dense targets, disk", "streams/inputs-0"),
        ("dense targets, disk", "streams/targets-0"),
        ("dense inputs, disk", "streams/inputs-0"),
        ("sparse targets, disk", "streams/inputs-0"),
        ("sparse targets, disk", "streams/inputs-1"),  # … and what it does not
    ],
)
def test_a_torn_file_is_noticed_and_what_came_before_is_used(
    mode, file, harm, settings, interrupted, silent, whole, tmp_path
):
    interrupted("block-00001", **MODES[mode])
    harmed = tmp_path / "out.partial" / file
    harm(harmed)
    run(settings(resume=True, **MODES[mode]), silent)
    assert_same(tmp_path / "out", whole(mode, settings(**MODES[mode])))
    said = silent.console.file.getvalue()
    of_streams = file.startswith("streams")
    assert f"{2 if of_streams else 1} of 3 blocks are finished already" in said
    assert (f"{harmed} is broken: the run goes on from before it" in said) != of_streams
    # What the commit before names is whole still, on disk.
    assert ("streams through finished blocks" in said) == ("host" in mode or (of_streams and "inputs-1" not in file))


@pytest.mark.parametrize("harm", [truncate, flip, empty])
def test_a_torn_beginning_is_refused(harm, interrupted, settings, tmp_path):
    interrupted("block-00000")
    harm(tmp_path / "out.partial" / ".ebft-working")
    said = refused(settings(resume=True))
    assert said == (
        f"--resume: {tmp_path / 'out.partial' / '.ebft-working'} is broken; without --resume the run starts over"
    )
    assert (tmp_path / "out.partial" / "blocks" / "00000.safetensors").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "masks.safetensors"])
def test_a_saved_model_that_is_torn_is_saved_again(file, interrupted, settings, silent, tmp_path):
    run(settings("whole"), silent)
    interrupted("recovered_perplexity")
    flip(tmp_path / "out.partial" / file)
    run(settings(resume=True), silent)
    assert_same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("after", ["dense_perplexity", "pruned_perplexity", "save", "recovered_perplexity"])
def test_what_was_measured_is_not_measured_again(after, interrupted, settings, silent, tmp_path):
    run(settings("whole"), silent)
    interrupted(after)
    run(settings(resume=True), silent)
    assert_same(tmp_path / "out", tmp_path / "whole")
    said = silent.console.file.getvalue().split("calibration:")[-1]
    stages = ["dense perplexity", "pruned perplexity", "recovered perplexity"]
    done = {"dense_perplexity": 1, "pruned_perplexity": 2, "save": 2, "recovered_perplexity": 3}[after]
    assert [stage in said for stage in stages] == [number >= done for number in range(3)]


def test_a_model_in_memory_goes_on_too(settings, interrupted, silent, tokenizer, tmp_path):
    """It holds the recovered weights at the end, also where all was saved before."""
    given = settings()
    del given["model"]
    kept = random_model("mixtral")
    whole = run({**given, "output": str(tmp_path / "whole")}, silent, model=kept, tokenizer=tokenizer)
    assert whole.model is kept
    for after in ("block-00001", "save"):
        commit = OutputFolder.commit_part
        model = random_model("mixtral")

        def stop(self, name, content, files=(), after=after, commit=commit):
            commit(self, name, content, files)
            if name == after:
                raise Stop

        OutputFolder.commit_part = stop
        try:
            with pytest.raises(Stop):
                run(given, silent, model=random_model("mixtral"), tokenizer=tokenizer)
        finally:
            OutputFolder.commit_part = commit
        result = run({**given, "resume": True}, silent, model=model, tokenizer=tokenizer)
        assert_same(tmp_path / "out", tmp_path / "whole")
        assert result.model is model
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, kept.get_parameter(name)), name
        shutil.rmtree(tmp_path / "out")


# --- what a run was begun with ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lr": 1e-4}, "another setting (lr: 0.003, now 0.0001)"),
        ({"seed": 7}, "another setting (seed: 0, now 7)"),
        ({"stream_dtype": "bfloat16"}, "another setting (stream_dtype: float32, now bfloat16)"),
        ({"sparsity": 0.5}, "another criterion (name: wanda 60%, now wanda 50%)"),
        ({"calibration": "builtin"}, "another text (calibration: "),
        ({"prune": "magnitude"}, "another criterion (name: wanda 60%, now magnitude 60%)"),
    ],
)
def test_other_settings_are_refused(change, says, interrupted, settings, tmp_path):
    interrupted("block-00000")
    said = refused(settings(resume=True, **change))
    assert said.startswith(f"--resume: {tmp_path / 'out.partial'} was begun with {says}"), said
    assert said.endswith("expected the same, or no --resume to start over")
    assert (tmp_path / "out.partial" / "commits" / "block-00000.json").exists()


def test_another_model_text_version_or_number_of_threads_is_refused(
    interrupted, settings, tiny, tmp_path, monkeypatch, silent
):
    for name in ("model", "text.txt"):
        (shutil.copytree if name == "model" else shutil.copy)(tiny / name, tmp_path / name)
    own = {"model": str(tmp_path / "model"), "calibration": str(tmp_path / "text.txt")}
    interrupted("block-00000", **own)
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] += 1
    save_file(weights, file, metadata={"format": "pt"})
    assert "was begun with another model (weights: " in refused(settings(resume=True, **own))
    shutil.copy(tiny / "model" / "model.safetensors", file)
    text = (tmp_path / "text.txt").read_text()
    (tmp_path / "text.txt").write_text("Another. " + text)
    assert "was begun with another text (calibration: " in refused(settings(resume=True, **own))
    (tmp_path / "text.txt").write_text(text)
    with monkeypatch.context() as other:
        other.setattr(ebft.pipeline.summary, "__version__", "0.0.0")
        assert "was begun with another version (ebft: " in refused(settings(resume=True, **own))
    torch.set_num_threads(2)
    assert "was begun with another version (threads: 1, now 2)" in refused(settings(resume=True, **own))
    torch.set_num_threads(1)
    # where things are does not matter: neither the model's folder nor how the run is organised
    (tmp_path / "model").rename(tmp_path / "moved")
    own["model"] = str(tmp_path / "moved")
    run(settings(resume=True, streams="disk", max_shard_size="30KB", **own), silent)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_nothing_to_resume(settings, silent, tmp_path):
    given = settings(resume=True)
    run(given, silent)
    assert "there is nothing to resume: the run begins" in silent.console.file.getvalue()
    before = (tmp_path / "out" / "ebft_summary.json").read_bytes()
    result = run(given, silent)
    assert "is finished: there is nothing left to do" in silent.console.file.getvalue()
    assert (tmp_path / "out" / "ebft_summary.json").read_bytes() == before
    assert result.blocks
    assert result.masks.keys() < dict(result.model.named_parameters()).keys()
    said = refused({**given, "lr": 1e-4})
    assert "there is nothing to resume, and" in said
    assert "holds a run with other settings" in said


def test_without_resume_a_run_starts_over(interrupted, settings, silent, tmp_path):
    interrupted("block-00001")
    run(settings(lr=1e-4), silent)
    assert "finished already" not in silent.console.file.getvalue()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_two_runs_in_one_folder_are_refused(settings, silent, tmp_path):
    with OutputFolder(str(tmp_path / "out"), overwrite=False) as first:
        first.commit_part("dense_perplexity", {})
        for resume in (False, True):
            said = refused(settings(resume=resume))
            assert said == (
                f"another run is at work in {tmp_path / 'out.partial'}; wait for its end, or choose another --output"
            )
        assert first.kept()
    run(settings(), silent)  # it has ended


# --- full disks and signals ---------------------------------------------------------------------------------------


def _full(name, number, module, monkeypatch):
    real, calls = getattr(module, name), []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) >= number:
            if module is PreTrainedTokenizerBase:  # tokenizers has no kind of error for it
                raise Exception("No space left on device (os error 28)")
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, full)


@pytest.mark.parametrize(
    ("module", "name", "number", "kept"),
    [
        (os, "posix_fallocate", 1, False),  # the stream that the dense perplexity is measured with
        (os, "posix_fallocate", 2, True),  # the inputs
        (os, "fsync", 9, True),
        (ebft.output.folder, "save_file", 3, True),
        (ebft.output.folder, "save_file", 4, True),  # the model
        (ebft.output.folder, "save_masks", 2, True),
        (PreTrainedTokenizerBase, "save_pretrained", 2, True),  # the first is a try, before the work
    ],
)
def test_a_full_disk(module, name, number, kept, settings, silent, tmp_path, monkeypatch, capsys):
    given = settings(streams="disk")
    run({**given, "output": str(tmp_path / "whole")}, silent)
    with monkeypatch.context() as patched:
        _full(name, number, module, patched)
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
        assert main(["--preset", "demo", *flags]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"ebft: --output {tmp_path / 'out'} cannot be written: No space left on device")
    assert ("--resume goes on from there" in said) == kept
    run({**given, "resume": True}, silent)
    assert_same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals(number, code, settings, tmp_path):
    given = settings(streams="disk", target="dense-stream")
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    assert in_child(command, ["--preset", "demo", *flags], tmp_path / "said", number, 2) == code
    last = (tmp_path / "said").read_text().strip().splitlines()[-1]
    assert last == (
        f"ebft: interrupted; what was finished is kept in {tmp_path / 'out.partial'}: the same command with --resume "
        "goes on from there"
    )
    assert in_child(command, ["--preset", "demo", *flags, "--resume"], tmp_path / "said") == 0
    assert "2 of 3 blocks are finished already" in (tmp_path / "said").read_text()
    whole = [flag for flag in flags if not flag.startswith("--output")] + [f"--output={tmp_path / 'whole'}"]
    assert in_child(command, ["--preset", "demo", *whole], tmp_path / "said") == 0
    assert_same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryRanOut("with --micro-batch 1")])
def test_memory_that_runs_out_is_one_sentence(error, settings, silent, monkeypatch, tmp_path):
    real, calls = BlockReconstructor.fit, []

    def starved(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return real(self, *args, **kwargs)

    monkeypatch.setattr(BlockReconstructor, "fit", starved)
    said = error if isinstance(error, MemoryRanOut) else "memory ran out"
    with pytest.raises(EBFTError, match=rf"^{said}; what was finished is kept in .*: --resume goes on from"):
        run(settings(), silent)
    monkeypatch.undo()
    run(settings(resume=True), silent)
    assert (tmp_path / "out" / "ebft_summary.json").exists()
