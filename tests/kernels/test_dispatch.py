"""Which implementation runs an op, and what is said of it."""

import pytest
import torch

from ebft_kernels import explain, masked_linear, use_impl


@pytest.fixture(autouse=True)
def _implementation():
    """In place of the one in conftest.py: here nothing is forced."""


def test_use_impl_and_explain():
    with use_impl("torch"):
        choice = explain("masked_linear")
        assert (choice.impl, choice.fused) == ("torch", False)
        assert "use_impl('torch')" in str(choice)
    assert "use_impl" not in explain("masked_linear").reason
    with pytest.raises(ValueError, match="expected one of auto, triton, native, torch"):
        use_impl("cuda")
    with pytest.raises(ValueError, match="got op 'linear'"):
        explain("linear")


def test_a_forced_implementation_never_falls_back():
    x, weight, mask = torch.randn(2, 4), torch.randn(3, 4), torch.ones(3, 4, dtype=torch.bool)
    with use_impl("triton"), pytest.raises(RuntimeError, match=r"use_impl\('triton'\) cannot run \w+ on cpu"):
        masked_linear(x, weight, mask)
    masked_linear(x, weight, mask)
