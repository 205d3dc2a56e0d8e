"""What a run will need, from config.json alone, before anything is loaded.

The step's memory and work are those of the real step, run on fake tensors (no storage, no arithmetic) under torch's own
memory tracker and FLOP counter.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from ebft.checkpoint import DEFAULT_MODEL, load_config
from ebft.config import EBFTConfig
from ebft.decoder import Decoder, find_blocks
from ebft.errors import EBFTError
from ebft.job import check_lengths, choose_device
from ebft.reconstruct import BlockReconstructor
from ebft.report import duration
from ebft.shapes import shapes_only, without_values
from ebft_kernels import PackedMask

_GIB = 2**30
_TRACKED = {
    "Parameter": "weights",
    "Gradient": "gradients",
    "Optstate": "optimizer states",
    "Activation": "activations",
}


@dataclass(frozen=True)
class Plan:
    """Bytes by row (device, host, disk), FLOPs of the walk over the blocks, and seconds at the measured rate."""

    model: str
    device: dict[str, int]
    host: dict[str, int]
    disk: dict[str, int]
    flops: float
    seconds: float
    rate: float

    def __str__(self) -> str:
        lines = [f"plan for {self.model}"]
        for heading, rows in (
            ("device, while a block is tuned", self.device),
            ("host", self.host),
            ("disk", self.disk),
        ):
            lines.append(f"{heading}: {sum(rows.values()) / _GIB:.2f} GiB")
            lines += [f"    {name:<42} {size / _GIB:9.3f} GiB" for name, size in rows.items()]
        lines.append(
            f"blocks: {self.flops / 1e12:.1f} TFLOP, {duration(self.seconds)} at the {self.rate / 1e9:.0f} GFLOP/s "
            "that a product reaches here now; loading and perplexities come on top"
        )
        return "\n".join(lines)


def make_plan(config: EBFTConfig) -> Plan:
    """The plan for ``config``: reads the model's configuration, none of its weights.

    Not in the rows: the CUDA context, library workspaces and allocator fragmentation on a GPU; on a CPU device and host
    are the same memory. ``EBFTError`` if the model or the settings cannot be used.
    """
    device, compute = choose_device(config.device, config.dtype)
    model_config = load_config(config.model, trust_remote_code=config.trust_remote_code)
    check_lengths(config, model_config)
    weights = sum(p.numel() for p in _on_meta(config, model_config).parameters())  # tied ones once
    decoder = Decoder(_stand_in(config, model_config), torch.device("cpu"))
    stored = model_config.dtype or torch.float32
    in_blocks = sum(p.numel() for i in range(len(decoder)) for p in decoder.stored_block(i).parameters())
    model_bytes, rest = weights * stored.itemsize, weights - in_blocks
    width = decoder.width()
    stream = config.samples * config.seqlen * width * 4

    step_rows, step_flops, forward_flops = _step(config, decoder, device, compute)
    passes = 2 + 2 / 16  # dense, recovered, and the error on a sixteenth of the samples before and after
    steps = config.epochs * config.samples / config.batch_size if config.recover != "none" else 0
    flops = len(decoder) * (steps * step_flops + passes * config.samples / config.batch_size * forward_flops)
    rate = _matmul_rate(device, compute)
    block_bytes = in_blocks // len(decoder) * stored.itemsize
    return Plan(
        model=config.model or DEFAULT_MODEL,
        device=step_rows,
        host={
            "model as stored": model_bytes,
            "embeddings, norm and head in float32": rest * 4,
            "input and target streams": 2 * stream,
            "the finished block": block_bytes,
        },
        disk={"model": model_bytes, "finished blocks, until the end": block_bytes * len(decoder)},
        flops=flops,
        seconds=flops / rate,
        rate=rate,
    )


def _on_meta(config: EBFTConfig, model_config: Any) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)
    except ValueError:
        raise EBFTError(f"model {config.model} is not a decoder (a causal language model)") from None


def _stand_in(config: EBFTConfig, model_config: Any) -> PreTrainedModel:
    """The model with a vocabulary of 8: real outside its blocks, so that it can be entered, and on meta inside."""
    small = copy.deepcopy(model_config)
    small.get_text_config().update({"vocab_size": 8, "pad_token_id": 0})
    model = _on_meta(config, small)
    _, blocks = find_blocks(model)
    inside = {module for block in blocks for module in block.modules()}
    for module in model.modules():
        if module not in inside:
            module.to_empty(device="cpu", recurse=False)
            model._init_weights(module)
    return model


def _step(
    config: EBFTConfig, decoder: Decoder, device: torch.device, compute: torch.dtype
) -> tuple[dict[str, int], float, float]:
    """Peak bytes of a step by row, FLOPs of a step, FLOPs of a forward pass, for the largest block."""
    sizes = [sum(p.numel() for p in decoder.stored_block(i).parameters()) for i in range(len(decoder))]
    index = sizes.index(max(sizes))
    example = decoder.enter(torch.zeros(config.batch_size, config.seqlen, dtype=torch.long))
    cpu = torch.device("cpu")
    block, call = decoder.copy_of_block(index).float(), decoder.call_for(index, *example.shape[:2])
    with shapes_only():
        block._apply(without_values)
        x, y = without_values(example), without_values(example)
        masks = {m.name: PackedMask.from_dense(block.get_parameter(m.name) != 0) for m in decoder.matrices[index]}
        reconstructor = BlockReconstructor(config, cpu, compute)

        call = call.map_tensors(without_values)

        forward = partial(call, compute=compute)
        optimizer, _ = reconstructor.prepare(block, masks)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        tracker, counter, forward_counter = MemTracker(), FlopCounterMode(display=False), FlopCounterMode(display=False)
        with forward_counter, torch.no_grad():
            forward(block, x)
        tracker.track_external(block, optimizer, x, y)
        with tracker:
            reconstructor.step(block, optimizer, scaler, x, y, forward)  # the first step makes the optimizer's states
            tracker.reset_mod_stats()
            with counter:
                reconstructor.step(block, optimizer, scaler, x, y, forward)
        peak = next(iter(tracker.get_tracker_snapshot("peak").values()))
    rows = dict.fromkeys((*_TRACKED.values(), "batch, temporaries and others"), 0)
    for kind, size in peak.items():
        name = str(getattr(kind, "value", kind))
        if name != "Total":
            rows[_TRACKED.get(name, "batch, temporaries and others")] += int(size)
    return rows, float(counter.get_total_flops()), float(forward_counter.get_total_flops())


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product on the device, now: the median of three."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(4):  # the first warms up
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / sorted(seconds[1:])[1]
