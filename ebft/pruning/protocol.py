"""What a criterion is: it turns a weight and what is known of its inputs into a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ebft.errors import EBFTError
from ebft.pruning.allocation import check_owl
from ebft.registry import NoSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ebft.config import EBFTConfig
    from ebft.config.pattern import Pattern
    from ebft.model.matrices import Matrix
    from ebft.pruning.statistics import InputStatistics, Statistics
    from ebft.pruning.structured.units import Units

MASK_BYTES = 28  # a weight of the matrix at hand, while its mask is made in torch


class Criterion:
    """The base of all criteria; one is registered by ``@register_criterion(NAME)``, in a file of its own.

    Attributes:
        Settings: a frozen dataclass whose fields are ``ebft.config.setting``s: its flags.
        needs: which statistics of its inputs a matrix is scored by (``InputStatistics``); none: the weight alone.
        updates_weights: ``mask`` gives the weight that goes with it too.
        scores_weights, scores_units: whether it can prune single weights; whole heads and channels (``--structured``).
        units_need: as ``needs``, for ``score_units``.
        fills_biases: in structured pruning, what the removed units gave on average goes into biases.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[str] = "criterion"
    Settings: ClassVar[type] = NoSettings
    needs: ClassVar[frozenset[str]] = frozenset({"squares"})
    updates_weights: ClassVar[bool] = False
    scores_weights: ClassVar[bool] = True
    scores_units: ClassVar[bool] = False
    units_need: ClassVar[frozenset[str]] = frozenset({"squares"})
    fills_biases: ClassVar[bool] = False

    def __init__(self, settings: Any = None) -> None:
        self.settings = self.Settings() if settings is None else settings

    @classmethod
    def check(cls, config: EBFTConfig) -> None:
        """``EBFTError`` for settings that do not go with this criterion."""
        structured = config.prune.structured
        if config.prune.allocation == "owl":
            check_owl(config.prune.sparsity)
        if structured and not cls.scores_units:
            raise EBFTError(f"--structured scores heads and channels, which --prune {cls.name} does not; expected flap")
        if not structured and not cls.scores_weights:
            raise EBFTError(f"--prune {cls.name} scores whole heads and channels; expected --structured with it")

    def mask(self, weight: Tensor, inputs: InputStatistics, pattern: Pattern) -> Tensor | tuple[Tensor, Tensor]:
        """What is kept of a weight.

        Args:
            weight: float32 (outputs, inputs); of fused experts, one's.
            inputs: statistics of what it was multiplied with, (inputs,).
            pattern: the share that is pruned, or N:M.

        Returns:
            bool (outputs, inputs), True = kept; with ``updates_weights`` also the weight, zero where pruned.
        """
        raise NotImplementedError

    def score_units(self, block: nn.Module, units: Units, statistics: Statistics) -> Tensor:
        """Of each head or channel of ``block``: float64 (units,), higher is more worth keeping."""
        raise NotImplementedError

    def working_bytes(self, matrix: Matrix) -> int:
        """What it allocates on the device for one matrix, beside the weight and the statistics."""
        return MASK_BYTES * matrix.outputs * matrix.inputs


class Refinement:
    """What makes a better mask of a mask; registered by ``@register_refinement(NAME)``."""

    name: ClassVar[str] = ""
    kind: ClassVar[str] = "refinement"
    Settings: ClassVar[type] = NoSettings
    needs: ClassVar[frozenset[str]] = frozenset({"squares", "sums"})
    title: ClassVar[str] = ""

    def __init__(self, settings: Any = None) -> None:
        self.settings = self.Settings() if settings is None else settings

    def refine(self, weight: Tensor, mask: Tensor, inputs: InputStatistics, pattern: Pattern) -> Tensor:
        """Another mask with as many kept in every row: weight float (outputs, inputs), masks bool of its shape."""
        raise NotImplementedError

    def working_bytes(self, matrix: Matrix) -> int:
        """What it allocates on the device for one matrix."""
        return MASK_BYTES * matrix.outputs * matrix.inputs
