"""Peak memory of the host, and what a run says of it."""

import gc
import json
import sys
import time

import pytest
import torch

from ebft.pipeline.memory import HostMemory
from ebft.run import main

GIVEN_BACK = 300 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is Linux's to say")
def test_memory_that_was_given_back_is_counted():
    gc.collect()  # or what other tests have left goes meanwhile
    with HostMemory() as memory:
        before, held = memory.peak(), []
        while memory.peak()["anonymous_bytes"] < before["anonymous_bytes"] + GIVEN_BACK // 2:
            assert len(held) < 8, "memory is not looked at"
            held.append(torch.ones(GIVEN_BACK, dtype=torch.uint8))
            time.sleep(0.3)  # until it has been looked at
        del held
        after = memory.peak()
    assert after["anonymous_bytes"] <= after["resident_bytes"]
    assert after["resident_bytes"] >= GIVEN_BACK


def test_a_run_says_its_peak_memory_and_what_its_seconds_went_into(short_run, tmp_path, capsys):
    flags = [part for name, value in short_run().items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert main([*flags, "--preset", "demo"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    summary = json.loads((tmp_path / "out" / "ebft_summary.json").read_text())
    resident, anonymous = (size / 2**30 for size in summary["peak_memory"].values())
    assert 0.1 < anonymous < resident
    words = f"{resident:.2f} GiB resident ({anonymous:.2f} GiB anonymous)"
    assert f"peak memory {words}" in said
    assert f"Peak memory of the host: {words}." in (tmp_path / "out" / "report.html").read_text()
    stages = summary["stage_seconds"]
    assert next(iter(stages)) == "import"
    assert sum(stages.values()) == pytest.approx(summary["seconds"], abs=0.1)
