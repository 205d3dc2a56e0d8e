"""The charts of the report page: SVG by matplotlib, in the page's own colours, for light and dark.

Matplotlib draws with colours that stand for those of the page, and its hexadecimal names are then replaced by CSS
variables. Letters are text, not outlines. No file is asked for, and there is no script.
"""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from typing import TYPE_CHECKING, Any

from ebft.output.figures import STAGES, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (4.8, 3.0)  # inches: labels of 10 points can be read on a phone, where a picture is as wide as the screen
_INK, _MUTED = "#010203", "#010204"
_OF = {"dense": "#010205", "pruned": "#010206", "recovered": "#010207"}
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", **{color: f"--{stage}" for stage, color in _OF.items()}}
_POINTS = 20  # of a curve that stands for many


@dataclass(frozen=True)
class Chart:
    """A picture with its title and a line about it."""

    title: str
    note: str
    svg: str


def chart(title: str, note: str, draw: Callable[[Axes], None], said: str = "", height: float = SIZE[1]) -> Chart:
    """``draw`` on a pair of axes, ``height`` inches high; ``said``: what is to be seen, for those who do not see it."""
    from matplotlib import rc_context  # here and below, not above: importing it takes a third of a second

    out = io.StringIO()
    style = {"svg.hashsalt": title, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)
    with rc_context(style):
        figure_of(draw, height).savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Chart(title, note, _inline(out.getvalue(), title, said or note))


def figure_of(draw: Callable[[Axes], None], height: float = SIZE[1]) -> Figure:
    """A picture with room for labels of the usual lengths; looking for how much they take would double the time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0], height))
    axes = figure.add_axes((0.2, 0.18, 0.76, 0.76))
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    return figure


def _inline(svg: str, title: str, said: str) -> str:
    """What stands in a page: without a prologue, metadata and names that nothing refers to."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    begin, rest = svg.split(">", 1)
    return f'{begin} role="img" aria-label="{escape(title)}: {escape(said)}"><title>{escape(title)}</title>{rest}'


# --- what is drawn --------------------------------------------------------------------------------------------------


def perplexity_bars(text: str, values: dict[str, float]) -> Chart | None:
    """A bar for each model; nothing where a figure is infinite."""
    stages = [stage for stage in STAGES if stage in values]
    if not all(isfinite(values[stage]) and values[stage] > 0 for stage in stages):
        return None
    far = max(values.values()) > 30 * min(values.values())

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import NullLocator

        bars = axes.barh(stages, [values[stage] for stage in stages], color=[_OF[stage] for stage in stages])
        axes.bar_label(bars, [number(values[stage]) for stage in stages], padding=4)
        axes.set_xscale("log" if far else "linear")
        axes.set_xlim(min(values.values()) / 2 if far else 0, max(values.values()) * (3 if far else 1.2))
        axes.xaxis.set_major_locator(NullLocator())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.invert_yaxis()
        axes.spines["bottom"].set_visible(False)
        axes.set_position((0.2, 0.03, 0.78, 0.94))

    said = ", ".join(f"{stage} {number(values[stage])}" for stage in stages)
    return chart(f"Perplexity on {text}", "On a logarithmic scale." if far else "", draw, said, height=1.6)


def block_errors(axes: Axes, blocks: Sequence[dict[str, Any]]) -> None:
    """Each block's error before and after its recovery."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """``0.3`` in place of ``3 × 10⁻¹``, where matplotlib would have a label at all."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    numbers = [block["block"] for block in blocks]
    for stage, name, mark in (("pruned", "before", "o"), ("recovered", "after", "s")):
        errors = [block[f"relative_error_{name}"] for block in blocks]
        axes.plot(numbers, errors, f"{mark}-", ms=3, label=stage, color=_OF[stage])
    axes.set(xlabel="block", ylabel="relative error", yscale="log")
    in_whole_numbers(axes)
    axes.yaxis.set_major_formatter(Plain())
    axes.yaxis.set_minor_formatter(Plain(minor_thresholds=(1, 0.4)))
    axes.legend(frameon=False, labelcolor=_INK)


