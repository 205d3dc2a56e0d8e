"""When products that skip zeros are faster than torch's dense ones on this CPU: the table ``MaskedLinear`` goes by.

    python -m benchmarks.sparse_table [--write]

For every shape, share of zeros and number of tokens it times forward, dx, dW and all three as a step of a
``MaskedLinear`` has them (values gathered from the dense weight, gradients spread over a dense one), sparse and dense
in turns, on the threads that torch has. ``--write`` puts the break-even into ebft_kernels/sparse_measured.json: for so
many tokens, the least share of zeros from which on every shape's forward pass and step take at most 0.9 of the dense
time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import write_result
from ebft_kernels import PackedMask, dispatch
from ebft_kernels.places import Places

_OPS = torch.ops.ebft_kernels
SHAPES = ((192, 576), (576, 576), (1536, 576), (576, 1536), (5632, 2048), (2048, 5632), (11008, 4096))
SPARSITIES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TOKENS = (64, 128, 256, 512, 2048)
AT_MOST = 0.9  # of the dense time


class Layer:
    """A masked layer (outputs, inputs) and tokens, and its products: name -> function, ``sparse`` and ``dense``."""

    def __init__(self, outputs: int, inputs: int, sparsity: float, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.mask = torch.rand(outputs, inputs, generator=generator) >= sparsity
        self.weight = weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5 * self.mask
        x, dy = (torch.randn(tokens, width, generator=generator) for width in (inputs, outputs))
        self.x, self.dy = x, dy
        self.places = places = Places.of(PackedMask.from_dense(self.mask))
        walks, words, offsets = (*places.walk, *places.back), places.words, places.row_offsets
        values = _OPS.gather_kept(weight, words, offsets)
        self.sparse: dict[str, Callable[[], Any]] = {
            "forward": lambda: _OPS.sparse_linear(x, values, *walks, None, inputs),
            "dx": lambda: _OPS.sparse_linear_dx(dy, values, *walks, inputs),
            "dw": lambda: _OPS.sparse_linear_dw(dy, x, *walks),
            "step": lambda: self._step(walks, inputs),
        }
        self.dense: dict[str, Callable[[], Any]] = {
            "forward": lambda: F.linear(x, weight),
            "dx": lambda: dy @ weight,
            "dw": lambda: dy.T @ x,
            "step": lambda: (F.linear(x, weight), dy @ weight, dy.T @ x),
        }

    def _step(self, walks: tuple[Tensor, ...], inputs: int) -> tuple[Tensor, Tensor, Tensor]:
        words, offsets = self.places.words, self.places.row_offsets
        values = _OPS.gather_kept(self.weight, words, offsets)
        y = _OPS.sparse_linear(self.x, values, *walks, None, inputs)
        dx = _OPS.sparse_linear_dx(self.dy, values, *walks, inputs)
        dw = _OPS.sparse_linear_dw(self.dy, self.x, *walks)
        return y, dx, _OPS.decompress(words, dw, offsets, None, inputs)

    def validate(self) -> None:
        """Sparse products are no further from float64 than dense float32 ones."""
        x, dy, weight = (t.double() for t in (self.x, self.dy, self.weight))
        for name, true in (("forward", x @ weight.T), ("dx", dy @ weight), ("dw", (dy.T @ x)[self.mask])):
            dense = self.dense[name]()
            sparse, dense = self.sparse[name](), dense[self.mask] if name == "dw" else dense
            error, torchs = (float((of.double() - true).norm()) for of in (sparse, dense))
            if error > 1.1 * torchs:
                raise ArithmeticError(f"{name} is {error} from float64, torch's {torchs}; expected no more than that")

    def times(self, product: str, turns: int) -> tuple[float, float]:
        """Medians of ``turns``, in milliseconds: sparse, dense, in turns."""
        of: tuple[list[float], list[float]] = [], []
        for _ in range(turns):
            for kept, run in zip(of, (self.sparse[product], self.dense[product]), strict=True):
                began = time.perf_counter()
                run()
                kept.append((time.perf_counter() - began) * 1e3)
        return statistics.median(of[0]), statistics.median(of[1])


def main() -> None:
    """Measure, write ``results/<device>/sparse_table.json``, and with ``--write`` the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--least", type=int, default=0, help="weights of the smallest shape")
    parser.add_argument("--largest", type=int, default=2**24, help="weights of the largest shape")
    parser.add_argument("--name", default="sparse_table", help="of the result file")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    rows = []
    for shape in (shape for shape in SHAPES if given.least <= shape[0] * shape[1] <= given.largest):
        for tokens in TOKENS if shape[0] * shape[1] < 2**22 else TOKENS[2:-1]:
            for sparsity in SPARSITIES:
                layer = Layer(*shape, sparsity, tokens)
                layer.validate()
                row: dict[str, Any] = {"outputs": shape[0], "inputs": shape[1], "tokens": tokens, "sparsity": sparsity}
                for product in layer.sparse:
                    sparse, dense = layer.times(product, given.turns)
                    row |= {f"{product}_sparse_ms": round(sparse, 3), f"{product}_dense_ms": round(dense, 3)}
                    row[f"{product}_ratio"] = round(dense / sparse, 3)
                rows.append(row)
                print({key: value for key, value in row.items() if not key.endswith("_ms")}, flush=True)
    table = break_even(rows)
    print(table)
    print("written to", write_result(given.name, {"break_even": table, "cases": rows}))
    if given.write:
        measured = dispatch.sparse_measured()
        measured[dispatch.cpu_kind()] = table
        dispatch.SPARSE_MEASURED.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


def break_even(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Least tokens -> the least share of zeros from which on a step and a forward pass of all shapes pay."""
    table = {}
    for tokens in TOKENS:
        of = [row for row in rows if row["tokens"] == tokens]
        fails = [row["sparsity"] for row in of if min(row["step_ratio"], row["forward_ratio"]) * AT_MOST < 1]
        pays = [sparsity for sparsity in SPARSITIES if sparsity > max(fails, default=0.0)]
        if pays:
            table[str(tokens)] = min(pays)
    return {"sparsity": table, "least_side": min(min(row["outputs"], row["inputs"]) for row in rows)}


if __name__ == "__main__":
    main()
