"""Maskers: how a whole block is pruned, by a criterion, by a file of masks, or by the zeros that are there already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ebft.config import EBFTConfig
from ebft.config.pattern import Pattern, is_far
from ebft.errors import EBFTError, on_one_line
from ebft.model.matrices import Matrix
from ebft.pruning.allocation import Allocation, OutlierSurvey, make_allocation
from ebft.pruning.magnitude import Magnitude
from ebft.pruning.protocol import MASK_BYTES, Criterion, Refinement
from ebft.pruning.statistics import InputStatistics, Statistics
from ebft.registry import criteria, refinements
from ebft_kernels import PackedMask, load_masks

Function = Callable[[Tensor, InputStatistics, Pattern], Tensor | tuple[Tensor, Tensor]]  # a criterion as one

NOTHING: frozenset[str] = frozenset()


@dataclass
class BlockMasks:
    """How one block was pruned.

    Attributes:
        masks: by parameter name, in the parameters' shapes.
        notes: what is worth a line in the report.
        changed: parameters whose kept weights the masker has changed in the block, so that the pruned block is not the
            dense one with zeros.
    """

    masks: dict[str, PackedMask] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    def sparsity(self) -> float:
        """Pruned share of all matrices of the block."""
        total = sum(mask.numel() for mask in self.masks.values())
        return 1 - sum(mask.count() for mask in self.masks.values()) / total


class Surveyor(Protocol):
    """Looks at every dense block before the first is pruned, where what one loses depends on all.

    Attributes:
        needs: statistics that it wants, of the dense model on the calibration tokens (``InputStatistics``).
    """

    needs: frozenset[str]

    def look(self, block_name: str, block: nn.Module, matrices: list[Matrix], statistics: Statistics) -> Any:
        """What it remembers of a block."""

    def conclude(self, seen: list[Any]) -> Any:
        """What follows from all blocks, in order: a value that JSON can hold, kept for a resumed run."""

    def take(self, concluded: Any) -> None:
        """Go by what ``conclude`` gave, in this run or an interrupted one; called before any block is pruned."""


class Masker:
    """Prunes a block; the base of all maskers.

    Attributes:
        name: how the report calls it.
        needs: which statistics of what flows into each matrix are wanted (``InputStatistics``), if any.
        given: the masks are there beforehand and need no statistics; calling it is cheap.
        surveyor: looks at all blocks first; None where each block is pruned on its own.
    """

    name = ""
    needs: frozenset[str] = NOTHING
    given = False
    surveyor: Surveyor | None = None

    def check(self, names: list[str], blocks: list[nn.Module], matrices: list[list[Matrix]]) -> None:
        """Raise ``EBFTError`` for what cannot work on these blocks (full names, modules, matrices), before any work."""

    def __call__(self, block_name: str, block: nn.Module, matrices: list[Matrix], statistics: Statistics) -> BlockMasks:
        """The masks of ``block``, called ``block_name`` in the model; its kept weights may be changed in place."""
        raise NotImplementedError

    def working_bytes(self, matrix: Matrix) -> int:
        """What it allocates on the device for one matrix, beside the weight and the statistics."""
        return MASK_BYTES * matrix.outputs * matrix.inputs


class OfFunction(Criterion):
    """A user's own criterion that is a function (weight, inputs, pattern) -> mask, or -> (mask, weight)."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.mask = function  # type: ignore[method-assign,assignment]
        self.name = getattr(function, "__name__", type(function).__name__)  # type: ignore[misc]
        self.needs = getattr(function, "needs", Criterion.needs)  # type: ignore[misc]


def make_masker(config: EBFTConfig, criterion: Criterion | Function | None = None) -> Masker:
    """The masker for ``--prune``: a criterion, ``zeros``, or a file of masks; or a user's own criterion."""
    if config.prune.structured:
        if criterion is not None:
            raise EBFTError("--structured scores heads and channels, and a criterion of one's own scores weights")
        from ebft.pruning.structured.scores import make_structured_masker

        return make_structured_masker(config)
    prune, allocation = config.prune.criterion, make_allocation(config.prune.allocation, config.prune.mask_pattern)
    chosen: Criterion | None
    if criterion is not None:
        chosen = criterion if isinstance(criterion, Criterion) else OfFunction(criterion)
    elif prune in criteria:
        kind = criteria[prune]
        chosen = kind(config.of_method(kind.Settings))
    else:
        chosen = None
        for given, said in ((allocation.pattern.transposable, "--transposable"), (allocation.name, "--allocation")):
            if given:
                raise EBFTError(f"{said} is how a criterion prunes, and --prune is {prune}; expected a criterion")
    refine = config.prune.refine
    refinement = refinements[refine](config.of_method(refinements[refine].Settings)) if refine != "none" else None
    masker: Masker = (
        given_masker(prune, allocation.pattern)
        if chosen is None
        else _ByCriterion(chosen, allocation, updates=refinement is None)
    )
    if refinement is None:
        return masker
    update = getattr(chosen, "update", None) if chosen is not None and chosen.updates_weights else None
    return _Refined(masker, allocation.pattern, refinement, update)


