"""``--recover layerwise``: the closed form, layer by layer; ``solve.py`` has the system and how it is solved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ebft.config.fields import setting
from ebft.recovery.protocol import BlockRecovery, Footprint, Place
from ebft.recovery.settings import Checked
from ebft.registry import register_recovery

if TYPE_CHECKING:
    from ebft.config import EBFTConfig
    from ebft.plan.shapes import Shapes
    from ebft.recovery.task import BlockResult, BlockTask

SOLVED = 9  # tensors of rows while the closed form of a layer is made


@register_recovery("layerwise", scope="block")
class Layerwise(BlockRecovery):
    """The kept weights that come nearest to the dense layer's outputs, by least squares: no back-propagation."""

    @dataclass(frozen=True)
    class Settings(Checked):
        """Of the closed form."""

        cg_iterations: int = setting(20, "iterations of conjugate gradients in each layer", at_least=1)
        cg_damping: float = setting(
            0.01, "what holds weights where they were, as a share of the inputs' mean square", at_least=0
        )
        cg_inputs: str = setting(
            "sparse",
            "what a layer is solved on: its inputs in the dense block, or those that the layers solved before it give",
            choices=("dense", "sparse"),
        )

    def __init__(self, config: EBFTConfig) -> None:
        super().__init__(config)
        dense, split = self.settings.cg_inputs == "dense", config.recover.holdout > 0
        self.needs_dense_inputs = not dense or split
        # Of the pass that makes the targets; nothing with a validation split, which that pass does not tell apart.
        self.needs = frozenset({"gram", "sums"}) if dense and not split else frozenset()

    def prepare(self, place: Place) -> None:
        """See ``Recovery``."""
        from ebft.recovery.layerwise.solve import ClosedForm

        super().prepare(place)
        self._worker = ClosedForm(self.config, place.device, place.ranks)

    def recover(self, task: BlockTask) -> BlockResult:
        """See ``BlockRecovery``."""
        return self._worker.recover(task)

    def footprint(self, shapes: Shapes) -> Footprint:
        """See ``Recovery``."""
        from ebft.recovery.layerwise.solve import ROWS_AT_ONCE

        two = self.settings.cg_inputs == "sparse"
        systems = [
            m.experts * 2 * m.inputs**2 * two + SOLVED * min(m.outputs * m.inputs, ROWS_AT_ONCE)
            for m in shapes.matrices.values()
        ]
        grams = 0 if two else shapes.gram_bytes
        return Footprint(stages={"closed form, beside three blocks": 4 * (3 * shapes.largest + max(systems)) + grams})