def block_losses(axes: Axes, blocks: Sequence[dict[str, Any]]) -> None:
    """Over all blocks: the middle, and where most are, of each one's loss over its own first."""
    curves = [curve for block in blocks if (curve := _relative(block["losses"]))]
    shares = [100 * place / (_POINTS - 1) for place in range(_POINTS)]
    columns = [sorted(curve[place] for curve in curves) for place in range(_POINTS)]
    for low, high, alpha in ((0.0, 1.0, 0.15), (0.25, 0.75, 0.35)):
        below, above = ([_quantile(column, share) for column in columns] for share in (low, high))
        label = "all blocks" if low == 0 else "the middle half"
        axes.fill_between(shares, below, above, color=_OF["recovered"], alpha=alpha, lw=0, label=label)
    axes.plot(shares, [statistics.median(column) for column in columns], color=_OF["recovered"], label="median")
    highest = max(1.0, *(_quantile(column, 0.75) for column in columns))
    axes.set(xlabel="steps, %", ylabel="loss / its start", ylim=(0, 1.3 * highest), xlim=(0, 100))
    axes.axhline(1, color=_MUTED, lw=0.8, ls=":")
    axes.legend(frameon=False, labelcolor=_INK, loc="lower left")


def _relative(losses: Sequence[float]) -> list[float]:
    """A block's losses over its first ones, at ``_POINTS`` places of its steps; nothing of too few."""
    width = max(1, len(losses) // _POINTS)
    start = sum(losses[:width]) / width if losses else 0.0
    if not start or not isfinite(start):
        return []
    ends = [round((len(losses) - width) * place / (_POINTS - 1)) for place in range(_POINTS)]
    return [sum(losses[end : end + width]) / width / start for end in ends]


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def whole_losses(axes: Axes, losses: Sequence[float]) -> None:
    """The loss of a recovery of the whole model, step by step."""
    axes.plot(range(1, len(losses) + 1), losses, lw=1, color=_OF["recovered"])
    axes.set(xlabel="step", ylabel="loss")
    in_whole_numbers(axes)


def a_bar_a_block(axes: Axes, blocks: Sequence[dict[str, Any]], what: str, unit: float, label: str) -> None:
    """A figure of every block."""
    axes.bar([block["block"] for block in blocks], [block[what] / unit for block in blocks], color=_OF["recovered"])
    axes.set(xlabel="block", ylabel=label)
    in_whole_numbers(axes)


def sparsity_map(axes: Axes, blocks: Sequence[dict[str, Any]]) -> None:
    """The pruned share of every matrix of every block."""
    from matplotlib.colors import Normalize

    names = list(dict.fromkeys(name for block in blocks for name in block["matrices"]))
    shown = [name.removesuffix(".weight") for name in names]
    shown = [name if len(name) <= 24 else f"…{name[-23:]}" for name in shown]
    left = min(0.5, 0.03 + 6 * max(map(len, shown), default=0) / (72 * SIZE[0]))  # 6 points a letter
    axes.set_position((left, 0.18, 0.84 - left, 0.76))
    grid = [[block["matrices"].get(name, float("nan")) for block in blocks] for name in names]
    image = axes.imshow(grid, aspect="auto", cmap="Blues", norm=Normalize(0, 1), interpolation="nearest")
    axes.set_yticks(range(len(names)), shown, fontsize=8, parse_math=False)
    axes.set(xlabel="block")
    in_whole_numbers(axes)
    axes.figure.colorbar(image, cax=axes.figure.add_axes((0.86, 0.18, 0.03, 0.76)))


def in_whole_numbers(axes: Axes) -> None:
    """Of blocks and steps there are no halves."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=True))
