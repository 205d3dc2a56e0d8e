"""``report.html``: one self-contained page with the curves of a run."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined

from ebft.output.figures import duration, held_out, memory, perplexity_table, plain_merge, zero_shot_rows
from ebft.registry import recoveries

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9  # inches, of a picture

_PAGE = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string("""\
{% macro table(headings, rows) %}
<table>
{% if headings %}
<tr>{% for heading in headings %}<th>{{ heading }}</th>{% endfor %}</tr>
{% endif %}
{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endmacro %}
{% macro section(part) %}
<h2>{{ part.title }}</h2><p class="note">{{ part.note }}</p>{{ part.svg | safe }}
{% endmacro %}
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<title>ebft: {{ summary.model }}</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a2330 }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .9rem; border-bottom: 1px solid #d5dbe3; text-align: right }
th:first-child, td:first-child { text-align: left }
h2 { margin-top: 2.5rem; font-size: 1.15rem }
svg { width: 100%; height: auto }
p.note { color: #566274; font-size: .9rem }
</style></head>
<body>
<h1>{{ summary.model }}</h1>
<p>{{ summary.recipe }}; sparsity {{ "{:.2%}".format(summary.sparsity) }}; {{ duration(summary.seconds) }} in all.</p>
<p class="note">Peak memory of the host: {{ memory(summary.peak_memory) }}.</p>
{% if figures %}
{{ table(headings, figures) }}
{% endif %}
{% if zero_shot %}
{{ table(["zero-shot", "questions", "metric", "recovered", "standard error"], zero_shot) }}
{% endif %}
{% for part in curves %}{{ section(part) }}{% else %}<p>No recovery was asked for.</p>{% endfor %}

{{ section(sparsity) }}
{% if notes %}
<h2>Notes</h2><ul>{% for name, note in notes %}<li>{{ name }}: {{ note }}</li>{% endfor %}</ul>
{% endif %}
<h2>Settings</h2>
{{ table([], settings) }}
<p class="note">Text: {{ summary.calibration }}. Versions: {{ summary.versions }}.</p>
</body></html>
""")


@dataclass(frozen=True)
class _Section:
    title: str
    note: str
    svg: str  # matplotlib escapes what it writes


def report_page(summary: dict[str, Any], blocks: list[dict[str, Any]]) -> str:
    """The page for a finished run: its summary and its ``blocks.jsonl`` lines."""
    wholes, (headings, figures) = summary["whole_model"], perplexity_table(summary)
    noted = [(block["name"], block["notes"]) for block in blocks] + [(name, of["notes"]) for name, of in wholes.items()]
    return _PAGE.render(
        summary=summary,
        headings=headings,
        figures=figures,
        zero_shot=zero_shot_rows(summary),
        curves=[*_of_blocks(blocks), *(_of_the_whole(summary, name) for name in wholes)],
        sparsity=_section("Sparsity per layer", "Pruned share of each matrix.", partial(_sparsity, blocks=blocks)),
        notes=[(name, note) for name, notes in noted for note in notes],
        settings=[[name, value] for name, value in summary["config"].items() if value is not None],
        duration=duration,
        memory=memory,
    )


def _of_blocks(blocks: list[dict[str, Any]]) -> list[_Section]:
    """Of the recoveries in the walk; those that take no steps have no losses."""
    recovered = [block for block in blocks if block["relative_error_after"] is not None]
    tuned = [block for block in recovered if block["losses"]]
    errors = _section(
        "Reconstruction error, block by block",
        "Mean squared error against the targets, relative to how far these are from the block's inputs.",
        partial(_errors, blocks=recovered),
    )
    losses = _section(
        "Loss within each block",
        "Each line is one block, from first (dark) to last (light); losses are relative to the block's first ones.",
        partial(_losses, blocks=tuned),
    )
    return [*([errors] if recovered else []), *([losses] if tuned else [])]


def _of_the_whole(summary: dict[str, Any], name: str) -> _Section:
    entry, loss = summary["whole_model"][name], recoveries[name].loss
    merged = plain_merge(summary) if "plain_merge" in entry else ""
    note = f"Of the whole model, nats a token, before each step.{merged}"
    if told := held_out(entry):
        note += f" {told[:1].upper()}{told[1:]}."
    return _section(f"{loss[:1].upper()}{loss[1:]} ({name})", note, partial(_whole_losses, losses=entry["losses"]))


def _section(title: str, note: str, draw: Callable[[Axes], None]) -> _Section:
    from matplotlib import rc_context  # here and below, not above: importing it takes a third of a second

    out = io.StringIO()
    # Letters as text, in place of outlines: the page is smaller, sooner drawn, and can be searched.
    # The salt makes names of what is drawn: the same for the same picture.
    with rc_context({"svg.hashsalt": title, "svg.fonttype": "none", "font.family": "sans-serif"}):
        _figure(draw).savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    return _Section(title, note, svg[svg.index("<svg") :])


def _figure(draw: Callable[[Axes], None]) -> Figure:
    """A picture with room for labels of the usual lengths; looking for how much they take would double the time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.add_axes((0.09, 0.15, 0.89, 0.77))
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    return figure


def _errors(axes: Axes, blocks: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """``0.3`` in place of ``3 × 10⁻¹``, where matplotlib would have a label at all."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    numbers = [block["block"] for block in blocks]
    axes.plot(
        numbers, [block["relative_error_before"] for block in blocks], "o-", ms=3, label="pruned", color="#c0483e"
    )
    axes.plot(
        numbers, [block["relative_error_after"] for block in blocks], "o-", ms=3, label="recovered", color="#2a6fb0"
    )
    axes.set(xlabel="block", ylabel="relative error", yscale="log")
    _in_whole_numbers(axes)
    axes.yaxis.set_major_formatter(Plain())
    axes.yaxis.set_minor_formatter(Plain(minor_thresholds=(1, 0.4)))
    axes.legend(frameon=False)


def _losses(axes: Axes, blocks: list[dict[str, Any]]) -> None:
    from matplotlib import colormaps

    for place, block in enumerate(blocks):
        losses, width = block["losses"], max(1, len(block["losses"]) // 20)
        smooth = [sum(losses[i : i + width]) / len(losses[i : i + width]) for i in range(0, len(losses), width)]
        steps = [min(i + width, len(losses)) for i in range(0, len(losses), width)]
        shade = colormaps["viridis"](0.9 * place / max(1, len(blocks) - 1))
        axes.plot(steps, [loss / smooth[0] if smooth[0] else 1.0 for loss in smooth], lw=1, color=shade)
    axes.set(xlabel="step", ylabel="loss / first")
    _in_whole_numbers(axes)


def _whole_losses(axes: Axes, losses: list[float]) -> None:
    axes.plot(range(1, len(losses) + 1), losses, lw=1, color="#2a6fb0")
    axes.set(xlabel="step", ylabel="loss")
    _in_whole_numbers(axes)


def _sparsity(axes: Axes, blocks: list[dict[str, Any]]) -> None:
    from matplotlib.colors import Normalize

    names = list(dict.fromkeys(name for block in blocks for name in block["matrices"]))
    shown = [name.removesuffix(".weight") for name in names]
    longest = max(map(len, shown), default=0)
    left = min(0.5, 0.02 + 5 * longest / (72 * WIDTH))  # 5 points a letter
    axes.set_position((left, 0.15, 0.9 - left, 0.77))
    grid = [[block["matrices"].get(name, float("nan")) for block in blocks] for name in names]
    image = axes.imshow(grid, aspect="auto", cmap="Blues", norm=Normalize(0, 1), interpolation="nearest")
    axes.set_yticks(range(len(names)), shown, fontsize=8, parse_math=False)
    axes.set(xlabel="block")
    _in_whole_numbers(axes)
    axes.figure.colorbar(image, cax=axes.figure.add_axes((0.92, 0.15, 0.02, 0.77)))


def _in_whole_numbers(axes: Axes) -> None:
    """Of blocks and steps there are no halves."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
