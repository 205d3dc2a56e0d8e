"""Plans for known models at several sizes of GPU memory: writes docs/plans.md.

python -m benchmarks.plans
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, MixtralConfig, Qwen3Config

from ebft import EBFTConfig
from ebft.output.figures import duration
from ebft.plan.data_sheets import DEVICES, SHARE
from ebft.plan.plan import Plan, flags
from ebft.plan.planner import AHEAD, BUS, CONTEXT, FRAGMENTS, HOST, WORKSPACES, make_plan
from ebft.pruning.protocol import MASK_BYTES

DOCS = Path(__file__).parent.parent / "docs" / "plans.md"
SIZES = (4, 8, 16, 24, 80)  # GiB
DISTILLED = (("Llama-7B", 8), ("Llama-7B", 16), ("Llama-2-70B", 24))  # the same, of --recover ebft+distill
GIB, MIB = 2**30, 2**20


def models() -> dict[str, Any]:
    """Configurations by their published shapes; bfloat16 but for the first Llama, which is float16."""
    grouped = {"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    shapes: dict[str, Any] = {
        "Llama-7B": LlamaConfig(dtype="float16"),
        "Llama-13B": LlamaConfig(
            dtype="float16", hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
        ),
        "Llama-2-70B": LlamaConfig(
            dtype="float16",
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            max_position_embeddings=4096,
        ),
        "Llama-3-8B": LlamaConfig(
            **grouped, intermediate_size=14336, num_hidden_layers=32, vocab_size=128256, max_position_embeddings=8192
        ),
        "Qwen3-8B": Qwen3Config(
            **grouped, intermediate_size=12288, num_hidden_layers=36, vocab_size=151936, max_position_embeddings=40960
        ),
        "Qwen3-32B": Qwen3Config(
            hidden_size=5120,
            intermediate_size=25600,
            num_hidden_layers=64,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=151936,
            max_position_embeddings=40960,
        ),
        "Mixtral-8x7B": MixtralConfig(
            **grouped, intermediate_size=14336, num_hidden_layers=32, vocab_size=32000, max_position_embeddings=32768
        ),
    }
    for config in shapes.values():
        config.dtype = config.dtype or torch.bfloat16
    return shapes


def plan_for(name: str, config: Any, **settings: Any) -> Plan:
    """The plan of the published recipe on a GPU that computes in bfloat16."""
    return make_plan(EBFTConfig.of(model=name, **settings), "a100", model_config=config)


def row(name: str, budget: str, plan: Plan) -> str:
    """A line of the table."""
    hours = [duration(plan.flops / (DEVICES[gpu].rate * SHARE)) for gpu in ("rtx4090", "h100")]
    fits = "does not fit: " if plan.faults else ""
    stages = {"tuning": sum(plan.device.values()), **plan.stages}
    chosen = {key: value for key, value in plan.chosen.items() if key != "streams"}
    cells = [
        name,
        budget,
        f"{fits}{plan.device_peak / GIB:.2f}",
        max(stages, key=stages.__getitem__),
        f"{plan.host_peak / GIB:.1f}",
        f"{sum(plan.disk.values()) / GIB:.0f}",
        plan.config.runtime.streams,
        f"`{flags(chosen)}`" if chosen else "as given",
        *hours,
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Plan everything and write the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    lines, known = [], models()
    for name, config in known.items():
        for size in SIZES:
            lines.append(row(name, f"{size} GiB", plan_for(name, config, gpu_memory=f"{size}GiB")))
            print(lines[-1], flush=True)
    small = plan_for("Llama-7B", known["Llama-7B"], gpu_memory="4GiB", host_memory="8GiB")
    fast = plan_for("Llama-7B", known["Llama-7B"], gpu_memory="6GiB")
    large = plan_for("Llama-2-70B", known["Llama-2-70B"], gpu_memory="16GiB")
    examples = [
        row("Llama-7B, small", "4 GiB, 8 GiB host", small),
        row("Llama-7B, full speed", "6 GiB", fast),
        row("Llama-2-70B", "16 GiB", large),
    ]
    print("\n".join(examples))
    distilled, traffic = [], []
    for name, size in DISTILLED:
        plan = plan_for(name, known[name], gpu_memory=f"{size}GiB", recover="ebft+distill")
        distilled.append(row(name, f"{size} GiB", plan))
        traffic.append("\n".join([f"{name}, {size} GiB:", *plan.traffic]))
        print(distilled[-1], flush=True)
    names = ", ".join(f"{name} {known.rate / 1e12:.0f}" for name, known in DEVICES.items())
    head = (
        "| model | GPU budget | GPU GiB | most of it in | host GiB | disk GiB | streams | settings chosen | rtx4090 "
        "| h100 |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
    )
    DOCS.write_text(
        PAGE.format(
            examples=head + "\n".join(examples),
            table=head + "\n".join(lines),
            distilled=head + "\n".join(distilled),
            traffic="\n\n".join(traffic),
            bus=BUS / 1e9,
            plan=small,
            names=names,
            share=f"{SHARE:.0%}",
            context=CONTEXT // MIB,
            workspaces=WORKSPACES // MIB,
            fragments=f"{FRAGMENTS:.0%}",
            ahead=AHEAD,
            host=HOST / GIB,
            mask=MASK_BYTES,
        ),
        encoding="utf-8",
    )


PAGE = """# Plans

