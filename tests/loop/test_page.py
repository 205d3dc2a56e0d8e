"""The report page: what it says and shows, and that its charts' labels are inside, whatever figures and names are."""

import random
import re
from functools import partial

import pytest
from test_security import a_summary

from ebft import EBFTConfig, EBFTError, run_ebft
from ebft.cli.app import main
from ebft.output.charts import (
    a_bar_a_block,
    block_errors,
    block_losses,
    chart,
    figure_of,
    perplexity_bars,
    sparsity_map,
    whole_losses,
)
from ebft.output.page import report_page

NAMES = {"short": "fc.weight", "long": "block_sparse_moe.shared_expert.gate_and_up_projection.weight"}


def blocks(count, smallest, name):
    """Of which the errors span the decades from ``smallest`` to 1."""
    return [
        {
            "block": index,
            "relative_error_before": smallest ** (index / max(1, count - 1)),
            "relative_error_after": 0.9 * smallest ** (index / max(1, count - 1)),
            "losses": [smallest, 1234.5, 0.5],
            "seconds": 1234.5,
            "matrices": {name: 0.5, "mlp.up_proj.weight": 0.25},
        }
        for index in range(count)
    ]


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("smallest", [0.5, 1e-6])
@pytest.mark.parametrize("count", [1, 126])
@pytest.mark.parametrize("draw", [block_errors, block_losses, sparsity_map])
def test_no_label_is_cut_off(draw, count, smallest, name):
    _is_inside(figure_of(partial(draw, blocks=blocks(count, smallest, name))))


def test_no_label_of_other_charts_is_cut_off():
    _is_inside(figure_of(partial(whole_losses, losses=[12345.6, 2.0] * 1000)))
    _is_inside(figure_of(lambda axes: a_bar_a_block(axes, blocks(126, 0.5, "a"), "seconds", 1.0, "s")))


def _is_inside(figure):
    around = figure.get_tightbbox()
    assert (around.x0 >= 0, around.y0 >= 0) == (True, True)
    assert (around.x1 <= figure.get_figwidth(), around.y1 <= figure.get_figheight()) == (True, True)


def test_a_chart_has_text_a_role_a_title_and_the_page_s_colours():
    made = chart("Errors", "Of <blocks>.", partial(block_errors, blocks=blocks(3, 0.3, "fc.weight")))
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", made.svg)
    assert {"block", "relative error", "pruned", "recovered", "0", "1", "2"} <= set(labels)
    assert not {"0.5", "1.5"} & set(labels[:5])  # on the axis of blocks
    assert {"0.3", "0.6"} <= set(labels)  # not 3 x 10^-1
    assert 'role="img" aria-label="Errors: Of &lt;blocks&gt;."><title>Errors</title>' in made.svg
    assert "var(--pruned)" in made.svg
    assert not re.search(r"#0102|<metadata|#000000;.*<text", made.svg)


