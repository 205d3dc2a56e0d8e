"""No test needs a network; none may wait for one. Text samples take as long as a tiny run: tests ask for them."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each, and for the processes that its tests start
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def no_samples():
    """Runs in this process have no prompts of their own."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ebft.evaluation.continuations.BUILTIN", ())
        yield


def pytest_collection_modifyitems(items):
    """Files that take minutes go first, so that no worker is left with one at the end."""
    long = ("test_triton.py", "test_recovery.py", "test_native.py", "test_resume.py", "test_plan.py")
    items.sort(key=lambda item: item.path.name not in long)  # stable
