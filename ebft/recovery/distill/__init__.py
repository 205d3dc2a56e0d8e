"""``--recover distill``: all blocks tuned together, under their masks, towards what the dense model predicts.

    minimise over W:  (1 - share) KL(dense || f(tokens; M * W))  +  share CE(text)

What a block cannot see, that its errors add up with those of the others, this does; so it follows the walk
(``ebft+distill``), or pruning alone. ``stack.py`` takes a step, a block at a time; ``tune.py`` takes many.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ebft.config.fields import setting
from ebft.errors import EBFTError
from ebft.recovery.protocol import Footprint, WholeModelRecovery
from ebft.recovery.settings import UNTIMED, Betas, Clipping, GradientCheckpointing, Moments, SurvivorsOnly
from ebft.registry import register_recovery

if TYPE_CHECKING:
    from ebft.config import EBFTConfig
    from ebft.model.decoder import Decoder
    from ebft.plan.shapes import Shapes
    from ebft.recovery.whole_model import WholeResult, WholeTask


@register_recovery("distill", scope="model")
class Distillation(WholeModelRecovery):
    """Tunes every block at once towards the dense model's predictions, and the text."""

    told = "as a whole towards the dense model's predictions"
    holds_the_model = False
    loss = "distillation loss"

    @dataclass(frozen=True)
    class Settings(Clipping, GradientCheckpointing, Betas, Moments, SurvivorsOnly):
        """Of distillation."""

        distill_epochs: int = setting(
            2,
            "passes over the calibration sequences; the weights that do best on the validation split are kept",
            at_least=1,
            needs=UNTIMED,
        )
        distill_lr: float | Literal["auto"] = setting(
            "auto",
            "learning rate, a share of the root mean square of each matrix's kept weights; auto: found by short trials "
            "on the validation split",
            above=0,
        )
        distill_text: float | Literal["auto"] = setting(
            "auto",
            "share of the text's own cross-entropy in the loss, the rest is the divergence from the dense model; auto: "
            "none, or half where a trial shows that it helps",
            at_least=0,
            at_most=1,
        )
        distill_blocks: str = setting(
            "auto",
            "where blocks and the optimizer's states are kept: all on the device; or on the host, from where each "
            "comes when it is its turn (activations are then made again); auto: the device where they fit",
            choices=("auto", "device", "host"),
        )
        distill_top: int = setting(64, "most likely tokens of the dense model stored per position", at_least=1)

    @classmethod
    def check(cls, config: EBFTConfig) -> None:
        """See ``Recovery``."""
        if config.data.samples < 2:
            raise EBFTError(
                "--recover distill holds a sequence out to judge by, and --samples is 1; expected 2 or more"
            )

    def check_room(self, decoder: Decoder) -> None:
        """See ``WholeModelRecovery``."""
        from ebft.recovery.distill.tune import host_memory_of

        needed = host_memory_of(decoder, self.config, self.settings)
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if needed > there:
            raise EBFTError(
                f"distillation of this model takes {needed / 2**30:.0f} GiB of the host's memory, which has "
                f"{there / 2**30:.0f}; expected a --recover without distill, such as ebft, or --moments int8"
            )

    def recover(self, task: WholeTask) -> WholeResult:
        """See ``WholeModelRecovery``."""
        from ebft.recovery.distill.tune import distill

        return distill(task, self.config, self.settings)

    def footprint(self, shapes: Shapes) -> Footprint:
        """See ``Recovery``."""
        from ebft.recovery.distill.footprint import footprint

        return footprint(self, shapes)

    def leaner(self, shapes: Shapes) -> Iterator[dict[str, Any]]:
        """See ``Recovery``: first what costs time, then what costs precision."""
        own = self.settings
        if own.distill_blocks != "host":
            if own.recompute == "none":
                yield {"recompute": "block"}
            yield {"distill_blocks": "host", "recompute": own.recompute}
        if not own.compact:
            yield {"compact": True}
        size = self.config.recover.at_once
        while size > 1:
            size //= 2
            yield {"micro_batch": size}
        for moments in {"fp32": ("bf16", "int8"), "bf16": ("int8",), "int8": ()}[own.moments]:
            yield {"moments": moments}
