"""What a run says: progress while it works, one JSON line a block, a table at the end, and the model card."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from huggingface_hub import ModelCard, ModelCardData
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ebft.config import ORGANISATION
from ebft.pruning.pattern import is_far
from ebft.terminal import Lasting

STAGES = ("dense", "pruned", "recovered")


class Reporter:
    """Talks to the terminal: a live display where there is one, a line a block where there is not (logs, CI)."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=cast(IO[str], Lasting(sys.stderr)), highlight=False)

    def say(self, sentence: str) -> None:
        """One line."""
        self.console.print(sentence, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Any]:
        """Yields ``advance(done, note="")``; shows a bar with the time left while inside."""
        live = self.console.is_terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[note]}"),
        )
        began = time.perf_counter()
        with Progress(*columns, console=self.console, disable=not live, transient=True) as bar:
            task = bar.add_task(what, total=total, note="")

            def advance(done: float, note: str = "") -> None:
                bar.update(task, completed=done, note=note)
                if note and not live:
                    passed = time.perf_counter() - began
                    left = passed / done * (total - done) if done else 0.0
                    self.say(f"{what} {done:g}/{total} {note} ({duration(passed)} passed, {duration(left)} left)")

            yield advance
        self.say(f"{what}: {duration(time.perf_counter() - began)}")

    def table(self, summary: dict[str, Any]) -> None:
        """The closing table."""
        table = Table(title=f"{summary['model']}: {summary['recipe']}", title_justify="left")
        table.add_column("perplexity")
        for heading in (*STAGES, "won back"):
            table.add_column(heading, justify="right")
        for text, values in summary["perplexity"].items():
            table.add_row(text, *(number(values[stage]) for stage in STAGES), won_back(values))
        self.console.print(table)
        if summary["zero_shot"]:
            table = Table(title_justify="left")
            table.add_column("zero-shot, recovered")
            for heading in ("questions", "metric", "value", "standard error"):
                table.add_column(heading, justify="right")
            for row in zero_shot_rows(summary):
                table.add_row(*row)
            self.console.print(table)
        asked, got = summary["asked_sparsity"], summary["sparsity"]
        missed = f" ({asked:.2%} was asked for)" if asked is not None and is_far(asked, got) else ""
        self.say(f"sparsity {got:.2%}{missed}, {duration(summary['seconds'])}, {summary['output']}")


def recovered_share(values: dict[str, float]) -> float | None:
    """Share of the lost log-perplexity that recovery won back; None where pruning lost nothing."""
    from math import isfinite, log

    if not all(isfinite(values[stage]) for stage in STAGES) or values["pruned"] <= values["dense"]:
        return None
    return log(values["pruned"] / values["recovered"]) / log(values["pruned"] / values["dense"])


def zero_shot_rows(summary: dict[str, Any]) -> list[list[str]]:
    """Of every zero-shot task and metric: task, questions, metric, value, standard error."""
    rows = []
    for task, values in summary["zero_shot"].items():
        metrics = {name: value for name, value in values.items() if name != "documents" and "_stderr" not in name}
        for name, value in metrics.items():
            metric, comma, kind = name.partition(",")
            error = values.get(f"{metric}_stderr{comma}{kind}")
            said = "-" if error is None else f"{error:.3g}"
            rows.append([_without_folder(task), str(values.get("documents", "-")), name, f"{value:.4g}", said])
    return rows


def won_back(values: dict[str, float]) -> str:
    """``recovered_share`` for people."""
    share = recovered_share(values)
    return "-" if share is None else f"{share:.0%}"


def plain_merge(summary: dict[str, Any]) -> str:
    """What merging adapters without the masks would have given, in a sentence; nothing where there were none."""
    if "plain_merge" not in summary.get("lora", {}):
        return ""
    merged, masked = summary["lora"]["plain_merge"], summary["config"]["lora_masked"]
    figures = ", ".join(f"{number(value)} on {text}" for text, value in merged["perplexity"].items())
    return (
        f" The plain merge of the adapters, which fills the zeros and was not saved, would be {merged['sparsity']:.2%} "
        f"sparse{f', of perplexity {figures}' if figures else ''}; the adapters were tuned "
        f"{'under the masks, as they were merged' if masked else 'without masks'}."
    )


def number(value: float) -> str:
    """A perplexity for people."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """``75`` as ``1 min 15 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


_NOT_OF_THE_RECIPE = ORGANISATION | {"fused", "device"}


def _without_folder(value: Any) -> Any:
    """The name of a file or folder of this machine, in place of its path; of several too, joined by commas."""
    if not isinstance(value, str):
        return value
    return ",".join(_name_alone(part) for part in value.split(","))


def _name_alone(part: str) -> str:
    kind, colon, path = part.rpartition(":") if part.startswith("local:") else ("", "", part)
    return kind + colon + (Path(path).name if Path(path).is_absolute() else path)


def model_card(summary: dict[str, Any]) -> str:
    """README.md of the saved model: where it comes from, the recipe, the figures."""
    config = summary["config"]
    rows = "\n".join(
        f"| {text} | {' | '.join(number(values[stage]) for stage in STAGES)} | {won_back(values)} |"
        for text, values in summary["perplexity"].items()
    )
    shown = {name: value for name, value in config.items() if value is not None and name not in _NOT_OF_THE_RECIPE}
    if config["pattern"]:
        shown.pop("sparsity")
    recipe = "\n".join(f"| {name} | {_without_folder(value)} |" for name, value in shown.items())
    use = summary["calibration"]
    ways = {"lora": "by adapters merged under the masks", "full": "as a whole on the language-model loss"}
    names = [] if config["recover"] == "none" else config["recover"].split("+")
    said = list(dict.fromkeys(ways.get(name, "block by block") for name in names))
    tuned = ""
    if said:
        tuned = (
            f" The kept ones were tuned {', then '.join(said)}, on {use['tokens']} tokens of {use['source']} "
            f"({use['windows']})."
        )
    tuned += plain_merge(summary)
    gone = "are exactly zero; `masks.safetensors` says which"
    if config["uniform"]:
        gone = "were taken away, by whole heads and channels"
    base = summary["model"] if "/" in summary["model"] and not Path(summary["model"]).exists() else None
    data = ModelCardData(
        base_model=base, library_name="transformers", pipeline_tag="text-generation", tags=["sparse", "pruned", "ebft"]
    )
    zero_shot = ""
    if summary["zero_shot"]:
        rows_of_tasks = "\n".join(f"| {' | '.join(row)} |" for row in zero_shot_rows(summary))
        zero_shot = (
            "| zero-shot, recovered | questions | metric | value | standard error |\n| --- | --- | --- | --- | --- |\n"
            f"{rows_of_tasks}\n\n"
        )
    content = f"""---
{data.to_yaml()}
---

# {_without_folder(summary["model"])}, {summary["sparsity"]:.0%} sparse

Made by [ebft](https://arxiv.org/abs/2402.12419) {summary["versions"]["ebft"]}: {summary["recipe"]}.
It loads as any model of transformers does. {summary["sparsity"]:.2%} of the weights of the matrices inside its blocks
{gone}.{tuned}

| perplexity | dense | pruned | recovered | won back |
| --- | --- | --- | --- | --- |
{rows}

{zero_shot}"Won back" is the share of the lost log-perplexity; "recovered" was measured on these files.

| setting | value |
| --- | --- |
{recipe}
"""
    return str(ModelCard(content))
