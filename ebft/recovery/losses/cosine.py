"""The mean squared error plus what the angle to the target costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ebft.recovery.protocol import Loss
from ebft.registry import register_loss

if TYPE_CHECKING:
    from torch import Tensor

    from ebft.recovery.samples import Energies


@register_loss("cosine")
class WithCosine(Loss):
    """The mean square plus s (1 - cos(f_t, Y_t)), with s = 2 exp(mean over tokens of log(||Y_t||^2 / width)).

    An error e_t that is small and at right angles to Y_t costs 1 - cos = ||e_t||^2 / 2 ||Y_t||^2, so in a token of
    usual size as much as in the square.
    """

    def fit(self, energies: Energies) -> None:
        """See ``Loss``."""
        self.scale = 2 * energies.usual_size

    def of_tokens(self, output: Tensor, target: Tensor) -> Tensor:
        """See ``Loss``."""
        from torch.nn.functional import cosine_similarity

        return (output - target).square().mean(-1) + self.scale * (1 - cosine_similarity(output, target, dim=-1))
