"""How much each matrix is pruned: the same everywhere, what a file says, or by what a block's outliers say (OWL).

OWL (Yin et al., arXiv 2310.05175) spares blocks with many outliers: entries of |W_ij| ||x_j|| that are more than M
times their mean over the block. With D_b, a block's share of these, less the mean of all (weighted by parameters),

    sparsity_b = S - lambda D_b / max |D|

lies within S - lambda and S + lambda, and S is the share of all weights that goes. (The published code spreads the
largest and the smallest ratio 2 lambda apart, and may so leave that range.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebft.config.pattern import Pattern
from ebft.errors import EBFTError, on_one_line
from ebft.files import read_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ebft.model.matrices import Matrix
    from ebft.pruning.statistics import Statistics
OUTLIER = 5.0  # M: times the mean
LAMBDA = 0.08  # both are the paper's choices


class Allocation:
    """A share for each matrix: of the matrix, of its block, or else that of ``pattern``.

    Attributes:
        pattern: what is asked of the whole model.
        shares: full matrix name, full block name or a block's number -> pruned share.
        name: how the report calls it, empty where all are the same.
    """

    def __init__(self, pattern: Pattern, shares: Mapping[str, float], name: str = "") -> None:
        self.pattern, self.shares, self.name = pattern, dict(shares), name

    def of(self, block_name: str, matrix_name: str) -> Pattern:
        """What is pruned of a matrix."""
        number = block_name.rpartition(".")[2]
        for key in (f"{block_name}.{matrix_name}", block_name, number):
            if key in self.shares:
                return Pattern(self.shares[key])
        return self.pattern

    def check(self, names: list[str], matrices: list[list[Matrix]]) -> None:
        """``EBFTError`` if a share is of something else than these blocks (full names) and their matrices."""
        known = {f"{name}.{m.name}" for name, of_block in zip(names, matrices, strict=True) for m in of_block}
        known |= {*names, *(name.rpartition(".")[2] for name in names)}
        for key in self.shares:
            if key not in known:
                raise EBFTError(
                    f"--allocation {self.name} has a share for {key!r}; expected a block such as {names[0]}, its "
                    f"number or a matrix such as {names[0]}.{matrices[0][0].name}"
                )


def make_allocation(allocation: str, pattern: Pattern) -> Allocation:
    """The allocation for ``--allocation``: ``uniform``, ``owl`` (uniform until its survey is taken) or a JSON file."""
    if allocation in ("uniform", "owl"):
        return Allocation(pattern, {}, "" if allocation == "uniform" else "OWL")
    try:
        shares = read_json(Path(allocation), f"--allocation {allocation}")
    except (OSError, ValueError) as error:
        raise EBFTError(
            f"--allocation is {allocation!r}; expected uniform, owl or a JSON file: {on_one_line(error)}"
        ) from None
    if not isinstance(shares, dict):
        raise EBFTError(f"--allocation {allocation} holds {type(shares).__name__}; expected an object, name -> share")
    for name, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise EBFTError(
                f"--allocation {allocation} has {share!r} for {name}; expected a share from 0 up to, not including, 1"
            )
    return Allocation(pattern, shares, allocation)


def check_owl(sparsity: float) -> None:
    """``EBFTError`` if OWL's shares would leave the range from 0 to 1."""
    if not LAMBDA < sparsity < 1 - LAMBDA:
        raise EBFTError(
            f"--allocation owl prunes up to {LAMBDA:g} less and more than --sparsity, which is {sparsity:g}; expected "
            f"{LAMBDA:g} to {1 - LAMBDA:g}, both excluded"
        )


class OutlierSurvey:
    """OWL's look at all blocks, a ``Surveyor``: gives ``allocation`` its shares."""

    needs = frozenset({"squares"})

    def __init__(self, allocation: Allocation) -> None:
        self._allocation = allocation

    def look(self, block_name: str, block: nn.Module, matrices: list[Matrix], statistics: Statistics) -> Any:
        """The block's name, how many weights it has, and its share of outliers."""
        return (
            block_name,
            sum(m.experts * m.outputs * m.inputs for m in matrices),
            outliers(block, matrices, statistics),
        )

    def conclude(self, seen: list[Any]) -> Any:
        """Block name -> pruned share."""
        names, sizes, ratios = zip(*seen, strict=True)
        shares = by_outliers(list(sizes), list(ratios), self._allocation.pattern.sparsity)
        return dict(zip(names, shares, strict=True))

    def take(self, concluded: Any) -> None:
        """Prune by these shares."""
        self._allocation.shares.update(concluded)


def outliers(block: nn.Module, matrices: list[Matrix], statistics: Statistics) -> float:
    """The share of a block's entries of |W_ij| ||x_j|| that are more than ``OUTLIER`` times their mean."""

    def scores(matrix: Matrix) -> list[Tensor]:
        weight = matrix.by_expert(block.get_parameter(matrix.name).detach())
        seen = statistics.get(matrix.name, [])
        return [w.abs() * inputs.norm() for w, inputs in zip(weight, seen, strict=False)]

    count = sum(m.experts * m.outputs * m.inputs for m in matrices)
    mean = sum(float(s.double().sum()) for matrix in matrices for s in scores(matrix)) / count
    return sum(int((s > OUTLIER * mean).sum()) for matrix in matrices for s in scores(matrix)) / count


def by_outliers(sizes: list[int], ratios: list[float], sparsity: float) -> list[float]:
    """The share that goes of each block, from its size and its share of outliers."""
    if min(ratios) == max(ratios):
        return [sparsity] * len(ratios)
    mean = sum(size * ratio for size, ratio in zip(sizes, ratios, strict=True)) / sum(sizes)
    largest = max(abs(ratio - mean) for ratio in ratios)
    return [sparsity - LAMBDA * (ratio - mean) / largest for ratio in ratios]
