"""What a run says at its end: a table, text samples, sizes, and what to do next."""

import io

import pytest
from rich.console import Console
from test_security import a_summary

from ebft.output.terminal import Reporter


def end_of_a_run(width, *, terminal=False):
    summary = a_summary("org/model", "wikitext2") | {"zero_shot": {}}
    summary["continuations"]["stages"]["dense"] = ["Paris.\nIt is [b]" + " long" * 40]
    out = io.StringIO()
    Reporter(Console(file=out, width=width, force_terminal=terminal)).table(summary)
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 120])
def test_a_run_ends_with_samples_sizes_and_commands(width):
    lines = end_of_a_run(width).splitlines()
    assert "“wikitext2”" in lines
    dense = next(line for line in lines if line.startswith("  dense"))
    assert dense.startswith("  dense     Paris. It is [b] long")
    assert dense.endswith("…")
    assert {line.split()[0] for line in lines if line.startswith("  ")} >= {"dense", "pruned", "recovered"}
    assert "size 1.00 GiB, dense 1.00 GiB; about 512 MiB without its zeros" in lines
    assert lines[-2:] == [
        "Compare its text with the dense model's: ebft sample out --against org/model",
        "Store it without its zeros: ebft compress out out-compressed",
    ]
    sentences = ("sparsity", "size", "Compare", "Store")  # whole, so that they can be copied
    assert max(len(line) for line in lines if not line.startswith(sentences)) <= width


def test_colours_are_for_terminals():
    assert "\x1b" not in end_of_a_run(80)
    assert "\x1b" in end_of_a_run(80, terminal=True)


def test_the_last_line_of_progress(silent):
    with silent.progress("block", 30, "30 blocks") as advance:
        advance(1)
    assert silent.console.file.getvalue() == "30 blocks done in 0 s\n"
