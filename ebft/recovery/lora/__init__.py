"""``--recover lora``: low-rank adapters on every pruned matrix, merged under the masks; ``adapters.py`` does it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ebft.config.fields import setting
from ebft.errors import EBFTError
from ebft.recovery.protocol import Place, WholeModelRecovery
from ebft.recovery.settings import LanguageModelTuning
from ebft.registry import register_recovery

if TYPE_CHECKING:
    from ebft.config import EBFTConfig
    from ebft.recovery.whole_model import WholeResult, WholeTask


@register_recovery("lora", scope="model")
class LoRA(WholeModelRecovery):
    """Low-rank adapters (Hu et al., arXiv 2106.09685; through peft), merged under the masks."""

    told = "by adapters merged under the masks"

    @dataclass(frozen=True)
    class Settings(LanguageModelTuning):
        """Of the adapters."""

        lora_rank: int = setting(8, "rank of the adapters", at_least=1)
        lora_alpha: float = setting(16.0, "scale of the adapters, times their rank", at_least=0)
        lora_dropout: float = setting(
            0.0, "dropout on the adapters' inputs (needs --no-lora-masked)", at_least=0, below=1
        )
        lora_masked: bool = setting(True, "tune adapters under the mask, so that the masked merge loses nothing")

    @classmethod
    def check(cls, config: EBFTConfig) -> None:
        """See ``Recovery``."""
        own = config.of_method(cls.Settings)
        if own.lora_dropout and own.lora_masked:
            raise EBFTError(
                f"--lora-dropout is {own.lora_dropout:g}, and with --lora-masked adapters are a part of the weight, "
                "where no input can be dropped for them alone; expected --no-lora-masked or --lora-dropout 0"
            )

    def prepare(self, place: Place) -> None:
        """See ``Recovery``."""
        super().prepare(place)
        if find_spec("peft") is None:
            raise EBFTError("--recover lora needs peft, which is not installed; expected pip install ebft[lora]")

    def recover(self, task: WholeTask) -> WholeResult:
        """See ``WholeModelRecovery``."""
        from ebft.recovery.lora.adapters import tune_adapters

        return tune_adapters(task, self.config, self.settings)
