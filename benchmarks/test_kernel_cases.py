"""The cases of ``benchmarks/gpu_report.py`` as benchmarks, validated and then timed; and that report at toy size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import block_loops, gpu_report, kernel_cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for every case and contender of the size asked for."""
    size = metafunc.config.getoption("--size")
    if "case" in metafunc.fixturenames:
        found = list(kernel_cases.cases(size, DEVICE, torch.bfloat16, compiled=size == "full"))
        metafunc.parametrize("case", found, ids=[f"{case.group}, {case.name}" for case in found])


def test_case(benchmark: Any, case: kernel_cases.Case) -> None:
    prepared = case.prepare()
    prepared.validate()
    benchmark.group = f"{case.group}: {case.name}"
    for name, run in prepared.contenders.items():
        if name != "ours" and benchmark.enabled:
            benchmark.extra_info[f"{name}: ms"] = gpu_report.median_ms(run, DEVICE)
    ours = next(run for name, run in prepared.contenders.items() if name.startswith("ours"))
    benchmark(lambda: synchronous(ours))


def synchronous(run: Any) -> None:
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("contender", [name for name in block_loops.CONTENDERS if "compile" not in name])
def test_block(benchmark: Any, full: bool, contender: str) -> None:
    step = block_loops.CONTENDERS[contender](block_loops.make_problem("full" if full else "toy", DEVICE))
    losses = [float(step()) for _ in range(4)]
    assert losses[-1] < losses[0]
    benchmark.group = "one block"
    benchmark(lambda: synchronous(step))


@pytest.mark.slow
def test_the_report_leaves_files_even_when_cut_off(tmp_path: Path) -> None:
    """At toy size on a CPU; then with no time at all."""
    arguments = ["--device", "cpu", "--size", "toy", "--no-compile"]
    assert gpu_report.main([*arguments, "--minutes", "5", "--out", str(tmp_path / "all")]) == 0
    content = json.loads((tmp_path / "all" / "gpu_report.json").read_text(encoding="utf-8"))
    assert {"right?", "one block", "AdamW", "dW + AdamW", "linear forward", "masks", "loss"} <= content[
        "sections"
    ].keys()
    assert not content["skipped"]
    assert "| ours |" in (tmp_path / "all" / "gpu_report.md").read_text(encoding="utf-8")
    assert gpu_report.main([*arguments, "--minutes", "0", "--out", str(tmp_path / "none")]) == 0
    content = json.loads((tmp_path / "none" / "gpu_report.json").read_text(encoding="utf-8"))
    assert content["floors"]
    assert len(content["skipped"]) > 20


def test_bars_are_read_from_rows() -> None:
    row = {"torch, no mask in the product: ms": 0.9, "torch, mask multiplied: ms": 1.2, "ours, Triton: ms": 1.0}
    assert gpu_report.case_bar("linear dx", row) == "met"
    assert gpu_report.case_bar("linear dx", row | {"ours, Triton: ms": 1.1}) == "missed"
    assert gpu_report.case_bar("linear dW", row) is None
    assert gpu_report.case_bar("AdamW", {"ours: share of copy": 0.84}) == "missed"
    assert gpu_report.case_bar("compressed linear at 70%", {"ours: ms": 1.0, "F.linear: ms": 1.9}) == "missed"
    assert gpu_report.case_bar("masks", {"ours: ms": 1.0, "torch: ms": 5.0}) == "met"
    assert (
        gpu_report.case_bar("dW + AdamW", {"ours, in one: ms": 1.1, "torch's product, then the step: ms": 1.0}) == "met"
    )


def test_a_case_that_fails_leaves_the_others(tmp_path: Path) -> None:
    report = gpu_report.Report(tmp_path, 1.0, torch.device("cpu"), "toy")

    def fails() -> dict[str, Any]:
        raise RuntimeError("the kernel does not compile")

    report.run("masks", "broken", fails)
    report.run("masks", "whole", lambda: {"ms": 1.0})
    rows = json.loads((tmp_path / "gpu_report.json").read_text(encoding="utf-8"))["sections"]["masks"]
    assert rows["broken"]["failed"] == "RuntimeError: the kernel does not compile"
    assert rows["whole"]["ms"] == 1.0
    assert report.wrong == 1
