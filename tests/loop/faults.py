"""Runs in processes of their own, that can be killed: forked from one that has imported everything already."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from rich.console import Console

import ebft.pipeline.run
from ebft import EBFTConfig, EBFTError, run_ebft
from ebft.data.streams import Streams
from ebft.output.folder import OutputFolder
from ebft.output.terminal import Reporter
from ebft.run import main

_ASKING = threading.Lock()
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ebft.pipeline.run", "ebft.run"])
# What makes files last, and moves or removes them: between any two of these calls a run may end.
POINTS = ("fsync", "replace", "rename", "rmdir")
TIMES = ("seconds", "stage_seconds", "tuning_seconds", "peak_memory", "peak_memory_bytes")


def in_child(work, *arguments) -> int:
    """The exit code of ``work(*arguments)`` in a child; a signal's number is negative.

    Threads may call this at once: starting a process asks after all others, and of two that ask after one at the same
    time only one is told how it ended (the other: 255).
    """
    child = CONTEXT.Process(target=work, args=arguments)
    with _ASKING:
        child.start()
    ended = wait([child.sentinel], 120)
    with _ASKING:
        child.join(0 if not ended else None)
        assert child.exitcode is not None, "the child hangs"
        return child.exitcode


def job(settings: dict, kill_at: int = 0, calls: Path | None = None) -> None:
    """A run that SIGKILL ends before its ``kill_at``-th call of ``POINTS``; how many there were goes to ``calls``."""
    torch.set_num_threads(1)
    ebft.pipeline.run.report_page = lambda summary, lines: ""  # matplotlib takes longer than the run
    made = []

    def counted(real):
        def call(*args, **kwargs):
            made.append(real.__name__)
            if len(made) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in POINTS:
        setattr(os, name, counted(getattr(os, name)))
    run_ebft(config=EBFTConfig.preset("demo", **settings), reporter=Reporter(Console(file=io.StringIO())))
    if calls:
        calls.write_text(json.dumps(made))


def command(flags: list[str], said: Path, send: int = 0, after: int = 1) -> None:
    """The command line, its standard error in ``said``; sends itself a signal once ``after`` blocks are committed."""
    torch.set_num_threads(1)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # which a shell turns off in what it runs in the background
    ebft.pipeline.run.report_page = lambda summary, lines: ""
    commit = OutputFolder.commit_part

    def commit_part(self, name, content, files=()):
        commit(self, name, content, files)
        if send and name == f"block-{after - 1:05d}":
            os.kill(os.getpid(), send)

    OutputFolder.commit_part = commit_part
    with said.open("w") as out, contextlib.redirect_stderr(out):
        code = main(flags)
    sys.exit(code)


def refused(settings: dict) -> str:
    """The sentence that a run fails with, in this process."""
    with pytest.raises(EBFTError) as error:
        run_ebft(config=EBFTConfig.preset("demo", **settings), reporter=Reporter(Console(file=io.StringIO())))
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_same(one: Path, other: Path) -> None:
    """Two outputs hold the same, bit for bit, but for what time it took."""
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    for name in names:
        if name.endswith((".safetensors", ".index.json")) or name in ("config.json", "tokenizer.json"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert _lines(one) == _lines(other)
    mine, theirs = (json.loads((folder / "ebft_summary.json").read_text()) for folder in (one, other))
    for name in ("perplexity", "sparsity", "calibration", "evaluation", "versions"):
        assert mine[name] == theirs[name], name


def _lines(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "blocks.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


@contextlib.contextmanager
def stopped_at_pass(number):
    """A run inside ends where the sparse stream is moved on for the ``number``-th time; it must come so far."""

    class Stop(Exception):
        pass

    real, passes = Streams.sparse_pass, []

    def stopped(self, run):
        passes.append(run)
        if len(passes) == number:
            raise Stop
        return real(self, run)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Streams, "sparse_pass", stopped)
        with pytest.raises(Stop):
            yield
