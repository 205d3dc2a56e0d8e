"""Every test of the ops and layers runs twice: in torch alone, and with the kernels that are chosen here."""

from collections.abc import Iterator

import pytest

from ebft_kernels import use_impl


@pytest.fixture(autouse=True, params=["torch", "auto"])
def _implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_impl(request.param):
        yield