def test_a_curve_of_all_blocks_goes_by_each_one_s_own_start():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    block_losses(axes, [{"losses": [scale, scale / 2]} for scale in (1.0, 7.0, 100.0)] + [{"losses": []}])
    (median, _) = axes.get_lines()
    assert (median.get_ydata()[0], median.get_ydata()[-1]) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("values", "log"), [({"dense": 10, "pruned": 20}, False), ({"dense": 10.0, "pruned": 1e5, "recovered": 40.0}, True)]
)
def test_bars_of_perplexities(values, log):
    made = perplexity_bars("a<b", values)
    assert made.note == ("On a logarithmic scale." if log else "")
    assert {"dense", "10.00"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", made.svg))
    assert perplexity_bars("a", {"dense": 10.0, "pruned": float("inf")}) is None


# --- the page -------------------------------------------------------------------------------------------------------


def lines(count=30):
    """Of blocks as a run leaves them, of which those from 12 on hardly recover."""
    generator = random.Random(0)
    return [
        {
            "block": index,
            "name": f"model.layers.{index}",
            "sparsity": 0.6,
            "matrices": {"self_attn.q_proj.weight": 0.6, "mlp.up_proj.weight": 0.6 + (index % 3) / 50},
            "relative_error_before": 0.9,
            "relative_error_after": 0.5 if index < 12 or index == 20 else 0.88,
            "losses": [3 * 0.99**step + generator.random() / 10 for step in range(240)],
            "kept_weights": 40,
            "prunable_weights": 100,
            "seconds": 3.0 + index / 10,
            "peak_memory_bytes": 2**29 + index * 2**22,
            "notes": [],
        }
        for index in range(count)
    ]


def a_page(**changes):
    config = EBFTConfig.preset("light", sparsity=0.6, calibration="/home/me/mine.txt", model="/home/me/models/tiny")
    summary = a_summary("/home/me/models/tiny", "wikitext2") | {"recipe": "wanda 60%, recovered by ebft"}
    calibration = {"tokens": 5, "source": "/home/me/mine.txt", "windows": "packed"}
    summary |= {"config": config.flat(), "whole_model": {}, "calibration": calibration, "output": "/home/me/out"}
    summary["continuations"]["stages"] = {stage: [" one\ntwo"] for stage in ("dense", "pruned", "recovered")}
    return report_page(summary | changes, lines())


def test_what_the_page_says():
    page = a_page()
    text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    assert "Recovery won back 63% of what pruning lost: perplexity on wikitext2 is 15.10 dense, 62.00 pruned" in text
    assert "Blocks 12 to 19 and 21 to 29 hardly recovered: their errors fell by less than 10%." in text
    assert "ebft sample out --against tiny" in text
    assert "ebft run tiny --preset light --sparsity 0.6 --calibration mine.txt" in text
    assert "batch_size" not in text  # as the preset has it
    assert "/home/me" not in page
    assert len(page.encode()) < 300_000


def test_nothing_is_asked_for_from_anywhere():
    page = a_page()
    assert not re.search(r"<script|<link|<iframe|src=|@import|url\((?!#)|href=\"(?!#|data:)", page)


def test_sparsity_is_drawn_only_where_it_differs():
    summary = a_summary("m", "t")
    even = [line | {"matrices": {"a.weight": 0.6}} for line in lines()]
    assert "Every matrix is 60.0% sparse." in report_page(summary, even)
    assert "Every matrix is" not in a_page()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(scheme):
    """4.5 to 1 for text and 3 to 1 for what is drawn (WCAG 2.2, AA)."""
    light, dark = re.findall(r":root \{([^}]*)\}", a_page())
    colors = dict(re.findall(r"--(\w+): (#\w+)", light if scheme == "light" else dark))
    for paper in ("paper", "soft"):
        assert min(contrast(colors[paper], colors[name]) for name in ("ink", "muted")) >= 4.5
    assert min(contrast(colors["paper"], colors[name]) for name in ("dense", "pruned", "recovered")) >= 3


def contrast(one, other):
    def luminance(color):
        color = "".join(2 * digit for digit in color[1:]) if len(color) == 4 else color[1:]
        parts = [int(color[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# --- ebft report ----------------------------------------------------------------------------------------------------


def test_the_page_of_a_run_that_is_not_finished(short_run, tmp_path, silent, capsys, monkeypatch):
    given = short_run()
    with monkeypatch.context() as patched:
        patched.setattr("ebft.pipeline.run._save", lambda context: (_ for _ in ()).throw(EBFTError("stopped")))
        with pytest.raises(EBFTError, match="stopped"):
            run_ebft(config=EBFTConfig.of(**given), reporter=silent)
    for named in ("out", "out.partial"):
        assert main(["report", str(tmp_path / named)]) == 0
        assert capsys.readouterr().out == f"{tmp_path / 'out.partial' / 'report.html'}\n"
    page = (tmp_path / "out.partial" / "report.html").read_text()
    assert "This run is not finished.</strong> 3 of 3 blocks are." in page
    assert "--output out --resume</code>" in page
    result = run_ebft(config=EBFTConfig.of(**given, resume=True), reporter=silent)
    assert "This run is not finished" not in (result.output / "report.html").read_text()
    before = (result.output / "report.html").read_text()
    (result.output / "report.html").unlink()
    assert main(["report", str(result.output)]) == 0
    after = (result.output / "report.html").read_text()
    shown = [re.sub(r"<dt>time.*", "", page) for page in (before, after)]
    assert shown[0] == shown[1]


def test_a_folder_that_no_run_has_made(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "is no folder of a run; expected OUT, finished or not, or OUT.partial" in capsys.readouterr().err
    (tmp_path / "ebft_summary.json").write_text('{"model": "a"}')
    assert main(["report", str(tmp_path)]) == 2
    assert "is not what this version of ebft leaves: 'whole_model'" in capsys.readouterr().err
