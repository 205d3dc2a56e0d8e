"""What a run says: progress while it works, one JSON line a block, a table at the end, and the model card."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite, log
from pathlib import Path
from typing import IO, Any, cast
from unicodedata import category

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

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
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[note]}", markup=False),
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
        table = Table(title=Text(f"{summary['model']}: {summary['recipe']}", "table.title"), title_justify="left")
        table.add_column("perplexity")
        for heading in (*STAGES, "won back"):
            table.add_column(heading, justify="right")
        for text, values in summary["perplexity"].items():
            table.add_row(Text(text), *(number(values[stage]) for stage in STAGES), won_back(values))
        self.console.print(table)
        if summary["zero_shot"]:
            table = Table(title_justify="left")
            table.add_column("zero-shot, recovered")
            for heading in ("questions", "metric", "value", "standard error"):
                table.add_column(heading, justify="right")
            for row in zero_shot_rows(summary):
                table.add_row(*map(Text, row))
            self.console.print(table)
        asked, got = summary["asked_sparsity"], summary["sparsity"]
        missed = f" ({asked:.2%} was asked for)" if asked is not None and is_far(asked, got) else ""
        self.say(f"sparsity {got:.2%}{missed}, {duration(summary['seconds'])}, {summary['output']}")


def recovered_share(values: dict[str, float]) -> float | None:
    """Share of the lost log-perplexity that recovery won back; None where pruning lost nothing."""
    if not all(isfinite(values[stage]) for stage in STAGES) or values["pruned"] <= values["dense"]:
        return None
    return log(values["pruned"] / values["recovered"]) / log(values["pruned"] / values["dense"])


def zero_shot_rows(summary: dict[str, Any]) -> list[list[str]]:
    """Of every zero-shot task and metric: task, questions, metric, value, standard error."""
    rows = []
    for task, values in summary["zero_shot"].items():
        for name, value in _metrics(values).items():
            metric, comma, kind = name.partition(",")
            error = values.get(f"{metric}_stderr{comma}{kind}")
            said = "-" if error is None else f"{error:.3g}"
            rows.append([_without_folder(task), str(values.get("documents", "-")), name, f"{value:.4g}", said])
    return rows


def _metrics(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name != "documents" and "_stderr" not in name}


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
    shown = {name: value for name, value in config.items() if value is not None and name not in _NOT_OF_THE_RECIPE}
    if config["pattern"]:
        shown.pop("sparsity")
    ways = {"lora": "by adapters merged under the masks", "full": "as a whole on the language-model loss"}
    names = [] if config["recover"] == "none" else config["recover"].split("+")
    text = _CARD.render(
        summary=summary,
        name=_without_folder(summary["model"]),
        rounded=f"{summary['sparsity']:.0%}",
        share=f"{summary['sparsity']:.2%}",
        figures=[
            [_without_folder(text), *(number(values[stage]) for stage in STAGES), won_back(values)]
            for text, values in summary["perplexity"].items()
        ],
        zero_shot=zero_shot_rows(summary),
        settings=[[name, _without_folder(value)] for name, value in shown.items()],
        tuned=", then ".join(dict.fromkeys(ways.get(name, "block by block") for name in names)),
        use=summary["calibration"],
        source=_without_folder(summary["calibration"]["source"]) if names else "",
        plain_merge=plain_merge(summary),
    )
    return str(ModelCard(f"---\n{_card_data(summary).to_yaml()}\n---\n\n{text}"))


def _card_data(summary: dict[str, Any]) -> ModelCardData:
    """What the hub reads of the card."""
    measured = [(text, "perplexity", values["recovered"]) for text, values in summary["perplexity"].items()]
    measured += [(task, *of) for task, values in summary["zero_shot"].items() for of in _metrics(values).items()]
    results = [
        EvalResult("text-generation", name, name, metric, value)
        for text, metric, value in measured
        if isfinite(value) and (name := one_line(_without_folder(text)))
    ]
    of_the_hub = _HUB_ID.fullmatch(summary["model"]) and not Path(summary["model"]).exists()
    return ModelCardData(
        base_model=summary["model"] if of_the_hub else None,
        model_name=one_line(_without_folder(summary["model"])) or "model",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sparse", "pruned", "ebft"],
        eval_results=results or None,
    )


def one_line(value: Any) -> str:
    """``value`` as text without line ends and characters that cannot be seen or stored."""
    return " ".join("".join(" " if category(letter) in _UNSEEN else letter for letter in str(value)).split())


def markdown(value: Any) -> str:
    """``value`` as a line of Markdown that shows it as it is, wherever it stands: no tag, link, column or emphasis."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", one_line(value))


_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"}
_MARKUP = re.compile(r"""[&<>"'`*|~\[\]{}\\$!@#^]|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9])|:(?=//)""")
_CARD = Environment(
    finalize=markdown, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
).from_string("""\
# {{ name }}, {{ rounded }} sparse

Made by [ebft](https://arxiv.org/abs/2402.12419) {{ summary.versions.ebft }}: {{ summary.recipe }}.
It loads as any model of transformers does. Of the weights of the matrices inside its blocks {{ share }}
{% if summary.config.uniform %}
were taken away, by whole heads and channels.
{% else %}
are exactly zero; `masks.safetensors` says which.
{% endif %}
{% if tuned %}
The kept ones were tuned {{ tuned }}, on {{ use.tokens }} tokens of {{ source }} ({{ use.windows }}).
{% endif %}
{% if plain_merge %}
{{ plain_merge }}
{% endif %}

| perplexity | dense | pruned | recovered | won back |
| --- | --- | --- | --- | --- |
{% for row in figures %}
|{% for cell in row %} {{ cell }} |{% endfor %}

{% endfor %}

{% if zero_shot %}
| zero-shot, recovered | questions | metric | value | standard error |
| --- | --- | --- | --- | --- |
{% for row in zero_shot %}
|{% for cell in row %} {{ cell }} |{% endfor %}

{% endfor %}

{% endif %}
"Won back" is the share of the lost log-perplexity; "recovered" was measured on these files.

| setting | value |
| --- | --- |
{% for row in settings %}
|{% for cell in row %} {{ cell }} |{% endfor %}

{% endfor %}
""")
