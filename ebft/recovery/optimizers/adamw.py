"""AdamW under the mask, in fused kernels, with its layouts of weights and states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ebft.config.fields import setting
from ebft.errors import EBFTError
from ebft.recovery.protocol import Optimizer
from ebft.recovery.settings import Betas, Moments, SurvivorsOnly
from ebft.registry import register_optimizer

if TYPE_CHECKING:
    from ebft.config import EBFTConfig
    from ebft.plan.shapes import Shapes


@register_optimizer("adamw")
class AdamW(Optimizer):
    """AdamW (arXiv 1711.05101), by ``ebft_kernels.MaskedAdamW``."""

    has_second_moments = True

    @dataclass(frozen=True)
    class Settings(Betas, Moments, SurvivorsOnly):
        """Of AdamW in ``--recover ebft``."""

        weights: str = setting(
            "fp32",
            "matrices while they are tuned: float32, bfloat16 with a float32 master, or bfloat16 rounded "
            "stochastically",
            choices=("fp32", "master", "stochastic"),
        )
        update_in_backward: bool = setting(
            False, "update a matrix as soon as its gradient is made, which is never kept (needs --clip 0)"
        )

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self.weights, self.updates_in_backward = self.settings.weights, self.settings.update_in_backward

    @classmethod
    def check(cls, config: EBFTConfig) -> None:
        """What cannot be had where a gradient is used before the others are known."""
        if not config.of_method(cls.Settings).update_in_backward:
            return
        if config.recover.micro_batch not in (None, config.recover.batch_size):
            raise EBFTError(
                f"--update-in-backward uses gradients before they are summed, and --micro-batch is "
                f"{config.recover.micro_batch}; expected {config.recover.batch_size}, the --batch-size"
            )

    def make(self, groups: list[dict[str, Any]], *, lr: float, masks: Mapping[Any, Any], seed: int) -> Any:
        """See ``Optimizer``."""
        from ebft_kernels import MaskedAdamW

        return MaskedAdamW(
            groups,
            lr=lr,
            betas=self.settings.betas,
            masks=masks,
            weights=self.settings.weights,
            moments=self.settings.moments,
            compact=self.settings.compact,
            update_in_backward=self.settings.update_in_backward,
            seed=seed,
        )

    def leaner_layouts(self, shapes: Shapes) -> Iterator[dict[str, Any]]:
        """See ``Recovery.leaner``: what costs little speed."""
        if not self.settings.compact:
            yield {"compact": True}
        if self.settings.weights == "fp32" and shapes.is_bfloat16:
            yield {"weights": "master"}

    def leaner_states(self, shapes: Shapes) -> Iterator[dict[str, Any]]:
        """See ``Recovery.leaner``: what costs bits."""
        for moments in {"fp32": ("bf16", "int8"), "bf16": ("int8",), "int8": ()}[self.settings.moments]:
            yield {"moments": moments}
        if self.settings.weights == "master" or (self.settings.weights == "fp32" and shapes.is_bfloat16):
            yield {"weights": "stochastic"}
