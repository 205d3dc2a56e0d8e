"""How whole attention heads (KV groups) and MLP channels are compared and removed, by a criterion's score for each.

Scores are standardised within each layer and kind and then compared over the whole dense model, least first, until the
units that go hold the share of all block parameters that is asked for. Every layer keeps one unit of each kind. With
uniform widths they are compared within the layer instead, in the walk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ebft.config import EBFTConfig
from ebft.config.pattern import Pattern
from ebft.errors import EBFTError
from ebft.model.matrices import Matrix
from ebft.pruning.masker import NOTHING, BlockMasks, Masker, given_masker
from ebft.pruning.protocol import Criterion
from ebft.pruning.statistics import InputStatistics, Statistics
from ebft.pruning.structured.uniform import uniform_widths
from ebft.pruning.structured.units import Units, bias_name, bias_of, find_units, masks_without, removed_by
from ebft.registry import criteria


def by_column(block: nn.Module, units: Units, of_inputs: Tensor) -> Tensor:
    """The mean over a unit's columns j of ``of_inputs``_j ||W_:j||^2 in what takes it up; float64 (units,)."""
    columns = oriented(block, units.consumer).square().sum(0)
    return (of_inputs * columns).cpu()[units.columns].mean(1)


def oriented(block: nn.Module, matrix: Matrix) -> Tensor:
    """The weight in float64, (outputs, inputs)."""
    return matrix.by_expert(block.get_parameter(matrix.name).detach())[0].double()


def make_structured_masker(config: EBFTConfig) -> Masker:
    """The masker for ``--structured --prune``: a criterion, or what is there already: ``zeros``, a file of masks."""
    prune, sparsity = config.prune.criterion, config.prune.sparsity
    if prune in criteria:
        kind = criteria[prune]
        criterion = kind(config.of_method(kind.Settings))
        return (_Uniform if config.prune.uniform else _ByScore)(criterion, sparsity)
    if config.prune.uniform:
        scoring = ", ".join(each.name for each in criteria if each.scores_units)
        raise EBFTError(f"--uniform chooses the widths, and --prune is {prune}; expected {scoring}")
    return _Given(given_masker(prune, Pattern(sparsity)))


class _ByScore(Masker):
    def __init__(self, criterion: Criterion, sparsity: float) -> None:
        self._makes_up = criterion.fills_biases
        self.needs = criterion.needs if self._makes_up else NOTHING  # of the block in the walk
        self._comparison = _Comparison(criterion, sparsity)
        self.surveyor = self._comparison
        self.name = f"{criterion.name} structured {sparsity:.0%}"

    def check(self, names: list[str], blocks: list[nn.Module], matrices: list[list[Matrix]]) -> None:
        for name, block, of_block in zip(names, blocks, matrices, strict=True):
            find_units(name, block, of_block)

    def __call__(self, block_name: str, block: nn.Module, matrices: list[Matrix], statistics: Statistics) -> BlockMasks:
        units = find_units(block_name, block, matrices)
        return remove(block, units, self._comparison.removed(block_name), statistics if self._makes_up else {})


class _Comparison:
    """The surveyor: compares the units of all blocks."""

    def __init__(self, criterion: Criterion, sparsity: float) -> None:
        self._score, self._sparsity, self.needs = criterion.score_units, sparsity, criterion.units_need
        self._removed: dict[str, list[list[int]]] = {}

    def look(self, block_name: str, block: nn.Module, matrices: list[Matrix], statistics: Statistics) -> Any:
        units = find_units(block_name, block, matrices)
        total = sum(matrix.outputs * matrix.inputs for matrix in matrices)
        scores = [standardised(self._score(block, of_kind, statistics)) for of_kind in units]
        return block_name, total, scores, [of_kind.parameters for of_kind in units]

    def conclude(self, seen: list[Any]) -> Any:
        names, totals, scores, parameters = zip(*seen, strict=True)
        flat = [of_kind for of_block in scores for of_kind in of_block]
        sizes = [size for of_block in parameters for size in of_block]
        removed = least_of_all(flat, sizes, self._sparsity * sum(totals))
        kinds = len(scores[0])
        return {name: [r.tolist() for r in removed[i * kinds : (i + 1) * kinds]] for i, name in enumerate(names)}

    def take(self, concluded: Any) -> None:
        self._removed = concluded

    def removed(self, block_name: str) -> list[Tensor]:
        """The units of each kind that go."""
        return [torch.tensor(gone, dtype=torch.int64) for gone in self._removed[block_name]]


class _Uniform(Masker):
    def __init__(self, criterion: Criterion, sparsity: float) -> None:
        self._score, self._sparsity, self.needs = criterion.score_units, sparsity, criterion.units_need
        self._makes_up = criterion.fills_biases
        self._counts: list[int] = []  # of each kind, how many units go
        self.name = f"{criterion.name} structured {sparsity:.0%}, uniform"

    def check(self, names: list[str], blocks: list[nn.Module], matrices: list[list[Matrix]]) -> None:
        self._counts = uniform_widths(names, blocks, matrices, self._sparsity)

    def __call__(self, block_name: str, block: nn.Module, matrices: list[Matrix], statistics: Statistics) -> BlockMasks:
        units = find_units(block_name, block, matrices)
        removed = [
            self._score(block, of_kind, statistics).argsort(stable=True)[:count].sort().values
            for of_kind, count in zip(units, self._counts, strict=True)
        ]
        return remove(block, units, removed, statistics if self._makes_up else {})


