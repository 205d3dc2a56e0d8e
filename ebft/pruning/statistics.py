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

    Used as ``with observer.watching(): block(x)``. A matrix without experts has the one entry 0. Matrices that are
    given the same tensor one after another (q, k, v; gate, up) have the same object there, which sees it once.

    Args:
        needs: what is gathered beside tokens and squares (``InputStatistics``).
    """

    def __init__(self, block: nn.Module, matrices: list[Matrix], needs: Collection[str] = ()) -> None:
        super().__init__()
        self._block = block
        self._where: list[tuple[int, int, int, Matrix]] = []  # first byte, last byte + 1, bytes of one expert, matrix
        self._needs = needs
        self._last: tuple[Tensor, int, InputStatistics] | None = None  # what was added last, its version, and to what
        self._followers: set[str] = set()  # matrices that share the statistics of one before
        self.statistics: Statistics = {}
        for matrix in matrices:
            weight = block.get_parameter(matrix.name)
            start, size = weight.data_ptr(), weight.numel() * weight.element_size()
            self._where.append((start, start + size, size // matrix.experts, matrix))
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
        if func in PRODUCTS:
            x_at, weight_at = PRODUCTS[func]
            if weight_at < len(args) and isinstance(args[weight_at], Tensor):
                self._see(args[x_at], args[weight_at])
        return func(*args, **kwargs)

    def _see(self, x: Tensor, weight: Tensor) -> None:
        at = weight.data_ptr()
        for start, end, expert_bytes, matrix in self._where:
            if start <= at < end:
                self._take(matrix, (at - start) // expert_bytes, x)
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


# function -> (place of the input, place of the weight) among its arguments
PRODUCTS: dict[Any, tuple[int, int]] = {
    F.linear: (0, 1),
    torch.addmm: (1, 2),
    torch.matmul: (0, 1),
    torch.mm: (0, 1),
    Tensor.matmul: (0, 1),
    Tensor.__matmul__: (0, 1),
    Tensor.mm: (0, 1),
}
