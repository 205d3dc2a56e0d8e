"""Microbenchmarks: each case is validated, then timed, against the best baseline in the same run.

``pytest benchmarks --size full`` measures real shapes; the default, ``toy``, only keeps the code from rotting.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", choices=("toy", "full"), default="toy", help="shapes of the microbenchmarks")


@pytest.hookimpl(optionalhook=True)  # a GPU machine may lack pytest-benchmark
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["ebft"] = machine.machine_info()


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether real shapes are measured."""
    return bool(request.config.getoption("--size") == "full")


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
