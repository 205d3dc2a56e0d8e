"""What a run works with, from its preparation to its end; and its clock."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ebft.config import EBFTConfig
from ebft.data.calibration import Tokens
from ebft.data.generation import Generated
from ebft.data.streams import Store
from ebft.distributed import Ranks
from ebft.evaluation.zero_shot import ZeroShot
from ebft.model.decoder import Decoder
from ebft.model.locate import shown
from ebft.output.folder import OutputFolder
from ebft.output.loggers import Logger
from ebft.output.terminal import Reporter
from ebft.pruning.masker import Masker
from ebft.recovery.protocol import WholeModelRecovery
from ebft.recovery.task import Chain


@dataclass
class Clock:
    """Seconds of each stage."""

    began: float = field(default_factory=time.perf_counter)
    laps: dict[str, float] = field(default_factory=dict)

    def lap(self, name: str) -> None:
        """The stage ``name`` ends now; it began where the one before ended."""
        self.laps[name] = self.laps.get(name, 0.0) + self.total() - sum(self.laps.values())

    def read(self) -> dict[str, Any]:
        """All of it, for ``go_on_from``."""
        return {"total": self.total(), "laps": dict(self.laps)}

    def go_on_from(self, read: dict[str, Any]) -> None:
        """It is as late as it was in an interrupted run; what passed since, here or there, is lost."""
        self.began, self.laps = time.perf_counter() - read["total"], dict(read["laps"])

    def total(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self.began


@dataclass
class RunContext:
    """Everything a run works with, checked.

    Attributes:
        source: what the model's own card says of it (``provenance``).
        generated: what of the calibration text the dense model has written.
        prompts: that the models continue; none where there is no tokenizer.
        ranks: all processes of the run.
        loggers: what the first process tells of steps and blocks.
        sharing: of these, those that share the calibration sequences: all, or in a block-parallel run this one alone.
    """

    config: EBFTConfig
    name: str
    source: dict[str, Any]
    decoder: Decoder
    teacher: Decoder
    tokenizer: PreTrainedTokenizerBase | None
    masker: Masker
    recovery: Chain | None
    whole_model: dict[str, WholeModelRecovery]
    calibration: Tokens | None
    generated: Generated | None
    eval_tokens: dict[str, Tokens]
    zero_shot: ZeroShot | None
    prompts: list[str]
    store: Store
    output: OutputFolder
    reporter: Reporter
    clock: Clock
    ranks: Ranks
    sharing: Ranks
    loggers: Sequence[Logger] = ()

    @property
    def blocks_are_independent(self) -> bool:
        """No block needs what another is tuned to: all are given the dense model's states, and aim at them."""
        return are_independent(self.config)


def are_independent(config: EBFTConfig) -> bool:
    """See ``RunContext.blocks_are_independent``."""
    return config.recover.input == "dense-stream"


def name_of(source: str | PreTrainedModel | None) -> str:
    """What a model is called in the report."""
    return shown(source) if source is None or isinstance(source, str) else type(source).__name__
