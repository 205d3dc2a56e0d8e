"""Attention and MLP of a block: what recomputes them in turn, and what tunes them one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ebft.config import EBFTConfig
from ebft.data.streams import carry
from ebft.distributed import Ranks
from ebft.errors import EBFTError
from ebft.recovery.checkpointing import forward_replaced
from ebft.recovery.judge import Judge
from ebft.recovery.task import BlockResult, BlockTask, Forward, in_turn

if TYPE_CHECKING:
    from ebft.recovery.ebft.reconstruct import BlockReconstructor


def halves(block: nn.Module, masks: Iterable[str], flag: str = "--recompute") -> list[str]:
    """The names of the modules of ``block`` that hold its matrices between them: attention and MLP.

    Raises:
        EBFTError: matrices lie in ``block`` itself, or all in one module.
    """
    paths = [name.split(".") for name in masks]
    children = list(dict.fromkeys(path[0] for path in paths))
    if len(children) < 2 or any(len(path) < 3 for path in paths):
        raise EBFTError(
            f"{flag} halves: the matrices of {type(block).__name__} are in {', '.join(children)}; expected two "
            f"modules or more that hold them between them, such as attention and MLP ({flag} block takes any)"
        )
    return children


class HalfByHalf:
    """Tunes attention towards the dense block's hidden states after attention, then the MLP towards those after both.

    A block whose MLP gives zeros is its attention half, whatever norms and additions the family has in between. The
    dense one is given what the targets come from (``--target``). Each half takes along the norms and biases that
    matter to it; what the first has tuned the second leaves alone.

    Args:
        whole: what tunes a half, as if it were a block.
    """

    def __init__(
        self, config: EBFTConfig, device: torch.device, whole: BlockReconstructor, ranks: Ranks | None = None
    ) -> None:
        self._config, self._device, self._whole, self._ranks = config, device, whole, ranks or Ranks()
        self._at_once = config.recover.at_once

    def recover(self, task: BlockTask) -> BlockResult:
        """Both halves in turn; errors are those of the whole block, losses those of each half towards its target."""
        judge = Judge(task, self._config.recover, self._device, self._ranks)
        first, second, returned = self._in_order(task)
        targets = task.scratch()
        self._run_dense_half(task, second, returned, targets)
        some = task.inputs[:1].to(self._device).float()
        with _silent(task.block, second, returned):
            tuned = _reached(task.block, task.forward, some)
            results = [self._whole.recover(_part(task, 0, first, tuned, targets))]
        left = frozenset(name for name, _ in task.block.named_parameters()) - tuned
        results.append(self._whole.recover(_part(task, 1, second, left, task.targets)))
        return replace(in_turn(results), error_before=judge.before, held_out_before=judge.held_out_before)

    def _in_order(self, task: BlockTask) -> tuple[str, str, int]:
        """The halves' names in the order of their calls, and the length of the tuple that the second returns, or 0."""
        names = halves(task.block, task.masks, "--unit")
        called: dict[str, int] = {}
        with contextlib.ExitStack() as watched, torch.no_grad():
            for name in names:

                def see(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                    called[name] = len(output) if isinstance(output, tuple) else 0

                watched.callback(task.block.get_submodule(name).register_forward_hook(see).remove)
            task.forward(task.block, task.inputs[:1].to(self._device).float())
        if len(called) != 2:
            raise EBFTError(
                f"--unit halves: {type(task.block).__name__} has its matrices in {', '.join(names)}; expected two "
                "modules, such as attention and MLP (--unit block takes any)"
            )
        first, second = called
        return first, second, called[second]

    @torch.no_grad()
    def _run_dense_half(self, task: BlockTask, second: str, returned: int, targets: Tensor) -> None:
        """Fill ``targets`` with what the dense block gives without its second half."""
        dense = task.dense_block()
        source = task.inputs if self._config.recover.target == "sparse-stream" else task.dense_inputs
        assert source is not None
        with _silent(dense, second, returned):
            starts = range(0, len(source), self._at_once)
            rows = (slice(start, start + self._at_once) for start in starts)
            for (x,), out in zip(carry(self._device, [source], rows), targets.split(self._at_once), strict=True):
                out.copy_(task.dense_forward(dense, x))


def _part(task: BlockTask, place: int, half: str, only: frozenset[str], targets: Tensor) -> BlockTask:
    """A half as a task of its own."""
    return replace(
        task,
        matrices=[matrix for matrix in task.matrices if matrix.name.startswith(f"{half}.")],
        masks={name: mask for name, mask in task.masks.items() if name.startswith(f"{half}.")},
        targets=targets,
        only=only,
        on_step=partial(task.told, place, 2),
        seconds=None if task.seconds is None else task.seconds / 2,
    )


def _silent(block: nn.Module, half: str, returned: int) -> contextlib.AbstractContextManager[None]:
    """``block`` without one of its halves, which gives zeros while inside."""

    def zeros(*args: Any, **kwargs: Any) -> Any:
        hidden = torch.zeros_like(args[0] if args else next(iter(kwargs.values())))
        return (hidden, *[None] * (returned - 1)) if returned else hidden

    return forward_replaced(block.get_submodule(half), zeros)


def _reached(block: nn.Module, forward: Forward, hidden: Tensor) -> frozenset[str]:
    """Names of the parameters that what ``block`` makes of ``hidden`` depends on."""
    parameters = {name: p.requires_grad_() for name, p in block.named_parameters() if p.is_floating_point()}
    with torch.enable_grad():
        total = forward(block, hidden).sum()
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    block.requires_grad_(False)
    return frozenset(name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None)
