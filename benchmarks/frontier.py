"""The picture of the README: perplexity against minutes on SmolLM2, from the committed result file.

    python -m benchmarks.frontier

Two files, for light and for dark pages; text stays text. ``tests/test_readme.py`` holds what is written in them to the
result file.
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.machine import RESULTS

SOURCE = RESULTS / "amd-epyc-avx512-2-cores" / "quality.json"
ASSETS = Path(__file__).parents[1] / "docs" / "assets"
TARGET, TEXT = "60%", "wikitext2"
INKS = {"light": ("#1f2328", "#0969da"), "dark": ("#e6edf3", "#4493f8")}  # of words and lines, of what is tuned

# Method of benchmarks.quality -> its name in the picture, and where that stands (points from the dot, alignment).
POINTS = {
    "sparsegpt": ("SparseGPT", (7, 3), "left"),
    "light": ("1 epoch a block", (-4, -19), "left"),
    "layerwise": ("closed form", (7, 3), "left"),
    "best": ("8 epochs a block", (0, -16), "right"),
    "paper-small": ("published recipe", (0, 8), "center"),
    "paper-small, lr 4e-3": ("at 20 × its rate", (7, -4), "left"),
}


def picture(scheme: str) -> Figure:
    """The chart in the colours of ``scheme``, without a background."""
    result = json.loads(SOURCE.read_text(encoding="utf-8"))
    cells = {cell["method"]: cell for cell in result["table"] if cell["target"] == TARGET}
    dense = next(cell["perplexity"][TEXT] for cell in result["cells"] if cell["method"] == "dense")
    ink, accent = INKS[scheme]
    figure = Figure(figsize=(7.2, 3.6), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    for level, name in ((dense, "dense"), (cells["none"]["perplexity"][TEXT][0], "pruned (Wanda), not recovered")):
        axes.axhline(level, color=ink, linewidth=1, linestyle="--")
        axes.annotate(f"{name} {level:.1f}", (10.4, level), xytext=(0, 4), textcoords="offset points", ha="right")
    frontier: list[tuple[float, float]] = []
    for method in sorted(POINTS, key=lambda method: cells[method]["minutes"]):
        name, place, side = POINTS[method]
        minutes, perplexity = cells[method]["minutes"], cells[method]["perplexity"][TEXT][0]
        axes.plot(minutes, perplexity, "o", color=accent)
        axes.annotate(
            f"{name} {perplexity:.1f}", (minutes, perplexity), xytext=place, textcoords="offset points", ha=side
        )
        if not frontier or perplexity < frontier[-1][1]:
            frontier.append((minutes, perplexity))
    axes.plot(*zip(*frontier, strict=True), color=accent, linewidth=1.2, zorder=0)
    axes.set(xlim=(0, 10.5), ylim=(25, 200), yscale="log", xlabel="minutes, pruning included")
    axes.set_ylabel("perplexity, WikiText-2")
    axes.set_yticks([30, 50, 70, 100, 150], ["30", "50", "70", "100", "150"])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def svg(scheme: str, file: Path) -> None:
    """Write the picture of ``scheme`` as SVG, with its text as text."""
    ink, _ = INKS[scheme]
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
    plain = {"svg.fonttype": "none", "svg.hashsalt": "ebft", "font.family": "sans-serif", "font.size": 10}
    with rc_context(colours | plain):
        picture(scheme).savefig(
            file, metadata={"Date": None, "Title": "Perplexity against minutes, SmolLM2-135M at 60 %"}
        )


if __name__ == "__main__":
    for scheme in INKS:
        svg(scheme, ASSETS / f"frontier-{scheme}.svg")
