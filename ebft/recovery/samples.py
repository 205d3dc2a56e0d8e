"""The samples that a block is tuned on and judged by, and its errors on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ebft.data.streams import carry
from ebft.distributed import Ranks

FLOOR = 0.1  # of the geometric mean of all energies: none smaller than that is divided by


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


# --- energies -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Energies:
    """How large what a block adds to its inputs is, over the samples that it is tuned on.

    Attributes:
        channels: (width,), float64: the sum over tokens t of (Y_tj - X_tj)^2.
        floor: a scalar: the least ||Y_t - X_t||^2 / width of a token t that counts, a tenth of their geometric mean.
        token_scale: a scalar that makes the weights 1 / max(||Y_t - X_t||^2 / width, floor) 1 in the mean.
        usual_size: a scalar: the geometric mean of ||Y_t||^2 / width.
    """

    channels: Tensor
    floor: Tensor
    token_scale: Tensor
    usual_size: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, errors: Errors) -> Energies:
        """From one pass over the samples tuned on. A sync point."""
        width, ranks = errors.targets.shape[-1], errors.ranks
        channels = torch.zeros(width, dtype=torch.float64, device=errors.device)
        nothing = torch.empty(0, dtype=torch.float64, device=errors.device)
        branches, sizes = [nothing], [nothing]  # squares of every token, / width
        for x, y in errors.batches(errors.split.tuned):
            squares = (y - x).square().flatten(0, -2)
            channels += squares.sum(0, dtype=torch.float64)
            branches.append(squares.mean(1, dtype=torch.float64))
            sizes.append(y.flatten(0, -2).square().mean(1, dtype=torch.float64))
        ranks.add_([channels])
        token, size = torch.cat(branches), _geometric_mean(torch.cat(sizes), ranks)
        floor = FLOOR * _geometric_mean(token, ranks)
        sums = torch.stack([torch.ones_like(token).sum(), (1 / token.clamp(min=floor)).sum()])
        ranks.add_([sums])
        return cls(channels, floor, sums[0] / sums[1], size)

    @classmethod
    def even(cls, width: int) -> Energies:
        """All alike: for where only shapes matter."""
        one = torch.ones(())
        return cls(torch.ones(width, dtype=torch.float64), one, one, one)


def floored(energies: Tensor) -> Tensor:
    """None smaller than a tenth of their geometric mean, which is the same on all ranks."""
    return energies.clamp(min=FLOOR * _geometric_mean(energies, Ranks()))


def _geometric_mean(energies: Tensor, ranks: Ranks) -> Tensor:
    """Of those on all ranks that are not 0."""
    logarithms = energies[energies > 0].log()
    sums = torch.stack([logarithms.sum(), torch.ones_like(logarithms).sum()])
    ranks.add_([sums])
    return (sums[0] / sums[1].clamp(min=1)).exp()
