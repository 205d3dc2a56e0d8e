"""The processes of a run: this one, or those that ``torchrun -m ebft.run …`` started, on torch's distributed engine.

Every rank walks over the blocks with the same settings. *Data-parallel*, each holds a share of the calibration
sequences; input statistics, gradients and errors are summed over ranks, so that masks and weights are the same
everywhere. *Block-parallel* (``--input dense-stream``, where blocks are independent), each takes every n-th block and
all sequences. What belongs to the whole run is written by the first rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ebft.errors import EBFTError

T = TypeVar("T")
CPU = torch.device("cpu")


class SaidByTheFirst(EBFTError):
    """An error of the first rank, which says it itself."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that share some work, seen from one of them; on its own it is the first of one, and nothing is sent.

    Attributes:
        rank: this one's number.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    def share(self, total: int) -> slice:
        """This rank's part of ``total`` things in a row; parts differ by at most one."""
        return slice(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def first(self, make: Callable[[], T]) -> T:
        """What ``make`` gives on the first rank, which alone calls it; an ``EBFTError`` of it is raised on all."""
        if self.count == 1:
            return make()
        said: list[Any] = [None, None]
        if self.rank == 0:
            try:
                said[0] = make()
            except EBFTError as error:
                with _answered():
                    dist.broadcast_object_list([None, str(error)], src=0, device=CPU)
                raise
        with _answered():
            dist.broadcast_object_list(said, src=0, device=CPU)
        result, fault = said
        if fault is not None:
            raise SaidByTheFirst(fault)
        return result

    def after_first(self, make: Callable[[], T]) -> T:
        """Every rank calls ``make``, the others once the first has done."""
        made: list[T] = []
        self.first(lambda: made.append(make()))
        return made[0] if made else make()

    def add_(self, tensors: Iterable[Tensor]) -> None:
        """Sum tensors over all ranks, in place; all then hold the same bits."""
        if self.count > 1:
            with _answered():
                for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                    work.wait()

    def all(self, here: bool) -> bool:
        """Whether it is so on every rank. A sync point."""
        elsewhere = torch.tensor(int(not here))
        self.add_([elsewhere])
        return not elsewhere

    def gathered(self, item: T) -> list[T]:
        """Every rank's ``item``, on all of them, by rank."""
        if self.count == 1:
            return [item]
        items: list[Any] = [None] * self.count
        with _answered():
            dist.all_gather_object(items, item)
        return items


@contextmanager
def _answered() -> Iterator[None]:
    """Say in one sentence that another rank is gone."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise EBFTError(f"another rank of this run does not answer any more: {reason}") from error


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of this run while inside: those of a process group that is there, or that torchrun asks for."""
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
    elif (count := _from_torchrun("WORLD_SIZE", least=1)) > 1 and "RANK" in os.environ:
        if _from_torchrun("RANK") >= count:
            raise EBFTError(f"the environment has RANK={os.environ['RANK']}; expected less than WORLD_SIZE, {count}")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(days=1))  # a block may take hours; torchrun sees deaths
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise EBFTError(f"this run's ranks cannot meet, as RANK and WORLD_SIZE ask them to: {reason}") from error
        yield Ranks(dist.get_rank(), dist.get_world_size())
        dist.destroy_process_group()  # not where this rank fails: the others may never come to it
    else:
        yield Ranks()


def own_device(device: str) -> str:
    """``cuda`` as the GPU that torchrun means this process to take; any other as it is."""
    return f"cuda:{_from_torchrun('LOCAL_RANK')}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def _from_torchrun(name: str, least: int = 0) -> int:
    """A whole number that torchrun puts into the environment."""
    value = os.environ.get(name, str(least))
    if not value.isdecimal() or int(value) < least:
        raise EBFTError(
            f"the environment has {name}={value}; expected a whole number of at least {least}, as torchrun sets it (or "
            "none, for a run of one process)"
        )
    return int(value)
