"""The mean squared error with every channel by its own energy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebft.recovery.protocol import Loss
from ebft.registry import register_loss

if TYPE_CHECKING:
    from torch import Tensor

    from ebft.recovery.samples import Energies


@register_loss("channel")
class ByChannel(Loss):
    """The mean over channels j of c_j (f_j - Y_j)^2, so that a channel to which the block adds little is not drowned.

    c_j = a / E_j with E_j = mean over tokens of (Y_tj - X_tj)^2, and a such that the c_j are 1 in the mean; an E_j of
    less than a tenth of their geometric mean counts as that tenth.
    """

    def fit(self, energies: Energies) -> None:
        """See ``Loss``."""
        from ebft.recovery.samples import floored

        weights = 1 / floored(energies.channels)
        self.channels = weights / weights.mean()  # (width,), float64

    def of_tokens(self, output: Tensor, target: Tensor) -> Tensor:
        """See ``Loss``."""
        squares = (output - target).square()
        return (squares * self.channels.to(squares.dtype)).mean(-1)