class _Given(Masker):
    """Masks or zeros that are there already, of whole units alone."""

    given = True

    def __init__(self, masker: Masker) -> None:
        self._masker, self.name = masker, f"{masker.name}, structured"

    def check(self, names: list[str], blocks: list[nn.Module], matrices: list[list[Matrix]]) -> None:
        self._masker.check(names, blocks, matrices)
        for name, block, of_block in zip(names, blocks, matrices, strict=True):
            find_units(name, block, of_block)

    def __call__(self, block_name: str, block: nn.Module, matrices: list[Matrix], statistics: Statistics) -> BlockMasks:
        units = find_units(block_name, block, matrices)
        masks = self._masker(block_name, block, matrices, statistics).masks
        dense = {name: mask.dense().cpu() for name, mask in masks.items()}
        removed = [removed_by(of_kind, dense) for of_kind in units]
        for name, mask in masks_without(block, units, removed).items():
            if not torch.equal(mask.dense(), dense[name]):
                raise EBFTError(
                    f"--structured: {block_name}.{name} is not pruned by whole heads and channels; expected masks that "
                    "are, or no --structured"
                )
        return remove(block, units, removed, {})


# --- what they share ------------------------------------------------------------------------------------------------


def standardised(scores: Tensor) -> Tensor:
    """With mean 0 and standard deviation 1; all 0 where they are all alike."""
    spread = scores.std() if len(scores) > 1 else scores.new_zeros(())
    return (scores - scores.mean()) / spread if spread > 0 else torch.zeros_like(scores)


def least_of_all(scores: Sequence[Tensor], sizes: Sequence[int], wanted: float) -> list[Tensor]:
    """The units with the least scores that together come as near to ``wanted`` parameters as they can.

    Args:
        scores: (units,) of each layer and kind; the best of each stays.
        sizes: parameters of one of its units.

    Returns:
        int64 (removed,) of each, ascending.
    """
    candidates = [of_one.argsort(stable=True)[:-1].tolist() for of_one in scores]
    total = sum(size * len(units) for size, units in zip(sizes, candidates, strict=True))
    if total < wanted - min(sizes) / 2:
        raise EBFTError(
            f"--structured: the blocks would have to lose {wanted:.0f} parameters, and {total} is all that goes while "
            "each keeps a head and a channel; expected a smaller --sparsity"
        )
    ranked = sorted(
        (float(of_one[unit]), place, unit)
        for place, (of_one, units) in enumerate(zip(scores, candidates, strict=True))
        for unit in units
    )
    removed: list[list[int]] = [[] for _ in scores]
    room = wanted + min(sizes) / 2
    for _, place, unit in ranked:
        if sizes[place] <= room:  # where a head does not fit, channels that score higher make up for it
            room -= sizes[place]
            removed[place].append(unit)
    return [torch.tensor(sorted(units), dtype=torch.int64) for units in removed]


@torch.no_grad()
def remove(block: nn.Module, units: Sequence[Units], removed: Sequence[Tensor], statistics: Statistics) -> BlockMasks:
    """Masks without the ``removed`` units of each kind; in ``block``, biases are made up for them.

    Biases of what makes a removed unit's values become 0. Where ``statistics`` know the mean of the consumer's inputs,
    what the removed ones gave on average goes into its bias, if it has one.
    """
    result = BlockMasks(masks_without(block, units, removed))
    for of_kind, gone in zip(units, removed, strict=True):
        result.notes.append(f"{len(of_kind) - len(gone)} of {len(of_kind)} {_KINDS[of_kind.kind]} are kept")
        columns, consumer = of_kind.columns[gone].flatten(), of_kind.consumer
        mean = _mean(statistics.get(consumer.name))
        bias = bias_of(block, consumer)
        if len(gone) and mean is not None and bias is not None:
            columns = columns.to(bias.device)
            weight = consumer.by_expert(block.get_parameter(consumer.name))[0]
            bias += weight[:, columns] @ mean[columns].to(weight)
            result.changed.append(bias_name(consumer))
        for matrix, rows in of_kind.rows.items():
            bias = bias_of(block, matrix)
            if len(gone) and bias is not None:
                bias[rows[gone].flatten().to(bias.device)] = 0
                result.changed.append(bias_name(matrix))
    return result


_KINDS = {"heads": "groups of heads", "channels": "channels"}


def _mean(seen: list[InputStatistics] | None) -> Tensor | None:
    return seen[0].sums / seen[0].tokens if seen and seen[0].sums is not None and seen[0].tokens else None
