"""No test needs a network; none may wait for one. Text samples and the report page take as long as a tiny run: tests
ask for samples, and files that look at pages, or whose runs are of many kinds, make them."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each, and for the processes that its tests start
    os.environ["OMP_NUM_THREADS"] = "1"


WITH_PAGES = {
    *("test_browser", "test_distill", "test_extending", "test_memory", "test_page", "test_push", "test_recovery"),
    *("test_security", "test_step", "test_structured", "test_schedule", "test_terminal", "test_whole_model"),
    *("test_zero_shot", "test_attack", "test_card", "test_readme", "test_default_model"),
}


@pytest.fixture(autouse=True)
def no_more_than_is_looked_at(request):
    """Runs in this process have no prompts of their own; in ``make test`` hardly any makes a page."""
    quick = request.config.option.markexpr == "not slow"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ebft.evaluation.continuations.BUILTIN", ())
        if quick and "loop" in request.path.parts and request.path.stem not in WITH_PAGES:
            patched.setattr("ebft.pipeline.run.report_page", lambda summary, lines: "")
        yield


def pytest_collection_modifyitems(items):
    """Files that take minutes go first, so that no worker is left with one at the end."""
    long = ("test_triton.py", "test_recovery.py", "test_native.py", "test_resume.py", "test_plan.py")
    items.sort(key=lambda item: item.path.name not in long)  # stable
