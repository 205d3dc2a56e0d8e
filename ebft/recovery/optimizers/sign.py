"""Lion under the mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ebft.recovery.protocol import Optimizer
from ebft.recovery.settings import Betas
from ebft.registry import register_optimizer


@register_optimizer("sign")
class Lion(Optimizer):
    """Lion (arXiv 2302.06675): the sign of a momentum."""

    @dataclass(frozen=True)
    class Settings(Betas):
        """Of Lion."""

    def make(self, groups: list[dict[str, Any]], *, lr: float, masks: Mapping[Any, Any], seed: int) -> Any:
        """See ``Optimizer``."""
        from ebft.recovery.optimizers.masked import MaskedLion

        return MaskedLion(groups, lr=lr, betas=self.settings.betas, masks=masks)
