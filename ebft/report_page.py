"""``report.html``: one self-contained page with the curves of a run."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from html import escape
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ebft.report import STAGES, duration, number, plain_merge, won_back, zero_shot_rows

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a2330 }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .9rem; border-bottom: 1px solid #d5dbe3; text-align: right }
th:first-child, td:first-child { text-align: left }
h2 { margin-top: 2.5rem; font-size: 1.15rem }
svg { width: 100%; height: auto }
p.note { color: #566274; font-size: .9rem }
"""


def report_page(summary: dict[str, Any], blocks: list[dict[str, Any]]) -> str:
    """The page for a finished run: its summary and its ``blocks.jsonl`` lines."""
    figures = _rows([[text, *(number(v[s]) for s in STAGES), won_back(v)] for text, v in summary["perplexity"].items()])
    settings = _rows([[name, str(value)] for name, value in summary["config"].items() if value is not None])
    asked = _rows(zero_shot_rows(summary))
    heads = "<th>zero-shot</th><th>questions</th><th>metric</th><th>recovered</th><th>standard error</th>"
    wholes = [name for name in ("lora", "full") if name in summary]
    noted = [(block["name"], block["notes"]) for block in blocks] + [(name, summary[name]["notes"]) for name in wholes]
    notes = "".join(f"<li>{escape(name)}: {escape(note)}</li>" for name, of_it in noted for note in of_it)
    tuned = [block for block in blocks if block["losses"]]
    curves = (
        _section(
            "Reconstruction error, block by block",
            "Mean squared error against the targets, relative to how far these are from the block's inputs.",
            lambda axes: _errors(axes, tuned),
        )
        + _section(
            "Loss within each block",
            "Each line is one block, from first (dark) to last (light); losses are relative to the block's first ones.",
            lambda axes: _losses(axes, tuned),
        )
        if tuned
        else ""
    )
    for name in wholes:
        held_out = [summary[name][f"held_out_{when}"] for when in ("before", "after")]
        note = f"Of the whole model, nats a token, before each step.{plain_merge(summary) if name == 'lora' else ''}"
        if held_out[0] is not None:
            note += f" On held-out sequences: {held_out[0]:.3f} before, {held_out[1]:.3f} after."
        losses = summary[name]["losses"]
        curves += _section(f"Language-model loss ({name})", note, partial(_language_model_losses, losses=losses))
    curves = curves or "<p>No recovery was asked for.</p>"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<title>ebft: {escape(summary["model"])}</title><style>{_STYLE}</style></head>
<body>
<h1>{escape(summary["model"])}</h1>
<p>{escape(summary["recipe"])}; sparsity {summary["sparsity"]:.2%}; {duration(summary["seconds"])} in all.</p>
<table><tr><th>perplexity</th><th>dense</th><th>pruned</th><th>recovered</th><th>won back</th></tr>{figures}</table>
{f"<table><tr>{heads}</tr>{asked}</table>" if asked else ""}
{curves}
{_section("Sparsity per layer", "Pruned share of each matrix.", lambda axes: _sparsity(axes, blocks))}
{f"<h2>Notes</h2><ul>{notes}</ul>" if notes else ""}
<h2>Settings</h2><table>{settings}</table>
<p class="note">Text: {escape(str(summary["calibration"]))}. Versions: {escape(str(summary["versions"]))}.</p>
</body></html>
"""


def _section(title: str, note: str, draw: Callable[[Axes], None]) -> str:
    from matplotlib import rc_context

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    out = io.StringIO()
    with rc_context({"svg.hashsalt": title}):  # names of what is drawn: the same for the same picture
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    return f'<h2>{title}</h2><p class="note">{note}</p>{svg[svg.index("<svg") :]}'


def _errors(axes: Axes, blocks: list[dict[str, Any]]) -> None:
    numbers = [block["block"] for block in blocks]
    axes.plot(
        numbers, [block["relative_error_before"] for block in blocks], "o-", ms=3, label="pruned", color="#c0483e"
    )
    axes.plot(
        numbers, [block["relative_error_after"] for block in blocks], "o-", ms=3, label="recovered", color="#2a6fb0"
    )
    axes.set(xlabel="block", ylabel="relative error", yscale="log")
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


def _language_model_losses(axes: Axes, losses: list[float]) -> None:
    axes.plot(range(1, len(losses) + 1), losses, lw=1, color="#2a6fb0")
    axes.set(xlabel="step", ylabel="loss")


def _sparsity(axes: Axes, blocks: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for block in blocks for name in block["matrices"]))
    grid = [[block["matrices"].get(name, float("nan")) for block in blocks] for name in names]
    image = axes.imshow(grid, aspect="auto", cmap="Blues", norm=Normalize(0, 1), interpolation="nearest")
    axes.set_yticks(range(len(names)), [name.removesuffix(".weight") for name in names], fontsize=8)
    axes.set(xlabel="block")
    axes.figure.colorbar(image, ax=axes)


def _rows(rows: list[list[str]]) -> str:
    return "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
