"""The quality benchmark: cells run once, resume, are read back as a table; foreign folders are refused."""

import json
from functools import partial

import pytest

from benchmarks import quality
from benchmarks.machine import write_result


@pytest.fixture
def flags(tiny, tmp_path):
    text = str(tiny / "text.txt")
    usual = ["--model", str(tiny / "model"), "--calibration", text, "--eval", f"one={text}", "two=builtin"]
    usual += ["--eval-windows", "2", "--eval-seqlen", "32", "--samples", "4", "--seqlen", "16", "--dtype", "float32"]
    usual += ["--targets", "2:4", "--methods", "none", "paper-small", "--seeds", "1"]
    return [*usual, "--work", str(tmp_path / "work")]


def run(flags, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["quality", *flags])
    monkeypatch.setattr(quality, "write_result", partial(write_result, folder=tmp_path))
    monkeypatch.setattr(quality, "result_file", lambda name: tmp_path / f"{name}.json")
    quality.main()


@pytest.mark.slow
def test_cells_are_run_once_and_make_a_table(flags, monkeypatch, tmp_path, capsys):
    run(flags, monkeypatch, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "work" / "rows.jsonl").read_text().splitlines()]
    cells = [(row["method"], row["target"]) for row in rows[1:]]
    assert rows[0]["method"] == "dense"
    assert cells == [("none", "2:4"), ("paper-small", "2:4")]
    for row in rows[1:]:
        assert row["perplexity"].keys() == {"one", "two"}
        assert row["audited"]
        tuned = row["method"] == "paper-small"
        assert all((error is not None) == tuned for error in row["blocks"]["relative_error_after"])
        assert row["sparsity"] == 0.5

    lines = (tmp_path / "quality.md").read_text().splitlines()
    assert len(lines) == 3 + len(cells)
    assert f"{rows[2]['perplexity']['one']:.2f}" in lines[4]
    assert "paper-small" in (tmp_path / "quality.svg").read_text()
    assert str(tmp_path) not in (tmp_path / "quality.json").read_text()

    monkeypatch.setattr(quality.subprocess, "run", lambda *_, **__: pytest.fail("a finished cell was run again"))
    run(flags, monkeypatch, tmp_path)
    run([*flags, "--work", str(tmp_path / "new")], monkeypatch, tmp_path)  # begins with the result file's cells
    assert (tmp_path / "new" / "rows.jsonl").read_text().count("\n") == len(rows)
    (tmp_path / "quality.json").unlink()
    (tmp_path / "work" / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")  # rows are lost, folders are there
    with pytest.raises(SystemExit, match="seqlen 16, and 20 was given"):
        run([*flags, "--seqlen", "20"], monkeypatch, tmp_path)
    (tmp_path / "work" / "settings.json").unlink()
    with pytest.raises(SystemExit, match="1"):
        run([*flags, "--seqlen", "20"], monkeypatch, tmp_path)
    assert "another seqlen" in capsys.readouterr().out


def test_a_cell_that_cannot_be_does_not_keep_others_from_being(flags, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        run([*flags, "--methods", "lora, lr 1e-3", "none"], monkeypatch, tmp_path)
    assert "lora, lr 1e-3 at 2:4, seed 0: lora, lr 1e-3 takes the time of paper-small" in capsys.readouterr().out
    assert '"method": "none"' in (tmp_path / "work" / "rows.jsonl").read_text()


@pytest.mark.parametrize(
    ("method", "target", "left_out"),
    [
        ("none", "structured 26%, magnitude", {"--seed", "--samples", "--seqlen", "--windows", "--calibration"}),
        ("light", "structured 26%, magnitude", set()),
        ("light, self-generated text", "60%", {"--windows"}),
    ],
)
def test_a_cell_says_nothing_of_text_that_its_run_does_not_look_at(method, target, left_out):
    flags = quality._flags(quality._arguments(["--quick"]), method, target, 1)
    quality.parse_args(flags)  # which refuses what has no effect
    assert {"--seed", "--samples", "--seqlen", "--windows", "--calibration"} - {*flags} == left_out


def test_seeds_are_means_and_deviations():
    def row(seed, perplexity, seconds):
        blocks = {"relative_error_after": [0.1, 0.3], "relative_held_out_after": [None, None]}
        cell = {"method": "light", "target": "2:4", "seed": seed, "perplexity": {"text": perplexity}}
        return {**cell, "seconds": seconds, "memory_bytes": 2**30, "blocks": blocks}

    rows = [{"method": "dense", "perplexity": {"text": 5.0}}, row(0, 10.0, 60), row(1, 14.0, 180)]
    (cell,) = quality.summaries(rows)
    assert (cell.seeds, cell.minutes, cell.gigabytes) == (2, 2.0, 1.0)
    assert cell.perplexity["text"] == (12.0, pytest.approx(2.828, abs=1e-3))
    assert cell.calibration_error == pytest.approx(0.2)
    assert cell.held_out_error is None
    assert "| 2:4 | light | 12.00 ± 2.83 | 2.0 | 1.0 | 0.200 |  | 2 |" in quality.table(rows)
