"""What a block is tuned by: a loss, with tokens counted alike or by what the block adds; and how it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ebft.config import EBFTConfig
from ebft.recovery.ebft import EBFT
from ebft.recovery.losses.mse import MeanSquare
from ebft.recovery.protocol import Loss
from ebft.recovery.samples import Energies, Errors
from ebft.registry import losses
from ebft_kernels import reconstruction_loss_and_gradient


class Measured(NamedTuple):
    """A block on some samples: its mean squared error, which is reported, and the loss, by which it is judged."""

    error: float
    loss: float


@dataclass(frozen=True)
class Objective:
    """The mean over tokens t of   w_t loss(f_t, Y_t).

    f is what the block gives, Y what it should give, X what it is given; all numbers are those of the sequences that
    the block is tuned on. With ``--token-weights norm`` w_t = b / ||Y_t - X_t||^2, b such that they are 1 in the mean,
    for tokens whose hidden states are enormous (attention sinks, arXiv 2402.17762); otherwise 1.

    Attributes:
        loss: of a token.
        tokens: of the energies ||Y_t - X_t||^2 / width, the floor, and what the reciprocal of one is multiplied by;
            scalars; None for weights of 1.
    """

    loss: Loss = MeanSquare()  # noqa: RUF009  (it has no state)
    tokens: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, config: EBFTConfig, energies: Callable[[], Energies]) -> Objective:
        """As the settings want it; ``energies`` are asked for where they are needed."""
        settings = config.of_method(EBFT.Settings)
        loss, weighted = losses[settings.loss](), settings.token_weights == "norm"
        if not loss.needs_energies and not weighted:
            return cls(loss)
        of_block = energies()
        loss.fit(of_block)
        return cls(loss, (of_block.floor, of_block.token_scale) if weighted else None)

    @property
    def plain(self) -> bool:
        """Whether it is the mean squared error."""
        return self.loss.is_mean_square and self.tokens is None

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
        of_token = self.loss.of_tokens(output, target)
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
