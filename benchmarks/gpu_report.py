"""Everything that a GPU must show, in one command; it needs neither pytest nor a network.

    python -m benchmarks.gpu_report --minutes 9 --out DIR

Floors first (copy bandwidth, matrix rate), then whether the kernels are right, then one LlamaV1-7B-shaped block
through every loop, then microbenchmarks, most important first. ``gpu_report.json`` and ``gpu_report.md`` are written
after every case, so that a run that is cut off still leaves what it has measured. On a CPU, at toy size, it only
shows that it works. Exit status 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import block_loops, kernel_cases
from benchmarks.machine import machine_info
from ebft_kernels import (
    MaskedAdamW,
    MaskedLinear,
    PackedMask,
    explain,
    masked_grad_norm,
    masked_linear,
    reference,
    use_impl,
)
from ebft_kernels.adamw import AdamWStep
from ebft_kernels.dispatch import TRITON
from ebft_kernels.testing import (
    ADAMW_LAYOUTS,
    adamw_step,
    assert_exact_zeros,
    check_linear,
    linear_cases,
)

OPS = torch.ops.ebft_kernels
BLOCKS, STEPS = 32, 320  # of LlamaV1-7B, and of the published recipe for each


class Report:
    """Rows by section, on disk after each."""

    def __init__(self, folder: Path, minutes: float, device: torch.device, size: str) -> None:
        self.folder, self.device, self.size = folder, device, size
        self.began, self.seconds = time.perf_counter(), 60 * minutes
        self.content: dict[str, Any] = {
            "machine": machine_info(),
            "size": size,
            "floors": {},
            "sections": {},
            "skipped": [],
        }
        self.wrong = 0
        folder.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.perf_counter() - self.began)

    def run(self, section: str, name: str, case: Callable[[], dict[str, Any]], needs: float = 3.0) -> None:
        """Add ``case``'s row, or why there is none: wrong, failed, out of memory, or no time (``needs`` seconds)."""
        if self.left() < needs:
            self.content["skipped"].append(f"{section}: {name}")
            return self.write()
        began = time.perf_counter()
        try:
            row = case()
        except AssertionError as error:
            self.wrong += 1
            row = {"wrong": " ".join(str(error).split())[:300]}
        except torch.OutOfMemoryError as error:
            row = {"out of memory": " ".join(str(error).split())[:200]}
        except Exception as error:  # the cases after it shall be measured all the same
            self.wrong += 1
            row = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        row["case_seconds"] = round(time.perf_counter() - began, 2)  # compile time counted
        self.content["sections"].setdefault(section, {})[name] = row
        print(f"{self.left():6.0f} s left  {section}: {name}: {_short(row)}", flush=True)
        self.write()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def write(self) -> None:
        """Both files."""
        (self.folder / "gpu_report.json").write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        machine = self.content["machine"]
        lines = [
            f"# {machine['device']}, size {self.size}",
            "",
            f"torch {machine['torch']}, triton {machine['triton']}",
            "",
        ]
        lines += [f"- {name}: {value:.4g}" for name, value in self.content["floors"].items()]
        for section, rows in self.content["sections"].items():
            lines += ["", f"## {section}", "", "| case | result |", "| --- | --- |"]
            lines += [f"| {name} | {_short(row)} |" for name, row in rows.items()]
        lines += ["", f"Not measured for want of time: {', '.join(self.content['skipped']) or 'nothing'}"]
        (self.folder / "gpu_report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _short(row: dict[str, Any]) -> str:
    return "; ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )


# --- measuring ------------------------------------------------------------------------------------------------------


def median_ms(
    run: Callable[[], Any], device: torch.device, budget: float = 1.0, least: int = 5, flush: bool = True
) -> float:
    """Milliseconds of a call: median of those that fit into ``budget`` seconds.

    On a GPU they are the device's own: its cache is flushed before each, and it sleeps for about 2 ms while the host
    launches what is timed (``flush``; whole steps need neither).
    """
    run()
    times: list[float] = []
    if device.type != "cuda":
        while len(times) < least:
            began = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - began))
        return statistics.median(times)
    other = torch.empty(256 * 2**20 if flush else 0, dtype=torch.int8, device=device)
    torch.cuda.synchronize(device)
    until = time.perf_counter() + budget
    while len(times) < least or (len(times) < 50 and time.perf_counter() < until):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.zero_()
        if flush:
            torch.cuda._sleep(4_000_000)  # cycles
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def peak_gib(run: Callable[[], Any], device: torch.device, beyond: bool = False) -> float:
    """Most memory in use during a call, or, ``beyond``, the part of it that the call itself took; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if beyond else 0
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def measure_floors(report: Report) -> None:
    """Copy bandwidth (bytes read and written) and the rate of a square bfloat16 product, on this device in this run."""
    device, full = report.device, report.size == "full"
    source = torch.empty(2**30 if full else 2**16, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    floors = report.content["floors"]
    floors["copy GB/s"] = 2 * source.nbytes / median_ms(lambda: target.copy_(source), device) / 1e6
    n = 8192 if full else 64
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    floors["bfloat16 TFLOP/s"] = 2 * n**3 / median_ms(lambda: a @ b, device) / 1e9
    report.write()


# --- right? ---------------------------------------------------------------------------------------------------------


def right_products(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The masked linear layer and its gradients on the ugly shapes, in Triton where it can be had."""
    count, impl = 0, "triton" if kernel_cases.has("triton", "masked_linear", device, dtype) else "torch"
    for contiguous in (True, False):
        for name, case in linear_cases(dtype, device, contiguous):
            packed = PackedMask.from_dense(case.mask)

            def run(x: Tensor, weight: Tensor, bias: Tensor, packed: PackedMask = packed) -> Tensor:
                return masked_linear(x, weight, packed, bias)

            for _ in range(2):  # the second time with lists of non-empty tiles
                with use_impl(impl):
                    check_linear(run, case, name)
            count += 1
    return {"right": f"{count} cases in {impl}"}


