"""The closed form of a layer: the kept weights that come nearest to the dense layer's outputs, by least squares.

For a layer with dense weight W0, dense inputs Xd and the inputs Xs that it has in the sparse block (rows: tokens),

    minimise over W with mask M:   || Xs W' - Xd W0' ||^2 + damping || W - W_start ||^2

whose normal equations hold on each row's kept entries alone:  W H = W0 C,  H = Xs' Xs,  C = Xd' Xs. Every row has its
own mask, so its own system; all are solved together by conjugate gradients, preconditioned by the diagonal, whose one
costly part is a product with the shared H (Hestenes and Stiefel, 1952; for pruned layers: ALPS, arXiv 2406.07831).

With ``--cg-inputs dense`` every layer is solved on the inputs that it has in the dense block (Xs = Xd, C = H), whose
Gram matrices come from the pass that makes the targets: no pass more, one matrix for all layers that multiply the same
tensor. With ``sparse`` layers that multiply the same tensor (q, k, v; o; gate, up; down) are a group. Groups are solved
in the order of their use, each on the inputs that the solved ones before it give, so that a later layer repairs what
earlier ones left over: two partial passes more, and two matrices, for each group.
Biases and norms stay as they are; where structured pruning has put something into a bias, the weights are solved for
what it does not give already. Experts have their own tokens, which the dense router would choose otherwise: there
both inputs are those of the sparse block (C = H).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ebft.config import EBFTConfig
from ebft.data.streams import carry
from ebft.distributed import Ranks
from ebft.model.matrices import Matrix
from ebft.pruning.statistics import InputObserver, InputStatistics, Statistics, sum_over_ranks_
from ebft.pruning.structured.units import bias_of
from ebft.recovery.layerwise import Layerwise
from ebft.recovery.samples import Errors, Split, samples_of_all
from ebft.recovery.task import BlockResult, BlockTask, Forward

_SUMS = frozenset({"gram", "sums"})  # of the dense block's inputs
ROWS_AT_ONCE = 2**26  # entries of the rows that are solved together: 256 MiB for each of some nine tensors


class ClosedForm:
    """Solves a block's layers; one object serves all blocks.

    Args:
        config: the settings of ``--recover layerwise``, the validation split and the batch size.
        device: where the block lives and the batches go.
        ranks: those that share the samples; H and C are summed over them.
    """

    def __init__(self, config: EBFTConfig, device: torch.device, ranks: Ranks | None = None) -> None:
        self._own, self._split = config.of_method(Layerwise.Settings), config.recover.holdout
        self._gathered = self._own.cg_inputs == "dense" and not self._split  # by the pass that makes the targets
        self._device, self._ranks = device, ranks or Ranks()
        self._at_once = config.recover.at_once

    @torch.no_grad()
    def recover(self, task: BlockTask) -> BlockResult:
        """Solve layer after layer; where the block's error rises by that, its pruned weights are kept."""
        began, notes = time.perf_counter(), list[str]()
        split = Split.of(samples_of_all(task.inputs, self._ranks), self._split, self._ranks)
        errors = Errors(task.inputs, task.targets, split, self._device, self._ranks, self._at_once)
        judged = split.held_out if len(split.held_out) else split.probe
        through = partial(task.forward, task.block)
        before, judged_before = errors.of(through, split.probe), errors.of(through, judged)
        start = {matrix.name: task.block.get_parameter(matrix.name).clone() for matrix in task.matrices}

        dense, rows, on_dense_inputs = task.dense_block(), split.here(split.tuned), self._own.cg_inputs == "dense"
        if on_dense_inputs:
            statistics = task.statistics if self._gathered else self._gather(task, dense, rows)
            groups = [[matrix] for matrix in task.matrices if matrix.name in statistics]
        else:
            some = task.inputs[: self._at_once].to(self._device).float()
            groups = self._ranks.first(lambda: input_groups(task.block, task.matrices, task.forward, some))
        narrower: list[str] = []
        for done, group in enumerate(groups):
            if on_dense_inputs:
                products = [InputProducts.of_dense(seen) for seen in statistics.pop(group[0].name)]
            else:
                products = self._products(task, dense, group[0], rows)
            narrower += self._solve(task, dense, group, products)
            task.on_step(done + 1, len(groups))
        unseen = [matrix.name for matrix in task.matrices if all(matrix not in group for group in groups)]
        if narrower:
            notes.append(f"layerwise: the dense block has more of {', '.join(narrower)}; left as pruned")
        if unseen:
            notes.append(f"layerwise: the block does not multiply {', '.join(unseen)}; left as pruned")

        after, judged_after = errors.of(through, split.probe), errors.of(through, judged)
        if not judged_after <= judged_before:
            notes.append(
                f"layerwise: the block's error was {judged_before:.3g} before and {judged_after:.3g} after; the pruned "
                "weights were kept"
            )
            for name, weight in start.items():
                task.block.get_parameter(name).copy_(weight)
            after, judged_after = before, judged_before
        return BlockResult(
            losses=[],
            gradient_norms=[],
            error_before=before,
            error_after=after,
            branch_energy=errors.branch_energy(),
            seconds=time.perf_counter() - began,
            notes=notes,
            held_out_before=judged_before if len(split.held_out) else None,
            held_out_after=judged_after if len(split.held_out) else None,
        )

    def _gather(self, task: BlockTask, dense: nn.Module, rows: Tensor) -> Statistics:
        """What flows into the dense block's layers, of these samples alone."""
        assert task.dense_inputs is not None
        observer = InputObserver(dense, list(task.matrices), _SUMS)
        with observer.watching():
            for (x,) in carry(self._device, (task.dense_inputs,), _parts(rows, self._at_once)):
                task.dense_forward(dense, x)
        sum_over_ranks_(observer.statistics, self._ranks)
        return observer.statistics

    def _products(self, task: BlockTask, dense: nn.Module, first: Matrix, rows: Tensor) -> list[InputProducts]:
        """Of each expert, for the group of ``first``: with what the block as it is now gives to it."""
        assert task.dense_inputs is not None
        inputs, dense_inputs = (
            first.by_expert(block.get_parameter(first.name)).shape[2] for block in (task.block, dense)
        )
        sums = [InputProducts.empty(inputs, dense_inputs, self._device) for _ in range(first.experts)]
        for x, dense_x in carry(self._device, (task.inputs, task.dense_inputs), _parts(rows, self._at_once)):
            seen = inputs_of(task.block, first, task.forward, x)
            seen_dense = seen if first.experts > 1 else inputs_of(dense, first, task.dense_forward, dense_x)
            for products, sparse, of_dense_x in zip(sums, seen, seen_dense, strict=True):
                whole = all(len(inputs) == x.shape[0] * x.shape[1] for inputs in (sparse, of_dense_x))
                products.add(sparse, of_dense_x if whole else sparse)
        for products in sums:
            self._ranks.add_([products.gram, products.cross, products.sums])
        return sums

    def _solve(
        self, task: BlockTask, dense: nn.Module, matrices: list[Matrix], products: list[InputProducts]
    ) -> list[str]:
        """Solve layers that have the same inputs, in place; gives the names of those that cannot be.

        These are narrower than the dense block's in outputs, or in inputs too where ``products`` are of the dense ones.
        """
        narrower = []
        for matrix in matrices:
            own, of_dense = (matrix.by_expert(block.get_parameter(matrix.name)) for block in (task.block, dense))
            if own.shape[1] != of_dense.shape[1] or own.shape[2] != products[0].gram.shape[0]:
                narrower.append(matrix.name)
                continue
            offset = _offset(task.block, dense, matrix)
            kept = matrix.by_expert(task.masks[matrix.name].dense().to(self._device))
            for weight, target, mask, of_expert in zip(own, of_dense, kept, products, strict=True):
                aim, cross = of_expert.aimed_at(target, offset)
                weight.copy_(
                    masked_least_squares(
                        aim,
                        weight,
                        mask,
                        of_expert.gram,
                        cross,
                        iterations=self._own.cg_iterations,
                        damping=self._own.cg_damping,
                    )
                )
        return narrower


