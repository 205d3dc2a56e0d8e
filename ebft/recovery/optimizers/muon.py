"""Muon under the mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ebft.recovery.protocol import Optimizer
from ebft.recovery.settings import Betas
from ebft.registry import register_optimizer


@register_optimizer("muon")
class Muon(Optimizer):
    """Muon, as torch has it, for matrices, and AdamW for norms and biases."""

    @dataclass(frozen=True)
    class Settings(Betas):
        """Of Muon."""

    def make(self, groups: list[dict[str, Any]], *, lr: float, masks: Mapping[Any, Any], seed: int) -> Any:
        """See ``Optimizer``."""
        from ebft.recovery.optimizers.masked import MaskedMuon

        return MaskedMuon(groups, lr=lr, betas=self.settings.betas, masks=masks)
