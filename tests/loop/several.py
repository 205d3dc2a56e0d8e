"""What several processes of a test do, and how they are started; apart from the tests, which a child cannot import."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path
from unittest import mock

import torch
from faults import CONTEXT, job
from torch import nn

from ebft import EBFTConfig
from ebft.distributed import joined
from ebft.output.checkpoint import Checkpoint
from ebft.output.folder import OutputFolder
from ebft.pipeline import walk
from ebft.recovery.distill.stack import Stack
from ebft.recovery.ebft.reconstruct import BlockReconstructor
from ebft_kernels import PackedMask

CPU = torch.device("cpu")


def on_ranks(count: int, work, *arguments) -> list[int]:
    """The exit codes of ``work(*arguments)`` on so many ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [CONTEXT.Process(target=as_rank, args=(rank, count, port, work, arguments)) for rank in range(count)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode is not None, "a rank hangs"
    return [rank.exitcode for rank in ranks]


def as_rank(rank: int, count: int, port: int, work, arguments) -> None:
    """What torchrun does, without its seconds."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    work(*arguments)


def script(file: Path, arguments: list[str]) -> None:
    """``python FILE ARGUMENTS``."""
    sys.path.insert(0, str(file.parent))
    sys.argv = [str(file), *arguments]
    runpy.run_path(str(file))


class Block(nn.Module):
    """Two matrices in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(12, 20, dtype=torch.float64), nn.Linear(20, 12, dtype=torch.float64)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(torch.tanh(self.up(hidden)))


def tune(out: Path, changes: dict) -> None:
    """20 steps on this rank's share of 10 samples; the first rank writes what came of it."""
    config = EBFTConfig.preset("paper", samples=10, batch_size=4, epochs=7, lr=1e-2, **changes)
    generator = torch.Generator().manual_seed(1)
    inputs, targets = (torch.randn(10, 3, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    block = Block()
    masks = {
        name: PackedMask.from_dense(torch.rand(w.shape, generator=generator) > 0.5)
        for name, w in block.named_parameters()
        if w.ndim == 2
    }
    with joined() as ranks:
        mine = ranks.share(10)
        result = BlockReconstructor(config, CPU, ranks=ranks).fit(
            block, inputs[mine], targets[mine], masks=masks, forward=lambda module, hidden: module(hidden)
        )
        assert all(weights == ranks.gathered(weights)[0] for weights in [[w.tolist() for w in block.parameters()]])
        if ranks.rank == 0:
            numbers = [result.losses, result.gradient_norms, [result.error_before, result.error_after]]
            numbers += [[result.branch_energy], *(w.flatten().tolist() for w in block.parameters())]
            out.write_text(json.dumps(numbers))


def dies_distilling(given: dict) -> None:
    """A run that is killed in the third step of its distillation."""
    step, taken = Stack.step, []

    def last(self, *arguments):
        taken.append(arguments)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments)

    Stack.step = last
    job(given)


def dies_after_a_checkpoint(given: dict) -> None:
    """A run that is killed in the second step after the first checkpoint of its distillation, which it writes early."""
    step, write, since = Stack.step, Checkpoint.write, []

    def written(self, *state):
        write(self, *state)
        since.append(0)

    def last(self, *arguments):
        if since:
            since[0] += 1
            if since[0] == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments)

    Checkpoint.is_due = lambda self, size: size > 0
    Checkpoint.write, Stack.step = written, last
    job(given)


def goes_on_without_trials(given: dict) -> None:
    """A run that may not look for a rate any more."""
    with mock.patch("ebft.recovery.distill.tune._Tuner._search", side_effect=AssertionError):
        job(given)


def dies(given: dict, part: str) -> None:
    """A run whose last rank is killed once a part is committed."""
    first, last = OutputFolder.commit_part, int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1

    def commit_part(self, name, content, files=()):
        first(self, name, content, files)
        if last and name == part:
            os.kill(os.getpid(), signal.SIGKILL)

    OutputFolder.commit_part = commit_part
    if last and "input" not in given:  # with shared sequences only the first rank commits: the last dies in its work
        masker = walk.apply_masks
        seen = []

        def apply_masks(block, masks):
            seen.append(block)
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return masker(block, masks)

        walk.apply_masks = apply_masks
    job(given)
