"""What flows into each matrix of a block, gathered while the block runs.

No hooks on modules: the matrices of a block are recognised where they are multiplied, by the memory of the weight,
so that ``nn.Linear``, GPT-2's Conv1D and the experts of a fused 3-D parameter are seen alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ebft.distributed import Ranks
from ebft.errors import EBFTError
from ebft.model.matrices import Matrix


@dataclass
class InputStatistics:
    """Sums over the inputs x of one matrix.

    Attributes:
        tokens: how many input vectors were seen.
        squares: float32 (inputs,), the sum of x_j^2.
        sums: float32 (inputs,), the sum of x_j; where ``"sums"`` are needed.
        gram: float32 (inputs, inputs), the sum of x_j x_k; where ``"gram"`` is needed.
    """

    tokens: int
    squares: Tensor
    sums: Tensor | None = None
    gram: Tensor | None = None

    @classmethod
    def empty(cls, inputs: int, device: torch.device, needs: Collection[str] = ()) -> InputStatistics:
        """Nothing seen yet; ``needs``: which there are beside tokens and squares."""
        shapes = {"sums": (inputs,), "gram": (inputs, inputs)}
        wanted = {name: torch.zeros(shape, device=device) for name, shape in shapes.items() if name in needs}
        return cls(0, torch.zeros(inputs, device=device), **wanted)

    def add(self, x: Tensor) -> None:
        """Take in x of shape (..., inputs)."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.tokens += rows.shape[0]
        self.squares += rows.square().sum(0)
        if self.sums is not None:
            self.sums += rows.sum(0)
        if self.gram is not None:
            self.gram.addmm_(rows.T, rows)

    def norm(self) -> Tensor:
        """||X_j||_2 for each input j, divided by the square root of the token count: float32 (inputs,)."""
        return (self.squares / max(self.tokens, 1)).sqrt()


Statistics = dict[str, list[InputStatistics]]  # parameter name -> those of each expert; one of a plain matrix


def sum_over_ranks_(statistics: Statistics, ranks: Ranks) -> None:
    """Over the ranks that share the sequences, in float64, so that the masks do not depend on who saw what."""
    each_once = {id(seen): seen for of_matrix in statistics.values() for seen in of_matrix}
    for seen in each_once.values() if ranks.count > 1 else ():
        parts = [part for part in (seen.squares, seen.sums, seen.gram) if part is not None]
        sums = [torch.tensor(seen.tokens), *(part.double() for part in parts)]
        ranks.add_(sums)
        seen.tokens = int(sums[0])
        for part, total in zip(parts, sums[1:], strict=True):
            part.copy_(total)


