"""A training loop with masked layers against the straightforward one, in turns: what the drop-in gains on a CPU.

    python -m benchmarks.drop_in

An MLP of three layers (576 -> 1536 -> 576 -> 1536, SiLU between), 2,048 tokens a step, float32. Ours: ``MaskedLinear``
and ``MaskedAdamW``. Theirs: ``F.linear`` with ``weight * mask``, and ``torch.optim.AdamW(fused=True)``.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import write_result
from ebft_kernels import MaskedAdamW, PackedMask, explain, mask_linears_

WIDTHS = (576, 1536, 576, 1536)


class Multiplied(nn.Linear):
    """``nn.Linear`` with a mask that takes part in each product."""

    mask: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Of (..., in_features)."""
        return F.linear(input, self.weight * self.mask, self.bias)


class Loop:
    """A model, its optimizer and its data; ``step()`` trains on the next batch and gives the loss."""

    def __init__(self, ours: bool, sparsity: float, tokens: int, **settings: Any) -> None:
        torch.manual_seed(0)
        kind = nn.Linear if ours else Multiplied
        sides = itertools.pairwise(WIDTHS)
        self.model = nn.Sequential(*(layer for side in sides for layer in (kind(*side), nn.SiLU())))[:-1]
        self.x, self.y = torch.randn(tokens, WIDTHS[0]), torch.randn(tokens, WIDTHS[-1])
        layers = [layer for layer in self.model if isinstance(layer, nn.Linear)]
        masks = [torch.rand(layer.weight.shape) >= sparsity for layer in layers]
        with torch.no_grad():
            for layer, mask in zip(layers, masks, strict=True):
                layer.weight.mul_(mask)
                if not ours:
                    layer.mask = mask.float()
        if ours:
            mask_linears_(self.model, {f"{2 * n}.weight": PackedMask.from_dense(mask) for n, mask in enumerate(masks)})
            self.optimizer: torch.optim.Optimizer = MaskedAdamW.for_module(self.model, lr=1e-3, **settings)
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)

    def step(self) -> float:
        """Forward, backward, update."""
        loss = F.mse_loss(self.model(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def main() -> None:
    """Measure and write ``results/<device>/drop_in.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--name", default="drop_in", help="of the result file")
    given = parser.parse_args()
    rows = []
    for sparsity in (0.5, 0.6, 0.7, 0.8):
        loops = {"ebft": Loop(True, sparsity, given.tokens), "multiplied": Loop(False, sparsity, given.tokens)}
        ours, theirs = ([loop.step() for _ in range(2)] for loop in loops.values())
        if any(abs(a - b) > 1e-5 * b for a, b in zip(ours, theirs, strict=True)):
            raise ArithmeticError(f"losses are {ours} and {theirs}; expected the same")
        times: dict[str, list[float]] = {name: [] for name in loops}
        for turn in range(given.turns):
            for name in sorted(loops, reverse=bool(turn % 2)):
                began = time.perf_counter()
                loops[name].step()
                times[name].append((time.perf_counter() - began) * 1e3)
        ratios = [b / a for a, b in zip(*times.values(), strict=True)]
        why = explain("masked_linear", shape=(WIDTHS[1], WIDTHS[0]), density=1 - sparsity, tokens=given.tokens)
        row = {"sparsity": sparsity, **{f"{name}_ms": round(statistics.median(of), 2) for name, of in times.items()}}
        rows.append({**row, "median_ratio": round(statistics.median(ratios), 3), "why": str(why)})
        print(rows[-1], flush=True)
    print("written to", write_result(given.name, {"settings": vars(given), "cases": rows}))


if __name__ == "__main__":
    main()
