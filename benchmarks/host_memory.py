"""Peak host memory of whole runs: a model that is streamed, and the same model loaded whole.

    python -m benchmarks.host_memory

Two models: a random Llama-shaped one of 1.1 B parameters (bfloat16, shards of 500 MB, made here), and SmolLM2-135M
saved as safetensors. Each run is a child, whose /proc/PID/smaps_rollup is read every 20 ms: its anonymous and shared
pages are what it holds; the resident peak counts pages of mapped files too, which the system takes back when it needs
them. The bound is the activation cache (both streams), four blocks in float32, in which a CPU computes, and 1.5 GiB.

"whole" copies the weights into memory, in the checkpoint's dtype: transformers maps safetensors files, whose pages are
then the system's; ``.bin`` files, GGUF, and any change of dtype hold all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import write_result
from ebft.data.calibration import builtin_documents
from ebft.model.blocks import find_blocks
from ebft.model.checkpoint import load_config, load_model, load_tokenizer, open_model

LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 20,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 49152,  # that of SmolLM2, whose tokenizer it gets
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
IN_MEMORY = """
import sys
from ebft import run_ebft
from ebft.cli.app import parse_args
from ebft.model.checkpoint import load_model, load_tokenizer
config, _ = parse_args(sys.argv[1:])
model = load_model(config.model.source)
for parameter in model.parameters():
    parameter.data = parameter.data.clone()
run_ebft(model, config, tokenizer=load_tokenizer(config.model.source))
"""
CONTENDERS = {
    "streamed": (["-m", "ebft.run"], []),
    "whole": (["-c", IN_MEMORY], []),
    "streamed, hidden states on disk": (["-m", "ebft.run"], ["--streams", "disk"]),
}


def main() -> None:
    """Run every contender on both models and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=64)
    parser.add_argument("--scratch", help="folder for the models (default: a temporary one)")
    parser.add_argument("--name", default="host_memory")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        folder = Path(scratch)
        text = folder / "text.txt"
        text.write_text(builtin_documents("evaluation")[0][:2400], encoding="utf-8")
        models = {"llama-shaped-1.1B": make_large(folder / "large"), "SmolLM2-135M": make_small(folder / "small")}
        sizes = {model: measure_model(path) for model, path in models.items()}
        for contender, (program, extra) in CONTENDERS.items():
            for model, path in models.items():
                cache = 2 * given.samples * given.seqlen * sizes[model]["width"] * 4
                bound = cache + 4 * sizes[model]["block_bytes_float32"] + 3 * 2**29
                flags = ["--preset", "demo", "--model", str(path), "--eval", str(text), "--output", str(folder / "out")]
                flags += ["--samples", str(given.samples), "--seqlen", str(given.seqlen), "--epochs", "1"]
                flags += ["--overwrite"]
                peak = watch([sys.executable, *program, *flags, *extra])
                summary = json.loads((folder / "out" / "ebft_summary.json").read_text(encoding="utf-8"))
                row = {"model": model, "contender": contender, **sizes[model], "cache_bytes": cache}
                row |= {"bound_bytes": bound, "anonymous_and_shared_bytes": peak.held}
                row |= {"resident_bytes": peak.resident, "of_bound": round(peak.held / bound, 3)}
                row |= {"seconds": round(peak.seconds, 1), "peak_while": stage_at(summary["stage_seconds"], peak)}
                row["perplexity"] = {"text": next(iter(summary["perplexity"].values()))}
                rows.append(row)
                print({k: round(v / 2**30, 2) if k.endswith("bytes") else v for k, v in row.items()}, flush=True)
                settings = {"samples": given.samples, "seqlen": given.seqlen}
                file = write_result(given.name, {"settings": settings, "runs": rows})
    print(file)


@dataclass(frozen=True)
class Peak:
    """Bytes that a process held (anonymous and shared pages), when it did, its resident peak, and how long it ran."""

    held: int
    at: float
    resident: int
    seconds: float


def watch(command: list[str]) -> Peak:
    """Run ``command`` to its end and see what memory it takes."""
    began, held, at = time.perf_counter(), 0, 0.0
    child = subprocess.Popen(command)
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        now = _held(child.pid)
        if now > held:
            held, at = now, time.perf_counter() - began
        time.sleep(0.02)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{command} ended with {child.returncode}")
    return Peak(held, at, usage.ru_maxrss * 1024, time.perf_counter() - began)


def stage_at(laps: dict[str, float], peak: Peak) -> str:
    """The stage of a run (seconds of each, in order) that was going on at the peak, counted from the end."""
    ends = peak.seconds
    for name, seconds in reversed(laps.items()):
        ends -= seconds
        if peak.at >= ends:
            return name
    return "before the first stage"


def _held(pid: int) -> int:
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0
    sizes = dict(re.findall(r"^(\w+): +(\d+) kB$", rollup, re.MULTILINE))
    return 1024 * (int(sizes.get("Anonymous", 0)) + int(sizes.get("Pss_Shmem", 0)))


def measure_model(path: Path) -> dict[str, int]:
    """Bytes of the model as stored, and of its largest block in float32."""
    model = open_model(str(path)).model
    blocks = [sum(p.numel() for p in block.parameters()) for block in find_blocks(model)[1]]
    return {
        "width": load_config(str(path)).hidden_size,
        "model_bytes": sum(p.nbytes for p in model.parameters()),
        "block_bytes_float32": 4 * max(blocks),
    }


def make_large(folder: Path) -> Path:
    """The random model, written shard by shard."""
    config = LlamaConfig(**LARGE, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    load_tokenizer(None).save_pretrained(folder)
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config).bfloat16().state_dict()
    split = split_torch_state_dict_into_shards(shapes, max_shard_size="500MB")
    generator = torch.Generator().manual_seed(0)
    for file, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            noise = torch.empty(shapes[name].shape, dtype=torch.bfloat16)
            shard[name] = noise.fill_(1.0) if noise.ndim == 1 else noise.normal_(std=0.02, generator=generator)
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def make_small(folder: Path) -> Path:
    """SmolLM2-135M as a bfloat16 checkpoint."""
    load_model(None).to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(None).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
