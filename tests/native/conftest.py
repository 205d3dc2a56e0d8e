"""Memory that a kernel forgets to write holds NaN in every test of this folder."""

from collections.abc import Iterator

import pytest

from ebft_kernels.testing import poisoned


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned():
        yield
