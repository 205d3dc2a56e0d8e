"""One block in the shape of LlamaV1-7B's (random bfloat16 weights) through the real code, on few tokens.

python -m benchmarks.seven_b_block

Each layout is planned, and then tuned under torch's profiler, whose allocation events give the bytes that were really
needed at once.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import write_result
from ebft import BlockReconstructor, EBFTConfig
from ebft.model.decoder import Decoder
from ebft.plan.plan import flags
from ebft.plan.planner import make_plan
from ebft.pruning.masker import make_masker
from ebft.pruning.statistics import InputObserver
from ebft_kernels import PackedMask

CPU = torch.device("cpu")
LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"compact": True, "weights": "master"},
    {"compact": True, "weights": "stochastic", "moments": "int8", "micro_batch": 1, "recompute": "halves"},
)


def main() -> None:
    """Tune the block in every layout and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=2e-4)
    given = parser.parse_args()
    torch.manual_seed(0)
    shape = LlamaConfig(num_hidden_layers=1, vocab_size=256, pad_token_id=0, dtype="bfloat16")
    model = LlamaForCausalLM(shape).bfloat16()
    ids = torch.randint(256, (given.samples, given.seqlen))
    decoder = Decoder(model, CPU, torch.bfloat16)
    rows = []
    for layout in LAYOUTS:
        sizes = {"samples": given.samples, "seqlen": given.seqlen, "epochs": given.epochs, "batch_size": 4}
        config = EBFTConfig.of(
            model="7b-block", **sizes, lr=given.lr, dtype="bfloat16", device="cpu", eval="", **layout
        )
        rows.append({"layout": flags(layout) or "defaults", **_tuned(config, decoder, ids, shape)})
        print(rows[-1], flush=True)
    parameters = sum(p.numel() for p in decoder.stored_block(0).parameters())
    content = {"parameters": parameters, "settings": vars(given), "layouts": rows}
    print(write_result("seven_b_block", content))


def _tuned(config: EBFTConfig, decoder: Decoder, ids: Tensor, shape: LlamaConfig) -> dict[str, Any]:
    hidden = decoder.enter(ids)
    block = decoder.working_block(0)
    observer = InputObserver(block, decoder.matrices[0])
    with torch.no_grad(), observer.watching():
        targets = torch.cat([decoder.run_block(0, block, part) for part in hidden.split(config.recover.batch_size)])
    masks = make_masker(config)("block", block, decoder.matrices[0], observer.statistics).masks
    del block
    decoder.call_for(0, config.recover.micro_batch or config.recover.batch_size, config.data.seqlen)
    result: dict[str, Any] = {}

    def work() -> None:
        own = {name: PackedMask(mask.words.clone(), mask.shape) for name, mask in masks.items()}
        forward = partial(decoder.run_block, 0)
        tuned = decoder.working_block(0)
        fitted = BlockReconstructor(config, CPU, torch.bfloat16).fit(tuned, hidden, targets, masks=own, forward=forward)
        zeros = all(not tuned.get_parameter(name)[~mask.dense()].any() for name, mask in own.items())
        result.update(
            steps=len(fitted.losses),
            seconds_a_step=round(fitted.seconds / len(fitted.losses), 3),
            error_before=fitted.error_before,
            error_after=fitted.error_after,
            notes=fitted.notes,
            pruned_weights_are_zero=zeros,
        )

    plan = make_plan(config, model_config=shape)
    planned = sum(plan.device.values()) + plan.host["the best weights of a block"]  # on a CPU the same memory
    began = time.perf_counter()
    allocated = _allocated_at_most(work)
    return {
        **result,
        "seconds_in_all": round(time.perf_counter() - began, 1),
        "planned_gib": round(planned / 2**30, 3),
        "allocated_gib": round(allocated / 2**30, 3),
    }


def _allocated_at_most(work: Any) -> int:
    """Bytes that ``work`` has at most at a time; those on the host for the best weights seen are among them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    with tempfile.TemporaryDirectory() as scratch:
        trace = Path(scratch) / "trace.json"
        seen.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


if __name__ == "__main__":
    main()
