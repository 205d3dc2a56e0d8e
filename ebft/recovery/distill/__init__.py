"""``--recover distill``: all blocks tuned together, under their masks, towards what the dense model predicts.

    minimise over W:  (1 - share) KL(dense || f(tokens; M * W))  +  share CE(text)

What a block cannot see, that its errors add up with those of the others, this does; so it follows the walk
(``ebft+distill``), or pruning alone. ``stack.py`` takes a step, a block at a time; ``tune.py`` takes many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ebft.config.fields import setting
from ebft.recovery.protocol import WholeModelRecovery
from ebft.recovery.settings import Betas, Clipping, GradientCheckpointing, Moments, SurvivorsOnly
from ebft.registry import register_recovery

if TYPE_CHECKING:
    from ebft.recovery.whole_model import WholeResult, WholeTask


@register_recovery("distill", scope="model")
class Distillation(WholeModelRecovery):
    """Tunes every block at once towards the dense model's predictions, and the text."""

    told = "as a whole towards the dense model's predictions"
    holds_the_model = False

    @dataclass(frozen=True)
    class Settings(Clipping, GradientCheckpointing, Betas, Moments, SurvivorsOnly):
        """Of distillation."""

        distill_epochs: int = setting(
            2, "most passes over the calibration sequences; the weights that validation likes best are kept", at_least=1
        )
        distill_lr: float | None = setting(
            None,
            "learning rate, a share of the root mean square of each matrix's kept weights (default: found by "
            "validation)",
            above=0,
        )
        distill_text: float = setting(
            0.5,
            "share of the text's own cross-entropy in the loss; the rest is the divergence from the dense model",
            at_least=0,
            at_most=1,
        )
        distill_blocks: str = setting(
            "auto",
            "where blocks and the optimizer's states are kept: all on the device; or on the host, from where each "
            "comes when it is its turn (activations are then made again); auto: the device where they fit",
            choices=("auto", "device", "host"),
        )
        distill_top: int = setting(64, "likeliest tokens of the dense model that are kept of each place", at_least=1)

    def recover(self, task: WholeTask) -> WholeResult:
        """See ``WholeModelRecovery``."""
        from ebft.recovery.distill.tune import distill

        return distill(task, self.config, self.settings)
