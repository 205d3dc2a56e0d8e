"""Masked models on two ranks: DDP, FSDP2, FSDP1, tensor parallelism, distributed checkpoints; equal to one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sharded import CASES


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Every case is run by one pair of processes: starting them takes longer than all that they do."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(Path(__file__).parent / "sharded.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return folder, done


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_two_ranks(case, said):
    folder, done = said
    file = folder / f"{case}.json"
    assert file.exists(), f"the ranks ended before: {done.stderr}"
    assert json.loads(file.read_text(encoding="utf-8")) == ["", ""]