def right_adamw(device: torch.device) -> dict[str, Any]:
    """A step in every layout: moments and codes bit for bit as on the CPU, weights to an ulp."""
    for layout in ADAMW_LAYOUTS:
        step = adamw_step(*layout, device=device, grad_scale=torch.tensor(0.25, device=device))
        truth = step.each(Tensor.cpu)
        OPS.masked_adamw_step(*step)
        reference.masked_adamw_step(truth)
        for name, got, true in zip(AdamWStep._fields, step.written, truth.written, strict=False):
            for a, b in zip(got, true, strict=True):
                floats = b.is_floating_point() and b.numel() > 0
                ulp = torch.finfo(b.dtype).eps * float(b.nan_to_num().abs().max()) if floats else 0.0
                close = torch.allclose(a.cpu().double(), b.double(), rtol=0, atol=ulp, equal_nan=True)
                assert close, f"{layout}: {name} are not the reference's"
        for param, words in zip(step.params, step.words, strict=True):
            if words.numel():
                assert_exact_zeros(param, reference.unpack_mask(words, param.shape[-1]), str(layout))
    return {"right": f"{len(ADAMW_LAYOUTS)} layouts in {explain('masked_adamw_step', device).impl}"}


def right_rest(device: torch.device) -> dict[str, Any]:
    """Masks, norm, and steps in the backward pass."""
    mask = torch.rand(50, 300, device=device) > 0.5
    packed = PackedMask.from_dense(mask)
    assert torch.equal(packed.words, reference.pack_mask(mask)), "pack"
    assert torch.equal(packed.dense(), mask), "unpack"
    assert torch.equal(packed.row_offsets(), reference.row_offsets(packed.words)), "row offsets"
    scores = torch.randint(0, 3, (50, 48), device=device).float()
    for n, m in ((2, 4), (4, 8), (5, 12)):
        words = OPS.nm_mask(scores, n, m)
        assert torch.equal(words, reference.nm_mask(scores, n, m)), "N:M selection"
        assert OPS.is_nm(words, 48, n, m), "N:M check"
    grad = torch.randn(50, 300, device=device)
    truth = grad.double()[mask].norm()
    assert abs(masked_grad_norm([grad], [packed]).double() - truth) <= 1e-5 * truth, "gradient norm"
    for moments in ("fp32", "bf16", "int8"):
        runs = []
        for early in (False, True):
            torch.manual_seed(0)
            layer = MaskedLinear(300, 50, mask=mask, device=device)
            adam = MaskedAdamW.for_module(layer, moments=moments, update_in_backward=early)
            for step in range(3):
                x = torch.randn(64, 300, generator=torch.Generator().manual_seed(step)).to(device)
                layer(x).square().mean().backward()
                adam.step()
                adam.zero_grad()
            assert_exact_zeros(layer.weight, mask)
            runs.append(layer.weight.detach())
        difference = float((runs[0] - runs[1]).abs().max())
        assert difference <= 5e-4, f"steps in the backward pass differ by {difference}"
    return {
        "right": "masks, norm, steps in the backward pass",
        "implementations": {op: explain(op, device).impl for op in TRITON},
    }


# --- sections -------------------------------------------------------------------------------------------------------


def run_loops(report: Report, names: list[str]) -> None:
    """One block through each of the loops, by name."""
    problem = block_loops.make_problem(report.size, report.device)
    for name in names:
        report.run("one block", name, partial(block_row, report, name, problem), needs=15.0)


