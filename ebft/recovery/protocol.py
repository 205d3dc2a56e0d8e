"""What a recovery is, of a block in the walk or of the whole pruned model after it; and a loss, and an optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ebft.registry import NoSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ebft.config import EBFTConfig
    from ebft.distributed import Ranks
    from ebft.model.decoder import Decoder
    from ebft.plan.shapes import Shapes
    from ebft.recovery.samples import Energies
    from ebft.recovery.task import BlockResult, BlockTask
    from ebft.recovery.whole_model import WholeResult, WholeTask


@dataclass(frozen=True)
class Place:
    """Where a recovery works.

    Attributes:
        device: where blocks live and batches go.
        compute: dtype of the matrix products.
        ranks: those that share the samples.
    """

    device: torch.device
    compute: torch.dtype
    ranks: Ranks


@dataclass(frozen=True)
class Traffic:
    """What travels between host and device in every step, and beside what work.

    Attributes:
        a_step: bytes to the device, or back, whichever are more.
        steps: in all.
        samples: in a step.
        flops: of a step, for one sample.
    """

    a_step: int
    steps: int
    samples: int
    flops: float


@dataclass(frozen=True)
class Footprint:
    """What a recovery needs beside what every run needs; the plan adds these up.

    Attributes:
        device: rows of the device's memory while it works on a block, in bytes.
        stages: the device's memory, in all, in stages of its own that come at other times.
        host, disk: rows of these, in bytes.
        flops: of its work on all samples and blocks.
        streams: hidden states of all samples that it keeps: of a block beside inputs and targets, of the whole model
            when these are gone.
        traffic: of weights and states between host and device; None for none.
    """

    device: Mapping[str, int] = field(default_factory=dict)
    stages: Mapping[str, int] = field(default_factory=dict)
    host: Mapping[str, int] = field(default_factory=dict)
    disk: Mapping[str, int] = field(default_factory=dict)
    flops: float = 0.0
    streams: float = 0
    traffic: Traffic | None = None


class Recovery:
    """The base of all recoveries; one is registered by ``@register_recovery(NAME, scope=…)``, in a file of its own.

    One object serves a whole run. ``prepare`` is called once, before any work.

    Attributes:
        scope: ``"block"``, inside the walk, or ``"model"``, after it.
        Settings: a frozen dataclass whose fields are ``ebft.config.setting``s: its flags.
        told: how a report says what was done, as in "tuned block by block".
        needs: statistics of the pass that makes the targets that it looks at (``InputStatistics``).
        needs_dense_inputs: it looks at what the dense block is given, beside what it gives.
        changes_masks: it may choose masks anew.
        goes_by_time: it takes the seconds that its task gives it, where it gives any.
        blocks_at_once: blocks that are in its hands together; 2: it wants the next one too (``BlockTask.following``).
        settings, config: its own settings, and those of the run.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[str] = "recovery"
    scope: ClassVar[str] = "block"
    Settings: ClassVar[type] = NoSettings
    told: ClassVar[str] = "block by block"
    needs: frozenset[str] = frozenset()
    needs_dense_inputs: bool = False
    changes_masks: bool = False
    goes_by_time: ClassVar[bool] = False
    blocks_at_once: int = 1

    def __init__(self, config: EBFTConfig) -> None:
        self.config = config
        self.settings: Any = config.of_method(self.Settings)

    @classmethod
    def uses(cls, settings: Any) -> tuple[tuple[str, str], ...]:
        """Kinds and names of the other methods that it works with, whose settings then count."""
        return ()

    @classmethod
    def check(cls, config: EBFTConfig) -> None:
        """``EBFTError`` for settings that cannot go together; nothing has been loaded yet."""

    def prepare(self, place: Place) -> None:
        """Get ready to work at ``place``; ``EBFTError`` where that cannot be."""
        self.place = place

    def footprint(self, shapes: Shapes) -> Footprint:
        """What it needs on a model of these shapes."""
        return Footprint()

    def leaner(self, shapes: Shapes) -> Iterator[dict[str, Any]]:
        """Changes of settings, by flat names, each of which needs less of the device than those before it together."""
        yield from ()

    def last_resort(self, shapes: Shapes) -> dict[str, Any] | None:
        """Changes of settings that need least of all, for where nothing on the way of ``leaner`` fits."""
        return None


class BlockRecovery(Recovery):
    """Recovers a block inside the walk."""

    def recover(self, task: BlockTask) -> BlockResult:
        """Recover ``task.block`` in place; ``EBFTError`` where that cannot be done."""
        raise NotImplementedError


class WholeModelRecovery(Recovery):
    """Recovers the whole model after the walk.

    Attributes:
        holds_the_model: all of it is on the device at once, in float32 (``WholeTask.model``).
        loss: what a report calls what it minimises.
    """

    holds_the_model: ClassVar[bool] = True
    loss: ClassVar[str] = "language-model loss"

    def check_room(self, decoder: Decoder) -> None:
        """``EBFTError`` where the machine has not the memory for this model; nothing has been done yet."""

    def recover(self, task: WholeTask) -> WholeResult:
        """Recover the model that ``task`` holds; ``EBFTError`` where that cannot be done."""
        raise NotImplementedError


class Loss:
    """The base of what a block is tuned by; registered by ``@register_loss(NAME)``.

    Attributes:
        is_mean_square: it is the mean squared error, for which there is a kernel.
        needs_energies: ``fit`` wants to see the energies of the sequences that the block is tuned on.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[str] = "loss"
    Settings: ClassVar[type] = NoSettings
    is_mean_square: ClassVar[bool] = False
    needs_energies: ClassVar[bool] = True

    def fit(self, energies: Energies) -> None:
        """Find the loss's constants for a block."""

    def of_tokens(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of every token, (...): ``output`` and ``target`` are (..., width)."""
        raise NotImplementedError


class Optimizer:
    """The base of what makes optimizers; registered by ``@register_optimizer(NAME)``.

    Attributes:
        weights: how matrices are stored while they are tuned: ``fp32``, or ``master`` or ``stochastic`` (bfloat16).
        updates_in_backward: weights are updated by the backward pass.
        has_second_moments: ``second_moment(parameter)`` of what it makes says how large gradients are.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[str] = "optimizer"
    Settings: ClassVar[type] = NoSettings
    weights: str = "fp32"
    updates_in_backward: bool = False
    has_second_moments: ClassVar[bool] = False

    def __init__(self, settings: Any = None) -> None:
        self.settings = self.Settings() if settings is None else settings

    @classmethod
    def check(cls, config: EBFTConfig) -> None:
        """``EBFTError`` for settings that cannot go together."""

    def make(self, groups: list[dict[str, Any]], *, lr: float, masks: Mapping[Any, Any], seed: int) -> Any:
        """A ``torch.optim.Optimizer`` that holds pruned weights at zero.

        Args:
            groups: torch's parameter groups, each with its ``weight_decay``.
            masks: parameter -> kept weights, in the parameter's shape.
        """
        raise NotImplementedError

    def leaner_layouts(self, shapes: Shapes) -> Iterator[dict[str, Any]]:
        """As ``Recovery.leaner``: what costs hardly any speed and no precision."""
        yield from ()

    def leaner_states(self, shapes: Shapes) -> Iterator[dict[str, Any]]:
        """As ``Recovery.leaner``: what costs precision."""
        yield from ()