def _parts(rows: Tensor, at_once: int) -> list[Tensor]:
    return [part for part in rows.split(at_once) if len(part)]


def _offset(block: nn.Module, dense: nn.Module, matrix: Matrix) -> Tensor | None:
    """What the dense layer's bias gives beyond the block's own (outputs,); None where they are the same."""
    own, of_dense = bias_of(block, matrix), bias_of(dense, matrix)
    return None if own is None or of_dense is None or torch.equal(own, of_dense) else of_dense - own


# --- the system of a layer ------------------------------------------------------------------------------------------


@dataclass
class InputProducts:
    """Sums over tokens, float32: ``gram`` = Xs' Xs, ``cross`` = Xd' Xs (dense inputs, inputs), ``sums`` of Xs."""

    gram: Tensor
    cross: Tensor
    sums: Tensor

    @classmethod
    def empty(cls, inputs: int, dense_inputs: int, device: torch.device) -> InputProducts:
        """Nothing seen yet."""
        shapes = ((inputs, inputs), (dense_inputs, inputs), (inputs,))
        return cls(*(torch.zeros(shape, device=device) for shape in shapes))

    @classmethod
    def of_dense(cls, seen: InputStatistics) -> InputProducts:
        """Where both have the same inputs."""
        assert seen.gram is not None
        assert seen.sums is not None
        return cls(seen.gram, seen.gram, seen.sums)

    def add(self, sparse: Tensor, dense: Tensor) -> None:
        """Take in the same tokens' inputs of both, (tokens, inputs) each."""
        sparse = sparse.float()
        self.gram.addmm_(sparse.T, sparse)
        self.cross.addmm_(dense.float().T, sparse)
        self.sums += sparse.sum(0)

    def aimed_at(self, target: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
        """``target`` and ``cross``, with ``offset`` (outputs,) among what is aimed at: a weight whose input is 1."""
        if offset is None:
            return target, self.cross
        return torch.cat([target, offset.unsqueeze(1)], 1), torch.cat([self.cross, self.sums.unsqueeze(0)])


@torch.no_grad()
def masked_least_squares(
    target: Tensor, start: Tensor, mask: Tensor, gram: Tensor, cross: Tensor, *, iterations: int, damping: float
) -> Tensor:
    """The weight that solves  W (H + d I) = W0 C + d W_start  on every row's kept entries, d = damping * mean diag(H).

    No row ends with a larger value of the objective whose minimum this is than it began with.

    Args:
        target: the dense weight W0, (outputs, dense inputs).
        start: where it begins, (outputs, inputs), zero where pruned.
        mask: bool (outputs, inputs), True = kept.
        gram: H, (inputs, inputs), symmetric and positive semi-definite.
        cross: C, (dense inputs, inputs).
        iterations: of conjugate gradients; a row with k kept weights needs k at the most, but for rounding.
        damping: at least 0.

    Returns:
        (outputs, inputs) in ``start``'s dtype, which all the others have; exactly 0 where pruned.
    """
    step = max(1, ROWS_AT_ONCE // start.shape[1])
    shift = damping * gram.diagonal().mean()
    diagonal = gram.diagonal() + shift
    scale = torch.where(
        diagonal > 0, diagonal, 1
    ).reciprocal()  # of the preconditioner; a dead input has nothing to give
    solved = [
        _conjugate_gradients(t @ cross + shift * s, s, m, gram, shift, scale, iterations)
        for t, s, m in zip(target.split(step), start.split(step), mask.split(step), strict=True)
    ]
    return torch.cat(solved)


def _conjugate_gradients(
    wanted: Tensor, start: Tensor, mask: Tensor, gram: Tensor, shift: Tensor, scale: Tensor, iterations: int
) -> Tensor:
    """Rows of  W (H + shift) = wanted  on kept entries; (rows, inputs) each, ``scale`` (inputs,)."""

    def applied(rows: Tensor) -> Tensor:
        return torch.where(mask, torch.addcmul(rows @ gram, rows, shift), 0)

    kept, weight = torch.where(mask, wanted, 0), start.clone()
    residual = kept - applied(weight)
    value_before = -(weight * (residual + kept)).sum(1)
    direction = residual * scale
    slope = (residual * direction).sum(1, keepdim=True)
    for _ in range(iterations):
        image = applied(direction)
        length = _quotient(slope, (direction * image).sum(1, keepdim=True))
        weight.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        towards = residual * scale
        slope, last = (residual * towards).sum(1, keepdim=True), slope
        direction = towards.addcmul_(_quotient(slope, last), direction)
    residual = kept - applied(weight)  # the one carried along has drifted
    value = -(weight * (residual + kept)).sum(1)
    return torch.where((value <= value_before).unsqueeze(1) & mask, weight, start)


def _quotient(over: Tensor, under: Tensor) -> Tensor:
    """0 where a row has nothing left to solve."""
    return torch.where(under > 0, over / under, 0)


# --- what layers are given ------------------------------------------------------------------------------------------


def input_groups(block: nn.Module, matrices: Sequence[Matrix], forward: Forward, hidden: Tensor) -> list[list[Matrix]]:
    """``matrices`` by the tensor that they multiply, in the order of their first use; fused experts each alone.

    Args:
        hidden: a few hidden states (batch, seqlen, width) to run through the block.
    """
    groups: dict[tuple[object, ...], list[Matrix]] = {}
    held: list[Tensor] = []  # so that no memory is used twice
    seen: set[str] = set()

    def see(matrix: Matrix, expert: int, x: Tensor) -> None:
        if matrix.name not in seen:
            seen.add(matrix.name)
            held.append(x)
            alone = matrix.experts > 1
            key = (matrix.name,) if alone else (x.data_ptr(), x.numel(), x._version)
            groups.setdefault(key, []).append(matrix)

    with watched(block, matrices, see):
        forward(block, hidden)
    return list(groups.values())


def inputs_of(block: nn.Module, matrix: Matrix, forward: Forward, hidden: Tensor) -> list[Tensor]:
    """What ``matrix`` (each expert of it) is given when ``hidden`` runs through ``block``: (tokens, inputs) each."""
    found: list[list[Tensor]] = [[] for _ in range(matrix.experts)]

    def see(_: Matrix, expert: int, x: Tensor) -> None:
        found[expert].append(x.detach().reshape(-1, x.shape[-1]))
        if matrix.experts == 1:
            raise _Reached

    with watched(block, [matrix], see), contextlib.suppress(_Reached):
        forward(block, hidden)
    nothing = hidden.new_empty(0, matrix.inputs)
    return [torch.cat(of_expert) if of_expert else nothing for of_expert in found]


class _Reached(Exception):
    """What was wanted has been seen: the rest of the block need not run."""


class _Told(InputStatistics):
    """Hands inputs on and keeps nothing."""

    def __init__(self, take: Callable[[Tensor], None]) -> None:
        super().__init__(0, torch.empty(0))
        self._take = take

    def add(self, x: Tensor) -> None:
        self._take(x)


@contextlib.contextmanager
def watched(block: nn.Module, matrices: Sequence[Matrix], see: Callable[[Matrix, int, Tensor], None]) -> Iterator[None]:
    """While inside, ``see(matrix, expert, x)`` is called for every product of ``block`` with one of ``matrices``."""
    observer = InputObserver(block, list(matrices))
    for matrix in matrices:
        observer.statistics[matrix.name] = [_Told(partial(see, matrix, expert)) for expert in range(matrix.experts)]
    with observer.watching():
        yield
