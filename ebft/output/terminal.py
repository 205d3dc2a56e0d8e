"""What a run says while it works and at its end: progress, and tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from rich.box import ROUNDED
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ebft.config.pattern import is_far
from ebft.output.figures import (
    duration,
    memory,
    number,
    one_line,
    perplexity_table,
    size,
    text_samples,
    zero_shot_rows,
)
from ebft.output.lasting import Lasting
from ebft.output.recipe import next_commands

OFTEN = 10.0  # seconds between lines of progress, where there is no live display


class Reporter:
    """Talks to the terminal: a live display where there is one, a line a block where there is not (logs, CI).

    Args:
        console: where to (default: standard error).
        quiet: say nothing.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(file=cast(IO[str], Lasting(sys.stderr)), highlight=False, quiet=quiet)

    def say(self, sentence: str) -> None:
        """One line."""
        self.console.print(sentence, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, what: str, total: int, all_of: str | None = "") -> Iterator[Any]:
        """Yields ``advance(done, note="")``; shows a bar with the time left while inside, and then a line.

        Args:
            what: is worked on.
            all_of: how the last line calls it, such as ``30 blocks`` (default: ``what``); None: there is one only about
                what took a second or more.
        """
        live = self.console.is_terminal
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[note]}", markup=False),
        )
        began = said = time.perf_counter()
        with Progress(*columns, console=self.console, disable=not live, transient=True) as bar:
            task = bar.add_task(what, total=total, note="")

            def advance(done: float, note: str = "") -> None:
                nonlocal said
                bar.update(task, completed=done, note=note)
                now = time.perf_counter()
                if not live and (note or now - said > OFTEN):
                    passed, said = now - began, now
                    left = passed / done * (total - done) if done else 0.0
                    self.say(
                        f"{what} {done:.4g}/{total} {f'{note} ' if note else ''}"
                        f"({duration(passed)} elapsed, {duration(left)} left)"
                    )

            yield advance
        if all_of is not None or time.perf_counter() - began >= 1:
            self.say(f"{all_of or what} done in {duration(time.perf_counter() - began)}")

    def table(self, summary: dict[str, Any]) -> None:
        """The closing table."""
        headings, rows = perplexity_table(summary)
        title = f"{summary['model']}: {summary['recipe']}"
        if rows:
            self.console.print(_table(headings, rows, title))
        else:
            self.say(title)
        if summary["zero_shot"]:
            headings = ["zero-shot, recovered", "questions", "metric", "value", "standard error"]
            self.console.print(_table(headings, zero_shot_rows(summary)))
        self._continued(summary)
        asked, got = summary["asked_sparsity"], summary["sparsity"]
        missed = f" ({asked:.2%} was asked for)" if asked is not None and is_far(asked, got) else ""
        took = f"{duration(summary['seconds'])}, peak memory {memory(summary['peak_memory'])}"
        self.say(f"sparsity {got:.2%}{missed}, {took}, {summary['output']}")
        sizes = summary["size"]
        small = f"; about {size(sizes['compressed'])} without its zeros" if sizes["compressed"] else ""
        self.say(f"size {size(sizes['saved'])}, dense {size(sizes['dense'])}{small}")
        for what, command in next_commands(summary, out=summary["output"])[:2]:
            self.say(f"{what} {command}")

    def _continued(self, summary: dict[str, Any]) -> None:
        """The first text sample, a line for each model, as far as the window is wide."""
        for prompt, texts in text_samples(summary)[:1]:
            self.say(f"“{one_line(prompt)}”")
            for stage, text in texts:
                line = Text(f"  {stage:<10}{one_line(text) or '(nothing)'}")
                line.stylize("bold", 2, 2 + len(stage))
                self.console.print(line, no_wrap=True, overflow="ellipsis")

    def samples(self, prompts: list[str], written: dict[str, list[str]]) -> None:
        """What each of the models has written after each of the prompts, on standard output."""
        out = Console(file=cast(IO[str], Lasting(sys.stdout)), highlight=False)
        for place, prompt in enumerate(prompts):
            table = Table(title=Text(f"“{prompt}”", "bold"), title_justify="left", box=ROUNDED, expand=True)
            for name in written:
                table.add_column(Text(name), ratio=1, overflow="fold")
            table.add_row(*(Text(texts[place].strip("\n") or "(nothing)") for texts in written.values()))
            out.print(table)

    def figures(self, model: str, measured: dict[str, Any]) -> None:
        """What ``ebft eval`` has measured, on standard output."""
        out = Console(file=cast(IO[str], Lasting(sys.stdout)), highlight=False)
        if "perplexity" in measured:
            rows = [[text, number(value)] for text, value in measured["perplexity"].items()]
            out.print(_table(["text", "perplexity"], rows, model))
        if "divergence" in measured:
            rows = [
                [text, number(of["perplexity"]), number(of["of_other"]), f"{of['kl']:.4f}", f"{of['same_choice']:.1%}"]
                for text, of in measured["divergence"].items()
            ]
            headings = ["text", "perplexity", "of the other", "KL, nats a token", "same first choice"]
            out.print(_table(headings, rows, model))
        if measured.get("zero_shot"):
            headings = ["zero-shot", "questions", "metric", "value", "standard error"]
            out.print(_table(headings, zero_shot_rows(measured)))


def _table(headings: list[str], rows: list[list[str]], title: str | None = None) -> Table:
    """The first column is text, the others are figures."""
    table = Table(title=None if title is None else Text(title, "table.title"), title_justify="left")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
