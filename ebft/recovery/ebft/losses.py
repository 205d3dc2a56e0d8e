"""What is minimised: the mean squared error of a block's outputs, or one that counts channels or tokens otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ebft.config.config import EBFTConfig
from ebft.distributed import Ranks
from ebft.recovery.task import Errors
from ebft_kernels import reconstruction_loss_and_gradient

FLOOR = 0.1  # of the geometric mean of all energies: none smaller than that is divided by


class Measured(NamedTuple):
    """A block on some samples: its mean squared error, which is reported, and the loss, by which it is judged."""

    error: float
    loss: float


@dataclass(frozen=True)
class Loss:
    """The mean over tokens t of   w_t ( mean over channels j of c_j (f_tj - Y_tj)^2  +  s (1 - cos(f_t, Y_t)) ).

    f is what the block gives, Y what it should give, X what it is given; all numbers are those of the sequences that
    the block is tuned on. Without settings w = c = 1 and s = 0: the mean squared error.

    ``--loss channel``: c_j = a / E_j with E_j = mean over tokens of (Y_tj - X_tj)^2, and a such that the c_j are 1 in
        the mean, so that a channel to which the block adds little is not drowned by those to which it adds much.
    ``--loss cosine``: s = 2 exp(mean over tokens of log(||Y_t||^2 / width)). An error e_t that is small and at right
        angles to Y_t costs 1 - cos = ||e_t||^2 / 2 ||Y_t||^2, so in a token of usual size as much as in the square.
    ``--token-weights norm``: w_t = b / ||Y_t - X_t||^2, b such that they are 1 in the mean, for tokens whose hidden
        states are enormous (attention sinks, arXiv 2402.17762).

    An E_j or a ||Y_t - X_t||^2 of less than a tenth of their geometric mean counts as that tenth.

    Attributes:
        channels: c (width,), float64; None for 1.
        tokens: of the energies ||Y_t - X_t||^2 / width, the floor, and what the reciprocal of one is multiplied by;
            scalars; None for weights of 1.
        cosine: s, a scalar; None for 0.
    """

    channels: Tensor | None = None
    tokens: tuple[Tensor, Tensor] | None = None
    cosine: Tensor | None = None

    @classmethod
    def even(cls, config: EBFTConfig, width: int) -> Loss:
        """As the settings want it, with weights that are all 1: it takes the memory that any takes."""
        one = torch.ones(())
        return cls(
            channels=torch.ones(width, dtype=torch.float64) if config.loss == "channel" else None,
            tokens=(one, one) if config.token_weights == "norm" else None,
            cosine=one if config.loss == "cosine" else None,
        )

    @classmethod
    @torch.no_grad()
    def of(cls, config: EBFTConfig, errors: Errors) -> Loss:
        """As the settings want it, with the weights that one pass over the samples tuned on gives. A sync point."""
        if config.loss == "mse" and config.token_weights == "none":
            return cls()
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
        weights = 1 / channels.clamp(min=FLOOR * _geometric_mean(channels, Ranks()))
        token, size = torch.cat(branches), _geometric_mean(torch.cat(sizes), ranks)
        floor = FLOOR * _geometric_mean(token, ranks)
        sums = torch.stack([torch.ones_like(token).sum(), (1 / token.clamp(min=floor)).sum()])
        ranks.add_([sums])
        return cls(
            channels=weights / weights.mean() if config.loss == "channel" else None,
            tokens=(floor, sums[0] / sums[1]) if config.token_weights == "norm" else None,
            cosine=2 * size if config.loss == "cosine" else None,
        )

    @property
    def plain(self) -> bool:
        """Whether it is the mean squared error."""
        return self.channels is None and self.tokens is None and self.cosine is None

    def __call__(self, output: Tensor, target: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient with respect to ``output``; all (batch, seqlen, width)."""
        if self.plain:
            return reconstruction_loss_and_gradient(output, target)
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            loss = self.value(leaf, target, inputs)
            (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient

    def value(self, output: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
        """The loss."""
        squares = (output - target).square()
        of_token = (squares if self.channels is None else squares * self.channels.to(squares.dtype)).mean(-1)
        if self.cosine is not None:
            of_token = of_token + self.cosine * (1 - F.cosine_similarity(output, target, dim=-1))
        if self.tokens is not None:
            floor, scale = self.tokens
            of_token = of_token * (scale / (target - inputs).square().mean(-1).clamp(min=floor))
        return of_token.mean()

    @torch.no_grad()
    def measured(self, errors: Errors, forward: Callable[[Tensor], Tensor], numbers: Tensor) -> Measured:
        """Error and loss on these samples, in one pass. A sync point."""
        if self.plain:
            error = errors.of(forward, numbers)
            return Measured(error, error)
        return _measured(errors, forward, numbers, self.value)


@torch.no_grad()
def measured_by_token(errors: Errors, forward: Callable[[Tensor], Tensor], numbers: Tensor) -> Measured:
    """A block on samples held out: error, and the mean over tokens of ||f_t - Y_t||^2 / ||Y_t||^2. A sync point.

    The next block sees hidden states through a norm, so an error counts by the size of its token. In the plain error
    the few tokens whose states are enormous (attention sinks, arXiv 2402.17762) outweigh all others, and what becomes
    of the sinks of a few sequences says little of the rest.
    """

    def by_size(output: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
        size = target.square().mean(-1).clamp_min(torch.finfo(target.dtype).tiny)
        return ((output - target).square().mean(-1) / size).mean()

    return _measured(errors, forward, numbers, by_size)


def _measured(
    errors: Errors,
    forward: Callable[[Tensor], Tensor],
    numbers: Tensor,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Measured:
    """Error and ``loss`` (of output, target and inputs), in one pass over these samples of all ranks."""
    totals = torch.zeros(2, dtype=torch.float64, device=errors.device)
    for x, y in errors.batches(numbers):
        output = forward(x)
        totals += len(x) * torch.stack([F.mse_loss(output, y), loss(output, y, x)])
    errors.ranks.add_([totals])
    mean, of_loss = (totals / len(numbers)).tolist()
    return Measured(mean, of_loss)


def _geometric_mean(energies: Tensor, ranks: Ranks) -> Tensor:
    """Of those on all ranks that are not 0."""
    logarithms = energies[energies > 0].log()
    sums = torch.stack([logarithms.sum(), torch.ones_like(logarithms).sum()])
    ranks.add_([sums])
    return (sums[0] / sums[1].clamp(min=1)).exp()