What runs need, by `ebft plan`. This page is written by `python -m benchmarks.plans`; on a
CPU the plan of a step is held against the allocation events of torch's profiler, within a tenth
(`tests/loop/test_plan.py`). On a GPU one run of `light` has been: on an H200, on blocks of LlamaV1-7B's shape, torch's
allocator had 11.42 GiB at most, beside 1.51 GiB that a bug (mended since) kept of blocks that were done, where the rows
without fragmentation, workspaces and context come to 11.39 GiB
([`seven_b_run.json`](../benchmarks/results/nvidia-h200/seven_b_run.json)).

## How a plan is made
The largest block takes two real steps (`BlockReconstructor.step`: micro-batches, recomputation, `MaskedAdamW` in its
layout) on fake tensors, under torch's `MemTracker`: every tensor's bytes are seen, none is allocated. The dense pass
with its statistics, a block and the head of the perplexity pass are run in the same way. On a GPU attention is taken
for flash attention: it saves its operands, its result and a float32 a row, and its backward pass sums the queries'
gradients in float32. (GPUs before compute capability 8.0 have none; with grouped queries torch then keeps the whole
matrix of attention weights, which this does not show.)

What no tensor shows is added in rows of its own. These are assumptions:

| row | taken for | why |
| --- | --- | --- |
| CUDA context | {context} MiB | driver and kernels, outside torch's allocator; processes show 300 to 600 MiB |
| workspaces | {workspaces} MiB | torch gives cuBLAS 32 MiB on Hopper, 8 MiB before; the rest is for other kernels |
| fragmentation | {fragments} of what is allocated | the caching allocator rounds to 2 MiB and leaves holes |
| batches on their way | {ahead} | copied to the GPU while one is worked on |
| masks of a block | {mask} bytes a weight of the largest matrix | torch selects the best of a row; measured on a CPU |
| Python and libraries | {host:g} GiB of host memory | torch with CUDA, transformers |
| WikiText-2 | 350 000 tokens | its test split by a vocabulary of 32 000 |

## How settings are chosen
With `--gpu-memory` (and `--host-memory`) the first of these that fits is taken, each with all before it: streams on
the GPU; streams on the host, or on disk where the host is too small; `--compact`; `--weights master` (where products
are in bfloat16); `--micro-batch` halved, down to 1; `--recompute halves`; `--moments bf16`, then `int8`; `--weights
stochastic`; and where `--clip 0` was given, `--update-in-backward` last. The first few cost no speed to speak of;
recomputation costs a third; the last two change the arithmetic. `--stream-dtype` is never changed: bfloat16 is too
coarse for the large channels of some models. `--recompute block` is never chosen: at its peak a block that is
recomputed whole has all its activations.

A run with `--gpu-memory` does the same and then holds torch's allocator to the budget, less the CUDA context.

Times are those of the matrix products, recomputation included, at {share} of the data-sheet rate (TFLOP/s: {names}).
An H200 reached 21% of it with `light`, 40% with `best` and 44% with `paper`, on whole blocks of LlamaV1-7B's shape, all
that is done to them counted, with liger-kernel, and 35% with `paper` without (same file). Loading, perplexities and a
slow disk come on top.

## The three of the promise
Published recipe: 256 x 1024 tokens, batch 8, 10 epochs, 70 % pruned.

{examples}

The first in full:

```
{plan}
```

## With distillation
`--recover ebft+distill`, all else as above. Held blocks take 12 bytes a weight of the whole model, so on the ladder
come first `--recompute block`, then `--distill-blocks host`, `--compact`, `--micro-batch` and `--moments`, which the
walk shares, and then what is left of the walk's own. The step is that of the largest block again, on fake tensors;
the other rows are sums. Page-locked memory comes in powers of two, a tensor at a time, and is counted so; the best
weights seen are kept beside it, in float32.

{distilled}

Blocks and states travel while others are worked on. The plan says how long they take at {bus:.0f} GB/s (PCIe 4.0, 16
lanes), and which batches take as long: with smaller ones the GPU waits for the bus, and larger ones cost no more
traffic. No such run has been measured on a GPU yet.

```
{traffic}
```

## All
Host memory is not limited here; `--host-memory` moves the streams to disk. Where the perplexity's head is what does not
fit (a large vocabulary, in float32), `--eval ''` leaves it out.

{table}
"""


if __name__ == "__main__":
    main()