def given_masker(prune: str, pattern: Pattern) -> Masker:
    """The masker for masks that are there beforehand: ``zeros``, or those in a file; N:M if the ``pattern`` is."""
    return _Zeros(pattern) if prune == "zeros" else _FromFile(prune, pattern)


class _ByCriterion(Masker):
    """By a criterion.

    Args:
        updates: the weights that a criterion gives with its masks are taken.
    """

    def __init__(self, criterion: Criterion, allocation: Allocation, *, updates: bool) -> None:
        self._criterion, self._allocation, self._updates = criterion, allocation, updates
        self.surveyor = OutlierSurvey(allocation) if allocation.name == "OWL" else None
        self.needs = criterion.needs
        self.name = f"{criterion.name} {allocation.pattern}" + (f" by {allocation.name}" if allocation.name else "")

    def working_bytes(self, matrix: Matrix) -> int:
        return self._criterion.working_bytes(matrix)

    def check(self, names: list[str], blocks: list[nn.Module], matrices: list[list[Matrix]]) -> None:
        self._allocation.check(names, matrices)
        for name, of_block in zip(names, matrices, strict=True):
            for matrix in of_block:
                self._allocation.pattern.check_shape(f"{name}.{matrix.name}", matrix.outputs, matrix.inputs)

    def __call__(self, block_name: str, block: nn.Module, matrices: list[Matrix], statistics: Statistics) -> BlockMasks:
        result, changed, missed = BlockMasks(), set[str](), dict[tuple[str, str], list[str]]()
        for matrix in matrices:
            name, pattern = f"{block_name}.{matrix.name}", self._allocation.of(block_name, matrix.name)
            weight = block.get_parameter(matrix.name).detach()
            mask = torch.empty_like(weight, dtype=torch.bool)
            of_experts = (
                statistics.get(matrix.name) or [InputStatistics.empty(matrix.inputs, weight.device)] * matrix.experts
            )
            seen = any(inputs.tokens for inputs in of_experts)
            unseen = []
            rows = zip(matrix.by_expert(weight), matrix.by_expert(mask), of_experts, strict=True)
            for expert, (expert_weight, expert_mask, inputs) in enumerate(rows):
                starved = bool(self.needs) and inputs.tokens == 0
                unseen += [expert] if starved else []
                made = (Magnitude() if starved else self._criterion).mask(expert_weight, inputs, pattern)
                if isinstance(made, tuple):
                    made, updated = made
                    if self._updates or not self._criterion.updates_weights:
                        expert_weight.copy_(updated)
                        changed.add(matrix.name)
                if made.shape != expert_mask.shape or made.dtype != torch.bool:
                    raise EBFTError(
                        f"the criterion gave {name} a mask of {made.dtype} {tuple(made.shape)}; "
                        f"expected torch.bool {tuple(expert_mask.shape)}"
                    )
                expert_mask.copy_(made)
            if self.needs and not seen:
                result.notes.append(f"no product with {matrix.name} was seen, and it fell back to magnitude")
            elif unseen:
                which = f"experts {', '.join(map(str, unseen))} of " if matrix.experts > 1 else ""
                result.notes.append(f"{which}{matrix.name} saw no tokens and fell back to magnitude")
            packed = result.masks[matrix.name] = PackedMask.from_dense(mask)
            if is_far(pattern.sparsity, got := 1 - packed.density()):
                missed.setdefault((f"{pattern.sparsity:.2%}", f"{got:.2%}"), []).append(matrix.name)
        for (asked, share), names in missed.items():
            result.notes.append(f"asked for {asked} pruned, got {share} in {', '.join(names)}")
        result.changed += sorted(changed)
        return result


