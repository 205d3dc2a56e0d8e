"""A whole run of ``python -m ebft.run`` over a model in LlamaV1-7B's shape, random weights and fewer blocks: what a run
of all 32 blocks takes on this GPU, and whether it keeps to the memory that it was allowed.

    python -m benchmarks.seven_b_run [--blocks 4] [--gpu-memory 16GB] [--runs paper light best]

The checkpoint is written to a scratch folder in shards, read from there block by block, and the recovered one is
saved. Minutes for 32 blocks are those of a block, the first aside (it warms up), times 32, and what a run does beside
its blocks: start, loading, saving. Perplexities would mean nothing here, and are not measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.machine import write_result
from benchmarks.small_models import trained_tokenizer
from ebft.cli.app import parse_args
from ebft.data.calibration import builtin_documents
from ebft.plan.planner import make_plan

BLOCKS = 32
VOCABULARY = 512  # of the tokenizer: short tokens, so that enough of the built-in documents have 1024 of them


def main() -> None:
    """Make the checkpoint, run each preset on it, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--gpu-memory", default="16GB", help="what ebft.run is allowed; nothing: no limit")
    parser.add_argument("--runs", nargs="+", default=["paper", "light"], help="presets")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=11008)
    parser.add_argument("--name", default="seven_b_run")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    parser.add_argument("flags", nargs="*", help="after --: more flags for ebft.run, such as -- --samples 32")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        model = Path(scratch) / "model"
        make_model(model, given.blocks, given.hidden, given.ffn)
        print(f"the checkpoint was written in {time.perf_counter() - began:.0f} s", flush=True)
        for preset in given.runs:
            flags = ["--preset", preset, "--calibration", "builtin", "--eval", "", *given.flags]
            flags += ["--gpu-memory", given.gpu_memory] if given.gpu_memory else []
            flags += ["--fused"] if torch.cuda.is_available() else []
            rows.append({"preset": preset, "flags": flags, **run(flags, model, Path(scratch) / "out")})
            print(rows[-1], flush=True)
            content = {"settings": {**vars(given), "out": None}, "runs": rows}
            file = write_result(given.name, content, given.out)
    print(f"written to {file}")


def make_model(folder: Path, blocks: int, hidden: int, ffn: int) -> None:
    """A random bfloat16 checkpoint with a tokenizer for it."""
    shape = LlamaConfig(
        num_hidden_layers=blocks, hidden_size=hidden, intermediate_size=ffn, pad_token_id=0, dtype="bfloat16"
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(shape).bfloat16()
    model.save_pretrained(folder, max_shard_size="2GB")
    small_tokenizer().save_pretrained(folder)


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Of ``VOCABULARY`` tokens, trained on the built-in text."""
    return trained_tokenizer(builtin_documents("calibration"), VOCABULARY)


def run(flags: list[str], model: Path, output: Path) -> dict[str, Any]:
    """One run's seconds and memory, beside those of its plan."""
    flags = [*flags, "--model", str(model), "--output", str(output), "--overwrite"]
    plan = make_plan(parse_args(flags)[0])
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "ebft.run", *flags], check=True)
    wall = time.perf_counter() - began
    summary = json.loads((output / "ebft_summary.json").read_text(encoding="utf-8"))
    blocks = [json.loads(line) for line in (output / "blocks.jsonl").read_text(encoding="utf-8").splitlines()]
    block = statistics.median(row["seconds"] for row in blocks[1:] or blocks)
    beside = wall - sum(row["seconds"] for row in blocks)
    return {
        "seconds": wall,
        "stage_seconds": summary["stage_seconds"],
        "seconds_a_block": [row["seconds"] for row in blocks],
        "tuning_seconds_a_block": [row["tuning_seconds"] for row in blocks],
        "relative_errors": [(row["relative_error_before"], row["relative_error_after"]) for row in blocks],
        f"minutes_for_{BLOCKS}_blocks": (BLOCKS * block + beside) / 60,
        "peak_gib": max(row["peak_memory_bytes"] for row in blocks) / 2**30,
        "planned_gib": plan.device_peak / 2**30,
        "chosen": plan.chosen,
        "implementations": summary["implementations"],
    }


if __name__ == "__main__":
    main()
