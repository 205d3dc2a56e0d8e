"""--unit pair: a block and the one after it are tuned together towards what both should give, and the first is kept.

A block that is tuned alone leaves errors that the next one may enlarge; tuned with it, towards the states after both,
it leaves those that the next one can take (cross-block reconstruction, arXiv 2406.15524). There windows of two overlap,
and a block goes on in the second from what the first has made of it. Here its tuning in the first is thrown away, and
begins anew from its pruned weights when its own turn comes: so finished blocks are all that a commit has to hold.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ebft.config import EBFTConfig
from ebft.distributed import Ranks
from ebft.recovery.judge import Judge
from ebft.recovery.task import BlockResult, BlockTask, Forward

if TYPE_CHECKING:
    from ebft.recovery.ebft.reconstruct import BlockReconstructor


class InPairs:
    """Tunes each block together with the next one, and the last one alone.

    Args:
        alone: what tunes a pair, as if it were a block; it looks at nothing of the dense block but its outputs.
    """

    def __init__(
        self, config: EBFTConfig, device: torch.device, alone: BlockReconstructor, ranks: Ranks | None = None
    ) -> None:
        self._config, self._device, self._alone, self._ranks = config, device, alone, ranks or Ranks()

    def recover(self, task: BlockTask) -> BlockResult:
        """Tune ``task.block`` in its pair; errors are those of the block itself, losses those of the pair."""
        if task.following is None:
            return self._alone.recover(task)
        judge = Judge(task, self._config.recover, self._device, self._ranks)
        of_pair = self._alone.recover(_pair(task))
        return judge.result(
            losses=of_pair.losses,
            gradient_norms=of_pair.gradient_norms,
            notes=of_pair.notes,
            seconds=of_pair.seconds,
            masks=of_pair.masks,
            epochs=of_pair.epochs,
            learning_rate=of_pair.learning_rate,
            trial_steps=of_pair.trial_steps,
        )


def _pair(task: BlockTask) -> BlockTask:
    """The block of ``task`` and the following one as one block, whose parameters' names begin with 0 and 1."""
    assert task.following is not None
    following = task.following()
    both = (task.matrices, task.masks), (following.matrices, following.masks)
    return replace(
        task,
        block=nn.ModuleList([task.block, following.block]),
        matrices=[
            replace(matrix, name=f"{place}.{matrix.name}")
            for place, (of_one, _) in enumerate(both)
            for matrix in of_one
        ],
        masks={f"{place}.{name}": mask for place, (_, of_one) in enumerate(both) for name, mask in of_one.items()},
        targets=following.targets,
        forward=in_turn_through(task.forward, following.forward),
        following=None,
    )


def in_turn_through(*forwards: Forward) -> Forward:
    """Hidden states through the blocks of a pair in turn, each called in its own way."""

    def forward(blocks: nn.Module, hidden: Tensor) -> Tensor:
        for through, block in zip(forwards, blocks.children(), strict=True):
            hidden = through(block, hidden)
        return hidden

    return forward
