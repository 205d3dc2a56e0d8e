"""The interface of a recovery inside the walk: a pruned block and what it should do, in; the block changed, out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebft.model.matrices import Matrix
from ebft.pruning import Statistics
from ebft.distributed import Ranks
from ebft.data.streams import carry
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
        dense_inputs: what it was given, as ``inputs``; None where ``config.uses_dense_inputs`` does not ask for them.
        statistics: what flowed into its matrices in the pass that made ``targets``, of all samples: what the masker and
            the recovery need of it. Who uses it last takes it out, because it may be large.
        on_step: called with (steps done, steps in all).
        scratch: room for as much as ``targets``, where they are; the same one whenever it is asked for.
        following: makes the next block, with targets in ``scratch``; None for the last block, and where
            ``config.by_pairs`` does not ask for it.
        only: names of the parameters that are recovered; None for all.
        epochs: gives how many a recovery that has epochs may take, from the relative error of the pruned block; None
            for ``config.epochs``.
        error_before: mean squared error before the recoveries that came before in a sum; None for the first.
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
    epochs: Callable[[float], int] | None = None
    error_before: float | None = None

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


class BlockRecovery(Protocol):
    """One way to recover a block; one object serves all blocks.

    Attributes:
        needs: statistics of the pass that makes the targets that it looks at (``InputStatistics``).
    """

    @property
    def needs(self) -> frozenset[str]:
        """See above."""

    def recover(self, task: BlockTask) -> BlockResult:
        """Recover ``task.block`` in place; ``EBFTError`` where that cannot be done."""


@dataclass(frozen=True)
class Chain:
    """Recoveries one after the other, each of what the one before has left."""

    links: Sequence[BlockRecovery]

    @property
    def needs(self) -> frozenset[str]:
        """See ``BlockRecovery``."""
        return frozenset[str]().union(*(link.needs for link in self.links))

    def recover(self, task: BlockTask) -> BlockResult:
        """Recover ``task.block`` by all of them; errors are those before the first and after the last."""
        results: list[BlockResult] = []
        for place, link in enumerate(self.links):
            part = replace(
                task,
                masks={**task.masks, **_masks_of(results)},
                on_step=partial(task.told, place, len(self.links)),
                error_before=results[0].error_before if results else None,
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
    )


def _masks_of(results: Sequence[BlockResult]) -> dict[str, PackedMask]:
    return {name: mask for result in results for name, mask in result.masks.items()}


# --- samples and errors ---------------------------------------------------------------------------------------------


def batch_order(samples: int, seed: int, block: int, epoch: int) -> Tensor:
    """A permutation of the samples that depends on (seed, block, epoch) alone, so that a resumed run has the same."""
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + block) * 1_000_003 + epoch) % 2**63)
    return torch.randperm(samples, generator=generator)


@dataclass(frozen=True)
class Split:
    """Which of all samples a block is tuned on, and which are held out to judge it by.

    Attributes:
        tuned, held_out: their numbers among all samples of all ranks, int64, ascending.
        share: the numbers that this rank holds.
    """

    tuned: Tensor
    held_out: Tensor
    share: slice

    @classmethod
    def of(cls, samples: int, held_out_share: float, ranks: Ranks) -> Split:
        """``held_out_share`` of the samples held out, spread evenly over them: at least one and not all, but for 0."""
        numbers = torch.arange(samples)
        count = min(max(1, round(samples * held_out_share)), samples - 1) if held_out_share else 0
        held = (numbers + 1) * count // samples > numbers * count // samples
        return cls(numbers[~held], numbers[held], ranks.share(samples))

    @property
    def probe(self) -> Tensor:
        """The samples that errors are measured on between epochs: the first sixteenth of those tuned on."""
        return self.tuned[: max(1, len(self.tuned) // 16)]

    def here(self, numbers: Tensor) -> Tensor:
        """Where this rank has those of the samples that it holds."""
        return numbers[(numbers >= self.share.start) & (numbers < self.share.stop)] - self.share.start


@dataclass
class Errors:
    """Mean squared errors of a block, over the samples of all ranks.

    Attributes:
        device: where the block is.
        at_once: samples that go through it together.
    """

    inputs: Tensor
    targets: Tensor
    split: Split
    device: torch.device
    ranks: Ranks
    at_once: int

    @torch.no_grad()
    def of(self, forward: Callable[[Tensor], Tensor], numbers: Tensor) -> float:
        """The mean of (forward(X) - Y)^2 over these samples. A sync point."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for x, y in self.batches(numbers):
            total += F.mse_loss(forward(x), y, reduction="sum")
        return self._mean(total, numbers)

    def batches(self, numbers: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """X and Y of those of these samples that this rank holds, on the device."""
        parts = [part for part in self.split.here(numbers).split(self.at_once) if len(part)]
        return carry(self.device, (self.inputs, self.targets), parts)

    def branch_energy(self) -> float:
        """The mean of (X - Y)^2 over the probe. A sync point."""
        rows = self.split.here(self.split.probe)
        energy = F.mse_loss(self.inputs[rows].float(), self.targets[rows].float(), reduction="sum").double().cpu()
        return self._mean(energy, self.split.probe)

    def _mean(self, total: Tensor, numbers: Tensor) -> float:
        self.ranks.add_([total])
        return float(total) / (len(numbers) * self.targets.shape[1:].numel())


def samples_of_all(inputs: Tensor, ranks: Ranks) -> int:
    """How many samples all ranks hold together. A sync point."""
    count = torch.tensor(len(inputs))
    ranks.add_([count])
    return int(count)
