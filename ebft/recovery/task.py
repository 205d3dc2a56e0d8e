"""The interface of a recovery inside the walk: a pruned block and what it should do, in; the block changed, out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ebft.config import EBFTConfig
from ebft.model.matrices import Matrix
from ebft.pruning.statistics import Statistics
from ebft.recovery.protocol import BlockRecovery, Place, WholeModelRecovery
from ebft.registry import recoveries
from ebft_kernels import PackedMask

Forward = Callable[[nn.Module, Tensor], Tensor]  # (block, hidden states) -> hidden states after it, float32


@dataclass(frozen=True)
class Following:
    """The block after the one at hand, ahead of its turn.

    Attributes:
        block, matrices, masks, forward: as in ``BlockTask``; pruned as far as that can be known now.
        targets: what it should give where the block at hand gives its own targets.
    """

    block: nn.Module
    matrices: Sequence[Matrix]
    masks: Mapping[str, PackedMask]
    forward: Forward
    targets: Tensor


@dataclass(frozen=True)
class BlockTask:
    """A pruned block, and what it is recovered from.

    Attributes:
        index: its number; with the seed it determines whatever is random.
        block: float32, on the device; recovered in place. Its weights at pruned places are zero, and stay so.
        matrices: those of its parameters that have masks.
        masks: parameter name -> kept weights, in the parameter's shape.
        inputs, targets: (samples, seqlen, width), float32 or bfloat16, in any memory; of several ranks, this one's
            share of all samples.
        forward: hidden states through the block.
        dense_block: makes the block that ``targets`` came from, to work with and to throw away.
        dense_forward: hidden states through that one.
        dense_inputs: what it was given, as ``inputs``; None where ``needs_dense_inputs`` does not ask for them.
        statistics: what flowed into its matrices in the pass that made ``targets``, of all samples: what the masker and
            the recovery need of it. Who uses it last takes it out, because it may be large.
        on_step: called with (steps done, steps in all).
        scratch: room for as much as ``targets``, where they are; the same one whenever it is asked for.
        following: makes the next block, with targets in ``scratch``; None for the last block, and where
            ``blocks_at_once`` does not ask for it.
        only: names of the parameters that are recovered; None for all.
        finished: the lines of ``blocks.jsonl`` of the blocks before, as far as they are known.
        blocks: how many the model has.
        error_before: mean squared error before the recoveries that came before in a sum; None for the first.
        seconds: that the recovery may take; None for as long as its own settings say.
    """

    index: int
    block: nn.Module
    matrices: Sequence[Matrix]
    masks: Mapping[str, PackedMask]
    inputs: Tensor
    targets: Tensor
    forward: Forward
    dense_block: Callable[[], nn.Module]
    dense_forward: Forward
    dense_inputs: Tensor | None
    statistics: Statistics
    on_step: Callable[[int, int], None]
    scratch: Callable[[], Tensor]
    following: Callable[[], Following] | None = None
    only: frozenset[str] | None = None
    finished: Sequence[Mapping[str, Any]] = ()
    blocks: int = 1
    error_before: float | None = None
    seconds: float | None = None

    def told(self, place: int, places: int, done: int, steps: int) -> None:
        """``on_step`` of a part of the task: the one at ``place`` of ``places`` alike."""
        self.on_step(place * steps + done, places * steps)


@dataclass(frozen=True)
class BlockResult:
    """What recovering a block did.

    Attributes:
        losses: what is minimised (``--loss``) in every step, before that step.
        gradient_norms: the gradient's L2 norm over kept weights of every step, before clipping; NaN with
            ``update_in_backward``, which never has all gradients.
        error_before, error_after: mean squared error on the probe samples, a sixteenth of those tuned on.
        branch_energy: mean of (Y - X)^2 on them, how far the targets are from the inputs; error / energy is the
            relative error.
        seconds: time that the steps took, with the errors on the probe between epochs.
        notes: what is worth a line in the report, a sentence each.
        held_out_before, held_out_after: mean squared error on the samples that were held out; None without any.
        masks: parameter name -> kept weights, of the matrices whose masks are others now.
        epochs: that were taken.
        learning_rate: that was taken, at its highest; None where there was none.
        trial_steps: what it cost to find it, in steps.
    """

    losses: list[float]
    gradient_norms: list[float]
    error_before: float
    error_after: float
    branch_energy: float
    seconds: float
    notes: list[str]
    held_out_before: float | None = None
    held_out_after: float | None = None
    masks: Mapping[str, PackedMask] = field(default_factory=dict)
    epochs: int = 0
    learning_rate: float | None = None
    trial_steps: float = 0.0


@dataclass(frozen=True)
class Chain:
    """Recoveries one after the other, each of what the one before has left."""

    links: Sequence[BlockRecovery]

    @property
    def needs(self) -> frozenset[str]:
        """See ``Recovery``."""
        return frozenset[str]().union(*(link.needs for link in self.links))

    @property
    def needs_dense_inputs(self) -> bool:
        """See ``Recovery``."""
        return any(link.needs_dense_inputs for link in self.links)

    @property
    def changes_masks(self) -> bool:
        """See ``Recovery``."""
        return any(link.changes_masks for link in self.links)

    @property
    def blocks_at_once(self) -> int:
        """See ``Recovery``."""
        return max((link.blocks_at_once for link in self.links), default=1)

    def prepare(self, place: Place) -> None:
        """See ``Recovery``."""
        for link in self.links:
            link.prepare(place)

    def recover(self, task: BlockTask) -> BlockResult:
        """Recover ``task.block`` by all of them; errors are those before the first and after the last."""
        results: list[BlockResult] = []
        for place, link in enumerate(self.links):
            part = replace(
                task,
                masks={**task.masks, **_masks_of(results)},
                on_step=partial(task.told, place, len(self.links)),
                error_before=results[0].error_before if results else None,
                seconds=None if task.seconds is None else task.seconds - sum(result.seconds for result in results),
            )
            results.append(link.recover(part))
        return in_turn(results)


def in_turn(results: Sequence[BlockResult]) -> BlockResult:
    """What recoveries of a block one after the other have done together."""
    return replace(
        results[-1],
        losses=[loss for result in results for loss in result.losses],
        gradient_norms=[norm for result in results for norm in result.gradient_norms],
        error_before=results[0].error_before,
        held_out_before=results[0].held_out_before,
        seconds=sum(result.seconds for result in results),
        notes=[note for result in results for note in result.notes],
        masks=_masks_of(results),
        epochs=sum(result.epochs for result in results),
        trial_steps=sum(result.trial_steps for result in results),
    )


def _masks_of(results: Sequence[BlockResult]) -> dict[str, PackedMask]:
    return {name: mask for result in results for name, mask in result.masks.items()}


def make_recoveries(config: EBFTConfig) -> tuple[Chain | None, dict[str, WholeModelRecovery]]:
    """What is done to every block once it is pruned, None for nothing; and to the whole model after the walk."""
    links = [recoveries[name](config) for name in config.block_recoveries]
    whole = {name: recoveries[name](config) for name in config.whole_model_recoveries}
    return Chain(links) if links else None, whole
