"""Whole runs on a real model: ``ebft`` against the straightforward loop, interleaved, on the same data and seed.

    python -m benchmarks.recovery --calibration c4.jsonl --eval wikitext2-test.txt

Each round runs every contender once: ``ebft``, the baseline, and the baseline with torch's fused AdamW. Tuning seconds
are those of the loop over steps, summed over blocks. Perplexities are measured by the same code, block by block.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.baseline_loop import run_baseline
from benchmarks.machine import write_result
from ebft import EBFTConfig, run_ebft
from ebft.data.calibration import calibration_tokens, evaluation_tokens
from ebft.evaluation.perplexity import perplexities
from ebft.model.checkpoint import load_model, load_tokenizer
from ebft.model.decoder import Decoder
from ebft.output.terminal import Reporter

CPU = torch.device("cpu")
CONTENDERS = ("ebft", "baseline", "baseline-fused-adamw")


def main() -> None:
    """Run the rounds and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: the SmolLM2-135M-Instruct wheel)")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--eval", default="builtin")
    parser.add_argument("--eval-windows", type=int, default=40, help="of 512 tokens, from the start of the text")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--name", default="recovery")
    given = parser.parse_args()

    tokenizer = load_tokenizer(given.model)
    windows = evaluation_tokens(given.eval, tokenizer, seqlen=512).ids[: given.eval_windows]
    contenders: dict[str, Callable[[], tuple[float, Any]]] = {
        "ebft": lambda: _ebft(given),
        "baseline": lambda: _baseline(given, tokenizer),
        "baseline-fused-adamw": lambda: _baseline(given, tokenizer, fused=True),
    }
    rows: list[dict[str, Any]] = []
    dense = _perplexity(load_model(given.model).float(), windows)
    for number in range(given.rounds):
        for name in given.contenders:
            seconds, model = contenders[name]()
            rows.append({"round": number, "contender": name, "tuning_seconds": seconds})
            rows[-1]["perplexity"] = _perplexity(model, windows)
            print(rows[-1], flush=True)
            medians = {
                name: statistics.median(r["tuning_seconds"] for r in rows if r["contender"] == name)
                for name in {row["contender"] for row in rows}
            }
            settings = {name: Path(v).name if isinstance(v, str) else v for name, v in vars(given).items()}
            content = {"settings": settings, "dense_perplexity": dense, "median_tuning_seconds": medians}
            file = write_result(given.name, {**content, "runs": rows})
    print(f"{medians}\nwritten to {file}")


def _config(given: argparse.Namespace, output: str) -> EBFTConfig:
    return EBFTConfig.preset(
        "paper",
        sparsity=0.6,
        calibration=given.calibration,
        windows="packed",
        eval="",
        device="cpu",
        dtype="float32",
        output=output,
        **{name: getattr(given, name) for name in ("model", "samples", "seqlen", "epochs", "lr")},
    )


def _ebft(given: argparse.Namespace) -> tuple[float, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config = _config(given, str(Path(folder) / "out"))
        result = run_ebft(config=config, reporter=Reporter(Console(file=io.StringIO())))
        return sum(block["tuning_seconds"] for block in result.blocks), result.model


def _baseline(given: argparse.Namespace, tokenizer: Any, **adamw: Any) -> tuple[float, Any]:
    config, model = _config(given, "unused"), load_model(given.model).float()
    tokens = calibration_tokens(
        config.data.calibration,
        tokenizer,
        samples=config.data.samples,
        seqlen=config.data.seqlen,
        windows=config.data.windows,
    )
    result = run_baseline(model, tokens.ids, config, **adamw)
    return result.tuning_seconds, model


def _perplexity(model: Any, windows: torch.Tensor) -> float:
    return perplexities(Decoder(model, CPU), {"text": windows})["text"]


if __name__ == "__main__":
    main()
