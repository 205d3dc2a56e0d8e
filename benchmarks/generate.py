"""Greedy generation with a pruned model: stored dense, in float32 and bfloat16, against stored without its zeros.

    python -m benchmarks.generate                      # SmolLM2-135M, 50 and 70 %
    python -m benchmarks.generate --model ./pruned     # a pruned model of yours

Every contender runs in a process of its own, contenders take turns, and each runs with one thread and with all; the
better median counts. Resident memory is the process's own (anonymous) after generation, less that before the model was
loaded.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import ebft
from benchmarks.machine import write_result
from ebft import EBFTConfig, run_ebft
from ebft.compressed.layers import save_compressed
from ebft.output.terminal import Reporter
from ebft_kernels import CompressedLinear

CONTENDERS = ("dense float32", "dense bfloat16", "compressed bfloat16", "compressed int8")
PROMPT = "Write a short story about a lighthouse keeper who finds a letter in a bottle."


def main() -> None:
    """Prune, compress, run the contenders and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a pruned model's folder (default: SmolLM2-135M, pruned here by magnitude)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="generate")
    parser.add_argument("--one", nargs=3, metavar=("CONTENDER", "FOLDER", "THREADS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], Path(given.one[1]), int(given.one[2]), given.tokens)))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for sparsity in ["as given"] if given.model else given.sparsity:
            folder = Path(scratch) / f"{sparsity}"
            dense = Path(given.model) if given.model else pruned(float(sparsity), folder / "dense")
            folders = {"dense": dense, "compressed": folder / "bf16", "compressed int8": folder / "int8"}
            saved = save_compressed(str(bfloat16(dense, folder / "stored")), str(folders["compressed"]))
            save_compressed(str(folder / "stored"), str(folders["compressed int8"]), values="int8")
            folders["dense"] = folder / "stored"
            for number in range(given.rounds):
                for contender in CONTENDERS:
                    for threads in sorted({1, torch.get_num_threads()}):
                        place = folders.get(contender, folders[contender.split()[0]])
                        command = [sys.executable, "-m", "benchmarks.generate", "--tokens", str(given.tokens), "--one"]
                        command += [contender, str(place), str(threads)]
                        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                        found = json.loads(done.stdout.splitlines()[-1])
                        rows.append({"sparsity": sparsity, "round": number, "contender": contender, **found})
                        print(rows[-1], flush=True)
            file = write_result(given.name, {"summary": summary(rows, saved["dense_bytes"]), "runs": rows})
    print(f"written to {file}")


def pruned(sparsity: float, folder: Path) -> Path:
    """SmolLM2-135M pruned by magnitude, not recovered: what it says is not what is measured."""
    config = EBFTConfig.preset(
        "demo", prune="magnitude", sparsity=sparsity, recover="none", eval="", output=str(folder), device="cpu"
    )
    run_ebft(config=config, reporter=Reporter(Console(file=io.StringIO())))
    return folder


def bfloat16(source: Path, folder: Path) -> Path:
    """The model stored in bfloat16."""
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def measure(contender: str, folder: Path, threads: int, tokens: int) -> dict[str, Any]:
    """Load one contender, generate, and report tokens a second and bytes."""
    torch.set_num_threads(threads)
    before = resident()
    if contender.startswith("compressed"):
        model: Any = ebft.load_compressed(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, contender.split()[1]))
    for tensor in (*model.parameters(), *model.buffers()):  # out of the file's pages, which would not be counted
        tensor.data = tensor.data.clone()
    prompt = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    model.generate(**prompt, **{**how, "max_new_tokens": 2, "min_new_tokens": 2})
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        model.generate(**prompt, **how)
        seconds.append(time.perf_counter() - began)
    gc.collect()
    inside = [m for name, m in model.named_modules() if ".layers." in name]
    linears = [m for m in inside if isinstance(m, torch.nn.Linear | CompressedLinear)]
    return {
        "threads": threads,
        "tokens_per_second": tokens / statistics.median(seconds),
        "block_linear_bytes": sum(m.nbytes() if isinstance(m, CompressedLinear) else m.weight.nbytes for m in linears),
        "resident_bytes": resident() - before,
        "file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    }


def resident() -> int:
    """Anonymous resident bytes of this process (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def summary(rows: list[dict[str, Any]], dense_bytes: int) -> list[dict[str, Any]]:
    """By sparsity and contender: the better median of the thread counts, and bytes against dense bfloat16."""
    out = []
    for sparsity, contender in dict.fromkeys((row["sparsity"], row["contender"]) for row in rows):
        mine = [row for row in rows if (row["sparsity"], row["contender"]) == (sparsity, contender)]
        by_threads = {
            n: statistics.median(row["tokens_per_second"] for row in mine if row["threads"] == n)
            for n in {row["threads"] for row in mine}
        }
        best = max(by_threads, key=lambda n: by_threads[n])
        out.append(
            {
                "sparsity": sparsity,
                "contender": contender,
                "tokens_per_second": by_threads[best],
                "threads": best,
                "block_linear_share_of_bfloat16": mine[0]["block_linear_bytes"] / dense_bytes,
                "block_linear_bytes": mine[0]["block_linear_bytes"],
                "resident_bytes": statistics.median(row["resident_bytes"] for row in mine),
                "file_bytes": mine[0]["file_bytes"],
            }
        )
    return out


if __name__ == "__main__":
    main()
