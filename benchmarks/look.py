"""What a ``MaskedLinear`` costs beside ``nn.Linear`` for looking through its weight, and what skipped zeros win.

    python -m benchmarks.look

Forward passes in float32, with gradients to come. With few zeros both multiply densely, and the difference is the look;
with many the masked layer skips them, where that was measured to be faster.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from benchmarks.machine import write_result
from ebft_kernels import MaskedLinear, explain

SHAPES = ((1536, 576), (576, 1536), (576, 576), (2048, 2048))  # outputs, inputs


def main() -> None:
    """Measure and write ``results/<device>/look.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=101)
    parser.add_argument("--tokens", type=int, nargs="*", default=[16, 2048])
    parser.add_argument("--name", default="look", help="of the result file")
    given, rows = parser.parse_args(), []
    for outputs, inputs in SHAPES:
        for sparsity in (0.3, 0.6):
            for tokens in given.tokens:
                torch.manual_seed(0)
                x, plain = torch.randn(tokens, inputs), nn.Linear(inputs, outputs, bias=False)
                kept = torch.rand(outputs, inputs) >= sparsity
                with torch.no_grad():
                    plain.weight.mul_(kept)
                masked = MaskedLinear(inputs, outputs, bias=False, mask=kept)
                masked.load_state_dict(plain.state_dict())
                torch.testing.assert_close(masked(x), plain(x), rtol=1e-4, atol=1e-4)
                times: list[list[float]] = [[], []]
                for turn in range(given.turns):
                    for which in (0, 1) if turn % 2 else (1, 0):
                        began = time.perf_counter()
                        (plain, masked)[which](x)
                        times[which].append((time.perf_counter() - began) * 1e3)
                choice = explain("masked_linear", shape=(outputs, inputs), density=1 - sparsity, tokens=tokens)
                row = {"outputs": outputs, "inputs": inputs, "tokens": tokens, "sparsity": sparsity}
                row |= dict(
                    zip(("linear_ms", "masked_ms"), (round(statistics.median(of), 4) for of in times), strict=True)
                )
                ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
                rows.append({**row, "median_ratio": round(ratio, 4), "skips_zeros": choice.fused})
                print(rows[-1], flush=True)
    print("written to", write_result(given.name, {"settings": vars(given), "cases": rows}))


if __name__ == "__main__":
    main()