def block_row(report: Report, name: str, problem: block_loops.Problem) -> dict[str, Any]:
    """Step time, tokens/s, share of the matrix rate and peak memory of one loop."""
    device = report.device
    step = block_loops.CONTENDERS[name](problem)
    first = float(step())
    losses = [float(step()) for _ in range(3)]
    assert losses[-1] < first, f"the loss does not fall: {first}, {losses}"
    peak = peak_gib(step, device)
    ms = median_ms(step, device, budget=8.0, least=3, flush=False)  # a step flushes the cache by itself
    rate = problem.flops / ms / 1e9
    row = {
        "step ms": ms,
        "tokens/s": problem.tokens / ms * 1e3,
        "TFLOP/s": rate,
        "share of the matrix rate": rate / report.content["floors"]["bfloat16 TFLOP/s"],
        "peak GiB": peak,
        f"minutes for {BLOCKS} blocks of {STEPS} steps": ms * STEPS * BLOCKS / 60e3,
    }
    reference_row = report.content["sections"].get("one block", {}).get("ours", {})
    if "step ms" in reference_row:
        row["times as long as ours"] = ms / reference_row["step ms"]
    if device.type == "cuda" and name in BLOCK_BARS:
        row["bar"] = _verdict(BLOCK_BARS[name](row))
    return row


# What a GPU is to show, from a row of "one block"; the published loops come after ours and say how long they take.
BLOCK_BARS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "ours": lambda row: row["share of the matrix rate"] >= 0.6 and row["peak GiB"] <= 6,
    "ours, leanest": lambda row: row["peak GiB"] <= 3,
    "published, with host copies": lambda row: row["times as long as ours"] >= 3,
    "published, without host copies": lambda row: row["times as long as ours"] >= 1.3,
}


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def case_bar(group: str, row: dict[str, Any]) -> str | None:
    """Whether a microbenchmark's bar is met; None where it has none, or no Triton."""
    ms = {name.removesuffix(": ms"): value for name, value in row.items() if name.endswith(": ms")}
    if group == "AdamW":
        return _verdict(row["ours: share of copy"] >= 0.85)
    if group == "dW + AdamW":
        return _verdict(ms["ours, in one"] <= 1.15 * ms["torch's product, then the step"])
    if group.startswith("compressed linear"):
        return _verdict((1.3 if "50%" in group else 2.0) * ms["ours"] <= ms["F.linear"])
    if group == "masks":
        return _verdict(5 * ms["ours"] <= ms["torch"])
    if group in ("linear forward", "linear dx") and "ours, Triton" in ms:
        plain, multiplied = ms["torch, no mask in the product"], ms["torch, mask multiplied"]
        return _verdict(0.9 * ms["ours, Triton"] <= plain and 1.15 * ms["ours, Triton"] <= multiplied)
    return None


def case_row(report: Report, case: kernel_cases.Case) -> dict[str, Any]:
    """Median of every contender, and its share of the floor."""
    floors, device = report.content["floors"], report.device
    prepared = case.prepare()
    prepared.validate()
    row: dict[str, Any] = {}
    for name, run in prepared.contenders.items():
        ms = median_ms(run, device, budget=0.3)
        row[f"{name}: ms"] = ms
        if name in prepared.bytes and not prepared.flops:
            row[f"{name}: share of copy"] = prepared.bytes[name] / ms / 1e6 / floors["copy GB/s"]
        if prepared.flops:
            floor = max(
                prepared.flops / floors["bfloat16 TFLOP/s"] / 1e9,
                prepared.bytes.get(name, 0.0) / floors["copy GB/s"] / 1e6,
            )
            row[f"{name}: share of floor"] = floor / ms
        row[f"{name}: GiB beside its operands"] = peak_gib(run, device, beyond=True)
    if device.type == "cuda" and (verdict := case_bar(case.group, row)) is not None:
        row["bar"] = verdict
    return row


def main(argv: list[str] | None = None) -> int:
    """Run the report; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=("toy", "full"), help="default: full on a GPU, toy elsewhere")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="SECTION", help="sections that begin with one of these"
    )
    given = parser.parse_args(argv)
    device = torch.device(given.device)
    size = given.size or ("full" if device.type == "cuda" else "toy")
    report = Report(given.out, given.minutes, device, size)
    measure_floors(report)

    wanted = tuple(given.only)
    if "right?".startswith(wanted):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            report.run("right?", f"masked linear, {dtype}", partial(right_products, device, dtype))
        report.run("right?", "masked AdamW", partial(right_adamw, device))
        report.run("right?", "masks and the rest", partial(right_rest, device))
    if "one block".startswith(wanted):
        run_loops(report, [name for name in block_loops.CONTENDERS if not (given.no_compile and "compile" in name)])
    for case in kernel_cases.cases(size, device, torch.bfloat16, compiled=not given.no_compile):
        if case.group.startswith(wanted):
            report.run(case.group, case.name, partial(case_row, report, case))
    print(f"written to {given.out}; {report.wrong} wrong")
    return int(report.wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
