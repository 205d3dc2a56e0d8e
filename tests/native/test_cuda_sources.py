"""The device code compiles without torch and spills nothing; for all GPUs: ``python -m benchmarks.cuda_report``."""

import shutil

import pytest

from benchmarks.cuda_report import compile_facts, device_sources


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc here: the CUDA sources are not compiled")
@pytest.mark.parametrize("file", device_sources(), ids=lambda file: file.name)
def test_it_compiles_without_torch_and_does_not_spill(file):
    rows = compile_facts(file, 90)
    assert rows
    for row in rows:
        assert row["spill_bytes"] == row["stack"] == 0, row
        assert row["registers"] <= 128, row
        assert row["shared_bytes"] <= 48 * 1024, row
