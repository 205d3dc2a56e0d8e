"""The mean squared error of a block's outputs, the published method's loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebft.recovery.protocol import Loss
from ebft.registry import register_loss

if TYPE_CHECKING:
    from torch import Tensor


@register_loss("mse")
class MeanSquare(Loss):
    """The mean squared error."""

    is_mean_square, needs_energies = True, False

    def of_tokens(self, output: Tensor, target: Tensor) -> Tensor:
        """See ``Loss``."""
        return (output - target).square().mean(-1)
