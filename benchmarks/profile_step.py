"""Tuning one block by ``ebft``, once more without fused kernels, and by the straightforward loop: seconds in turns, and
where torch's profiler sees them.

python -m benchmarks.profile_step
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.baseline_loop import MultipliedLinear, first_inputs, replace, tune
from benchmarks.machine import write_result
from ebft import BlockReconstructor, EBFTConfig
from ebft.data.calibration import calibration_tokens
from ebft.data.streams import Streams
from ebft.model.checkpoint import load_model, load_tokenizer
from ebft.model.decoder import Decoder
from ebft_kernels import PackedMask, use_impl

CPU = torch.device("cpu")


def main() -> None:
    """Time the loops on the first block of the default model, profile them and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--name", default="profile_step", help="of the result file")
    given = parser.parse_args()
    sizes = {"samples": given.samples, "seqlen": given.seqlen, "windows": "packed"}
    config = EBFTConfig.preset("paper", sparsity=given.sparsity, epochs=2, eval="", device="cpu", **sizes)
    model = load_model(None).float()
    ids = calibration_tokens("builtin", load_tokenizer(None), **sizes).ids
    decoder = Decoder(model, CPU)
    streams = Streams(config, decoder, decoder, ids)
    streams.dense_pass(partial(decoder.run_block, 0, decoder.working_block(0)))
    masks = {}
    for matrix in decoder.matrices[0]:
        size = decoder.stored_block(0).get_parameter(matrix.name).abs()
        masks[matrix.name] = PackedMask.from_topk(size, round(matrix.inputs * (1 - config.prune.sparsity)))

    def ours() -> float:
        block = decoder.working_block(0)
        for name, mask in masks.items():
            mask.zero_pruned_(block.get_parameter(name))
        states = streams.inputs.states, streams.targets.states
        forward = partial(decoder.run_block, 0)
        return BlockReconstructor(config, CPU).fit(block, *states, masks=masks, forward=forward).seconds

    def unfused() -> float:
        with use_impl("torch"):
            return ours()

    def baseline() -> float:
        block = copy.deepcopy(model.model.layers[0])
        _, kwargs = first_inputs(model, ids, config.recover.batch_size)
        for name, mask in masks.items():
            path = name.removesuffix(".weight")
            linear = block.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            replace(block, path, MultipliedLinear(linear, mask.dense().float()))
        began = time.perf_counter()
        tune(block, streams.inputs.states, streams.targets.states, kwargs, config, 0, fused=True)
        return time.perf_counter() - began

    runs = {"ebft": ours, "ebft, torch kernels": unfused, "baseline": baseline}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(given.turns):
        for name in sorted(runs, reverse=bool(turn % 2)):  # there and back, so that drift falls on all alike
            seconds[name].append(runs[name]())
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"medians of {given.turns} turns each: {medians}")

    rows = {name: _profile(run) for name, run in runs.items()}
    for name, table in rows.items():
        print(name, *(f"{row['share']:7.2%}  {row['op']}" for row in table[:12]), sep="\n    ")
    content = {"settings": vars(given), "median_tuning_seconds": medians, "tuning_seconds": seconds}
    print("written to", write_result(given.name, {**content, "share_of_cpu_time": rows}))


def _profile(run: Callable[[], float]) -> list[dict[str, Any]]:
    run()  # warm up
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    rows = [
        {"op": event.key, "share": event.self_cpu_time_total / total, "ms": event.self_cpu_time_total / 1e3}
        for event in events
    ]
    return sorted(rows, key=lambda row: row["share"], reverse=True)[:20]


if __name__ == "__main__":
    main()