class InputObserver(TorchFunctionMode):
    """While active, adds the input of every product with one of ``matrices`` to ``statistics[name][expert]``.

    A product is seen wherever torch makes it, and proves how the weight is stored: by the strides along its inputs.

    Used as ``with observer.watching(): block(x)``. A matrix without experts has the one entry 0. Matrices that are
    given the same tensor one after another (q, k, v; gate, up) have the same object there, which sees it once.

    Args:
        needs: what is gathered beside tokens and squares (``InputStatistics``).
    """

    def __init__(self, block: nn.Module, matrices: list[Matrix], needs: Collection[str] = ()) -> None:
        super().__init__()
        self._block = block
        self._where: list[tuple[int, int, int, int, Matrix]] = []  # first byte, last + 1, of an expert, inputs, matrix
        self._needs = needs
        self._last: tuple[Tensor, int, InputStatistics] | None = None  # what was added last, its version, and to what
        self._followers: set[str] = set()  # matrices that share the statistics of one before
        self.statistics: Statistics = {}
        for matrix in matrices:
            weight = block.get_parameter(matrix.name)
            start, size = weight.data_ptr(), weight.numel() * weight.element_size()
            inputs = weight.shape[-2 if matrix.transposed else -1]  # of a teacher's there may be more
            self._where.append((start, start + size, size // matrix.experts, inputs, matrix))
            if matrix.experts > 1:  # of the others, those that are seen
                self.statistics[matrix.name] = [
                    InputStatistics.empty(matrix.inputs, weight.device, needs) for _ in range(matrix.experts)
                ]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe what runs inside; experts go through their plain loop, so that each is multiplied on its own."""
        configs = {
            id(m.config): m.config
            for m in self._block.modules()
            if hasattr(m, "is_transposed") and hasattr(m, "config")
        }
        before = {key: config._experts_implementation for key, config in configs.items()}
        for config in configs.values():
            config._experts_implementation = "eager"
        try:
            with self:
                yield
        finally:
            for key, config in configs.items():
                config._experts_implementation = before[key]
            self._last = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for x, weight in _operands(func, args, kwargs):
            self._see(x, weight)
        return func(*args, **kwargs)

    def _see(self, x: Tensor, weight: Tensor) -> None:
        """A product of x (..., inputs) with ``weight``, a view (outputs, inputs), or (experts, outputs, inputs)."""
        at = weight.data_ptr()
        for start, end, expert_bytes, inputs, matrix in self._where:
            if start <= at < end:
                if weight.shape[-1] == x.shape[-1] == inputs:
                    _check_orientation(matrix, weight)
                    first = (at - start) // expert_bytes
                    for expert, of_expert in enumerate(_by_expert(x, weight)):
                        self._take(matrix, first + expert, of_expert)
                return

    def _take(self, matrix: Matrix, expert: int, x: Tensor) -> None:
        name, again = matrix.name, self._is_last(x)
        if name not in self.statistics:
            leader = self._last[2] if again and self._last else None
            if leader is not None and leader.tokens == x.numel() // x.shape[-1]:  # it has seen this x and nothing else
                self.statistics[name] = [leader]
                self._followers.add(name)
                return
            self.statistics[name] = [InputStatistics.empty(matrix.inputs, x.device, self._needs)]
        seen = self.statistics[name][expert]
        if name in self._followers:
            if not again or self._last is None or self._last[2] is not seen:
                raise EBFTError(f"{name} is given what another matrix is given at first, and something else later on")
            return
        seen.add(x)
        self._last = (x, x._version, seen) if matrix.experts == 1 else None

    def _is_last(self, x: Tensor) -> bool:
        if self._last is None:
            return False
        last, version, _ = self._last  # which is held, so that its memory is not used twice
        return (last.data_ptr(), last.shape[-1], last.numel(), version) == (
            x.data_ptr(),
            x.shape[-1],
            x.numel(),
            x._version,
        )


def _check_orientation(matrix: Matrix, weight: Tensor) -> None:
    """``EBFTError`` if the inputs of a product do not lie where ``matrix`` says: in ``weight``, they are last."""
    if min(weight.shape[-2:]) > 1 and (weight.stride(-1) != 1) != matrix.transposed:
        forms = ("(outputs, inputs)", "(inputs, outputs)")
        raise EBFTError(
            f"{matrix.name} is multiplied as {forms[not matrix.transposed]}, and was taken to be "
            f"{forms[matrix.transposed]}; expected a family whose experts say how they are stored"
        )


def _by_expert(x: Tensor, weight: Tensor) -> list[Tensor]:
    """What each of the matrices in ``weight`` is given of ``x``."""
    if weight.ndim == 2:
        return [x]
    return list(x.expand(len(weight), *x.shape[1:])) if x.ndim == 3 else [x] * len(weight)


def _operands(func: Any, args: Any, kwargs: Any) -> list[tuple[Tensor, Tensor]]:
    """Which factors of a product may be (inputs, weight): the inputs' own axis last in both."""
    if func in PRODUCTS:
        places, names = PRODUCTS[func], _NAMES.get(func, ("input", "other"))
        x, weight = (args[at] if at < len(args) else kwargs.get(name) for at, name in zip(places, names, strict=True))
        if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and min(x.ndim, weight.ndim) > 0):
            return []
        if func is F.linear:
            return [(x, weight)] if weight.ndim == 2 else []
        right = [(x, weight.mT)] if weight.ndim in (2, 3) else []
        left = [(weight.mT, x)] if x.ndim in (2, 3) and weight.ndim > 1 else []  # weight @ x
        return right + left
    if func in _GROUPED and len(args) > 1 and args[1].ndim == 3:
        ends = kwargs["offs"] if "offs" in kwargs else args[2]
        parts = args[0].tensor_split(ends.tolist())[: len(args[1])]
        return [(x, weight.mT) for x, weight in zip(parts, args[1], strict=True)]
    if func is torch.einsum and len(args) == 3 and isinstance(args[0], str) and "." not in args[0]:
        terms, _, out = args[0].replace(" ", "").partition("->")
        own = list(zip(terms.split(","), args[1:], strict=True))
        summed = set(own[0][0]) & set(own[1][0]) - set(out)
        return [
            (x.movedim(of_x.index(letter), -1), weight.movedim(of_weight.index(letter), -1))
            for (of_x, x), (of_weight, weight) in (own, own[::-1])
            for letter in summed
            if len(summed) == 1 and weight.ndim == 2
        ]
    return []


# function -> (place of the input, place of the weight) among its arguments
PRODUCTS: dict[Any, tuple[int, int]] = {
    F.linear: (0, 1),
    torch.addmm: (1, 2),
    torch.baddbmm: (1, 2),
    **dict.fromkeys(
        (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm), (0, 1)
    ),
}
_NAMES = {  # of those two arguments, where they are not input and other
    F.linear: ("input", "weight"),
    torch.addmm: ("mat1", "mat2"),
    torch.baddbmm: ("batch1", "batch2"),
    torch.mm: ("input", "mat2"),
    torch.bmm: ("input", "mat2"),
}
_GROUPED = [f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f is not None]