class _Refined(Masker):
    """Another masker's masks, in which kept and pruned weights of a row then change places.

    Args:
        update: (dense weight, mask, inputs) -> weight, for what goes with a mask; None: weights stay.
    """

    def __init__(
        self,
        masker: Masker,
        pattern: Pattern,
        refinement: Refinement,
        update: Callable[[Tensor, Tensor, InputStatistics], Tensor] | None,
    ) -> None:
        self._masker, self._pattern, self._refinement, self._update = masker, pattern, refinement, update
        self.given, self.surveyor = masker.given, masker.surveyor
        self.needs = masker.needs | refinement.needs
        self.name = f"{masker.name}, then {refinement.title}"

    def working_bytes(self, matrix: Matrix) -> int:
        return max(self._masker.working_bytes(matrix), self._refinement.working_bytes(matrix))

    def check(self, names: list[str], blocks: list[nn.Module], matrices: list[list[Matrix]]) -> None:
        self._masker.check(names, blocks, matrices)
        for name, of_block in zip(names, matrices, strict=True):
            for matrix in of_block:
                self._pattern.check_shape(f"{name}.{matrix.name}", matrix.outputs, matrix.inputs)

    def __call__(self, block_name: str, block: nn.Module, matrices: list[Matrix], statistics: Statistics) -> BlockMasks:
        result = self._masker(block_name, block, matrices, statistics)
        if result.changed:
            raise EBFTError(
                f"--refine {self._refinement.name} goes by the dense weights, and the criterion has changed them"
            )
        for matrix in matrices:
            weight = block.get_parameter(matrix.name).detach()
            mask = result.masks[matrix.name].dense().to(weight.device)
            seen = statistics.get(matrix.name) or [InputStatistics.empty(matrix.inputs, weight.device)] * matrix.experts
            if not all(inputs.tokens for inputs in seen):
                result.notes.append(f"{matrix.name} (or experts of it) saw no tokens and keeps its mask as it was")
            of_experts = zip(matrix.by_expert(weight), matrix.by_expert(mask), seen, strict=True)
            for expert_weight, expert_mask, inputs in of_experts:
                if self._pattern.group and not _is_pattern(expert_mask, self._pattern):
                    raise EBFTError(
                        f"--refine {self._refinement.name} swaps within the groups of --pattern {self._pattern}, and "
                        f"the mask of {block_name}.{matrix.name} is not {self._pattern}"
                    )
                if inputs.tokens:
                    expert_mask.copy_(self._refinement.refine(expert_weight, expert_mask, inputs, self._pattern))
                if inputs.tokens and self._update:
                    expert_weight.copy_(self._update(expert_weight, expert_mask, inputs))
            result.masks[matrix.name] = PackedMask.from_dense(mask)
            result.changed += [matrix.name] if self._update else []
        return result


def _is_pattern(mask: Tensor, pattern: Pattern) -> bool:
    return PackedMask.from_dense(mask.contiguous()).is_nm(pattern.keep, pattern.group)


class _Zeros(Masker):
    name, given = "zeros that were there", True

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern

    def __call__(self, block_name: str, block: nn.Module, matrices: list[Matrix], statistics: Statistics) -> BlockMasks:
        masks = {matrix.name: PackedMask.from_nonzero(block.get_parameter(matrix.name)) for matrix in matrices}
        return _given("zeros", self._pattern, block_name, matrices, masks)


class _FromFile(Masker):
    name, given = "masks from a file", True

    def __init__(self, file: str, pattern: Pattern) -> None:
        self._pattern = pattern
        self._file = file
        try:
            self._masks = load_masks(file)
        except (OSError, ValueError) as error:
            raise EBFTError(f"--prune {file} is not a file of masks: {on_one_line(error)}") from None

    def check(self, names: list[str], blocks: list[nn.Module], matrices: list[list[Matrix]]) -> None:
        expected = {
            f"{name}.{matrix.name}": tuple(block.get_parameter(matrix.name).shape)
            for name, block, of_block in zip(names, blocks, matrices, strict=True)
            for matrix in of_block
        }
        for name, shape in expected.items():
            if name not in self._masks:
                raise EBFTError(f"--prune {self._file} has no mask for {name}; it holds {_some(self._masks)}")
            if tuple(self._masks[name].shape) != shape:
                given = tuple(self._masks[name].shape)
                raise EBFTError(f"--prune {self._file}: the mask of {name} has shape {given}; expected {shape}")
        unknown = {name: mask for name, mask in self._masks.items() if name not in expected}
        if unknown:
            raise EBFTError(f"--prune {self._file} has masks for {_some(unknown)}, which the model does not prune")

    def __call__(self, block_name: str, block: nn.Module, matrices: list[Matrix], statistics: Statistics) -> BlockMasks:
        masks = {matrix.name: self._masks[f"{block_name}.{matrix.name}"] for matrix in matrices}
        return _given(self._file, self._pattern, block_name, matrices, masks)


def _given(
    prune: str, pattern: Pattern, block_name: str, matrices: list[Matrix], masks: dict[str, PackedMask]
) -> BlockMasks:
    """Masks that were there, which are N:M where the ``pattern`` says so."""
    for matrix in matrices if pattern.group else ():
        name, kept = f"{block_name}.{matrix.name}", masks[matrix.name].dense()
        pattern.check_shape(name, matrix.outputs, matrix.inputs)
        if not all(_is_pattern(of_expert, pattern) for of_expert in matrix.by_expert(kept)):
            raise EBFTError(
                f"--pattern is {pattern}, and what --prune {prune} keeps of {name} is not; expected one alone"
            )
    return BlockMasks(masks)


def _some(names: dict[str, PackedMask]) -> str:
    first = list(names)[:3]
    return f"{', '.join(first) or 'none'}{' …' if len(names) > 3 else ''} ({len(names)} in all)"
