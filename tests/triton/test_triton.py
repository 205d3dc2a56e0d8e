"""The Triton kernels without a GPU: run by the interpreter, and compiled for GPUs that are not here.

Both happen in processes of their own, because Triton's interpreter and compiler cannot share one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ebft_kernels import PackedMask, explain, masked_linear, use_impl

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there are wheels of triton for Linux alone")


def start(command, **environment):
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "EBFT_NATIVE": "0", **environment}
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def finish(process):
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out[-4000:]
    return out


def test_every_kernel_in_the_interpreter():
    groups = (
        ["adamw", "codes", "masks", "norm", "loss", "in backward", "tuner"],
        ["optimizer", "linear", "empty tiles"],
    )  # one for each core
    processes = [start([str(HERE / "interpreted.py"), *group], TRITON_INTERPRET="1") for group in groups]
    for group, process in zip(groups, processes, strict=True):
        out = finish(process)
        assert [line.split(":")[0] for line in out.splitlines() if ": right" in line] == group


def test_every_kernel_compiles_for_gpus(tmp_path):
    """For sm_80 and sm_90: tensor cores, software pipelining, no spills, within shared memory."""
    processes = {
        arch: start(
            ["-m", "benchmarks.static_report", "--default", "--arch", str(arch), "--out", str(tmp_path / str(arch))]
        )
        for arch in (80, 90)
    }
    for arch, process in processes.items():
        out = finish(process)
        assert "FAIL" not in out
        (file,) = (tmp_path / str(arch)).glob("*.json")
        facts = json.loads(file.read_text())["kernels"]
        assert {fact["kernel"] for fact in facts} >= {
            "product_kernel", "gradient_kernel", "gradient_step_kernel", "dense_kernel", "compact_kernel",
            "loss_kernel", "squares_kernel", "zero_kernel",
            "pack_kernel", "unpack_kernel", "count_kernel", "nm_kernel", "nm_check_kernel",
        }  # fmt: skip
        for fact in facts:
            # Products have none in any version; elsewhere ptxas lays down 8 bytes here and there.
            assert fact["stack"] <= (0 if fact["product"] else 32), fact
            if fact["product"]:
                assert fact["tensor_cores"] == ("mma.sync" if arch == 80 else "wgmma.mma_async")
                assert "cp.async" in fact["pipeline"]


def test_on_a_cpu_they_are_chosen_only_when_forced_and_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read by the dispatcher; triton itself is not imported here
    assert explain("masked_linear").impl != "triton"
    assert explain("masked_adamw_step").impl != "triton"
    with use_impl("triton"):
        assert explain("masked_linear").impl == "triton"
        for op, dtype, says in (
            ("masked_linear", torch.bfloat16, "Triton's interpreter multiplies bfloat16 wrongly"),
            ("masked_adamw_step", torch.float64, "the Triton kernels do not take float64"),
            ("topk_mask", torch.float32, "there is no Triton kernel for topk_mask"),
        ):
            with pytest.raises(RuntimeError, match=says):
                explain(op, "cpu", dtype)
    mask = PackedMask.ones((3, 4))
    with use_impl("triton"):
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(RuntimeError, match=r"cannot run masked_linear on cpu: Triton kernels need a GPU"):
            masked_linear(torch.ones(1, 4), torch.ones(3, 4), mask)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_so():
    with (
        use_impl("triton"),
        pytest.raises(RuntimeError, match=r"cannot run masked_linear on cuda: there is no GPU here"),
    ):
        explain("masked_linear", "cuda")


def test_products_are_chosen_by_measured_times(monkeypatch):
    """On a GPU: cuBLAS where nothing is measured, Triton only where it was faster than what it replaces."""
    from ebft_kernels import dispatch
    from ebft_kernels._triton import configs

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(dispatch, "_triton_missing", lambda op, device, dtype: None)
    table = {}
    monkeypatch.setattr(configs, "measured", lambda: {"a GPU": {"products": table}})
    where = ("masked_linear", "cuda", torch.bfloat16)
    choice = explain(*where)
    assert (choice.impl, choice.fallback) == ("torch", False)
    assert "cuBLAS on the zeroed weight: nothing has been measured on a GPU" in choice.reason
    assert "the mask multiply and cuBLAS" in explain(*where, zeroed=False).reason
    table["masked_linear/many/2"] = {"triton": 1.1, "zeroed": 1.0, "multiply": 1.4}
    assert explain(*where).impl == "torch"
    assert explain(*where, zeroed=False).impl == "triton"
    assert "takes 1.1 ms in Triton and 1.4 ms with the mask multiply" in explain(*where, zeroed=False).reason
    assert explain(*where, zeroed=False, tokens=16).impl == "torch"
