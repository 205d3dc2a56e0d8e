"""Methods against each other on a real model: perplexity, minutes and memory of each cell of a table.

    python -m benchmarks.quality --calibration c4.jsonl --eval wikitext2=wikitext2-test.txt c4=c4-held-out.jsonl
    python -m benchmarks.quality --quick

A cell is a method at a sparsity with a seed (of the calibration sample and the batch order): one run of ``ebft.run``,
an audit of its folder, and the perplexity of the saved model on every text. When a cell is finished its row is
appended to WORK/rows.jsonl, and the table, the chart and the result file are made anew; the same command again goes on
where it ended. A new WORK begins with the cells of the result file, if it has the same settings. (A preset that was
changed has other cells: take the old ones out of the result file first.) Minutes are those of
the walk and what follows it, without loading, saving and perplexities; "memory" is the peak of the process's resident
memory while it worked, whole model included.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.machine import result_file, write_result
from ebft.cli.app import parse_args
from ebft.config import ORGANISATION, flag
from ebft.data.calibration import evaluation_tokens
from ebft.errors import EBFTError
from ebft.evaluation.perplexity import perplexities
from ebft.model.checkpoint import load_tokenizer, open_model
from ebft.model.decoder import Decoder
from ebft.output.audit import audit

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_ERRORS = ("relative_error_before", "relative_error_after", "relative_held_out_before", "relative_held_out_after")
_MEASURED = [f"{stage}_{what}" for stage in ("dense", "pruned", "recovered") for what in ("perplexity", "samples")]
NOT_WORK = ("load", "save", "plain_merge_perplexity", *_MEASURED)


@dataclass(frozen=True)
class Method:
    """Flags of ``ebft.run``.

    Attributes:
        as_long_as: its whole-model recovery gets the minutes that this method's cell took.
        prunes: the method is a way to prune, which only a share or N:M of every matrix leaves open.
    """

    flags: tuple[str, ...]
    as_long_as: str | None = None
    prunes: bool = False


HELD_OUT = ("--holdout", "0.125")

# Options of the recipe, each put alone over the preset light. {calibration} and {second} are the texts given.
OPTIONS = {
    "batch 8": ("--batch-size", "8"),
    "absolute lr": ("--lr-scale", "absolute", "--lr", "3e-3"),
    "sparse-stream targets": ("--target", "sparse-stream"),
    "dense-stream targets": ("--target", "dense-stream"),
    "mixed inputs": ("--input", "mix"),
    "masks by its own inputs": ("--statistics", "input"),
    "weight decay 0.1": ("--weight-decay", "0.1"),
    "warm-up, cosine": ("--warmup", "0.1", "--lr-decay", "cosine"),
    "no clipping": ("--clip", "0"),
    "warm start": ("--recover", "layerwise+ebft"),
    "warm start on dense inputs": ("--recover", "layerwise+ebft", "--cg-inputs", "dense"),
    "channel loss": ("--loss", "channel"),
    "cosine loss": ("--loss", "cosine"),
    "token weights": ("--token-weights", "norm"),
    "sign": ("--optimizer", "sign", "--lr", "0.002"),
    "muon": ("--optimizer", "muon"),
    "halves": ("--unit", "halves"),
    "pairs of blocks": ("--unit", "pair"),
    "mask refresh": ("--refresh-every", "8", "--refresh-share", "0.05"),
    "held-out stop": HELD_OUT,
    "self-generated text": ("--calibration", "self"),
    "the second text": ("--calibration", "{second}"),
    "both texts": ("--calibration", "{calibration}:0.5,{second}:0.5"),
}

SIX_MINUTES = ("--lm-lr", "1e-3", "--lm-seconds", "360", "--lm-epochs", "100000")  # of LoRA

METHODS = {
    "none": Method(("--recover", "none")),
    "dsnot": Method(("--refine", "dsnot", "--recover", "none"), prunes=True),
    "ria": Method(("--prune", "ria", "--recover", "none"), prunes=True),
    "owl": Method(("--allocation", "owl", "--recover", "none"), prunes=True),
    "sparsegpt": Method(("--prune", "sparsegpt", "--recover", "none"), prunes=True),
    "layerwise": Method(("--recover", "layerwise")),
    "paper-small": Method(("--preset", "paper")),
    **{
        f"paper-small, lr {lr}": Method(("--preset", "paper", "--lr", lr))
        for lr in ("6e-4", "1e-3", "2e-3", "4e-3", "8e-3")
    },
    "light": Method(("--preset", "light")),
    "light, then lora": Method(
        ("--preset", "light", "--target", "dense-stream", "--batch-size", "4", "--recover", "ebft+lora", *SIX_MINUTES)
    ),
    **{f"light, lr {lr}": Method(("--preset", "light", "--lr", lr)) for lr in ("0.003", "0.01", "0.03", "0.1", "0.3")},
    "best": Method(("--preset", "best")),
    "distillation alone": Method(("--preset", "best", "--recover", "distill", "--distill-epochs", "5")),
    "blocks alone": Method(("--preset", "best", "--recover", "ebft", "--epochs", "8", "--batch-size", "4")),
    "best, held-out stop": Method(("--preset", "best", *HELD_OUT)),
    "best, epochs where the error is": Method(("--preset", "best", *HELD_OUT, "--epochs-where", "error")),
    **{f"light, {name}": Method(("--preset", "light", *flags)) for name, flags in OPTIONS.items()},
    **{
        f"{name}, lr {lr}": Method(("--recover", name, "--lm-lr", lr), as_long_as="paper-small")
        for name, rates in (("lora", ("1e-4", "3e-4", "1e-3", "3e-3")), ("full", ("3e-5", "1e-4", "3e-4")))
        for lr in rates
    },
}
STRUCTURED = ("--structured", "--sparsity", "0.26")
TARGETS = {
    **{f"{share}%": ("--sparsity", f"{share / 100:g}") for share in (50, 60, 70)},
    "2:4": ("--pattern", "2:4"),
    "4:8": ("--pattern", "4:8"),
    "transposable 2:4": ("--pattern", "2:4", "--transposable"),
    "structured 26%": (*STRUCTURED, "--uniform", "--prune", "flap"),
    "structured 26%, magnitude": (*STRUCTURED, "--uniform", "--prune", "magnitude"),
    "structured 26%, global": (*STRUCTURED, "--prune", "flap"),
}
REQUIRED = ("none", "dsnot", "sparsegpt", "paper-small", "light", "best")
QUICK = ["--targets", "60%", "--seeds", "1", "--samples", "12", "--seqlen", "64", "--eval-windows", "4"]


def main() -> None:
    """Work through the cells that are not finished, one by one."""
    given = _arguments(sys.argv[1:])
    work = Path(given.work)
    (work / "cells").mkdir(parents=True, exist_ok=True)
    texts = dict(text.split("=", 1) if "=" in text else (Path(text).stem, text) for text in given.eval)
    tokenizer = load_tokenizer(given.model)
    windows = {
        name: evaluation_tokens(text, tokenizer, seqlen=given.eval_seqlen).ids[: given.eval_windows]
        for name, text in texts.items()
    }
    _check_settings(work / "settings.json", _settings(given, texts))
    rows = Rows(work / "rows.jsonl", _committed(given, texts))
    if not rows.find("dense"):
        rows.append({"method": "dense", "perplexity": _perplexities(given, given.model, windows)})
    failed = []
    for seed in range(given.seeds):
        for target in given.targets:
            for method in given.methods:
                if rows.find(method, target, seed) or (METHODS[method].prunes and "--structured" in TARGETS[target]):
                    continue
                try:
                    rows.append(_cell(given, work, rows, method, target, seed, windows))
                except (EBFTError, subprocess.CalledProcessError) as error:
                    failed.append(f"{method} at {target}, seed {seed}: {error}")
                    print(failed[-1], flush=True)
                _write(given, rows, texts)
    print("\n".join([str(_write(given, rows, texts)), *failed]))
    if failed:
        raise SystemExit(1)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"in place of the defaults: {' '.join(QUICK)}")
    parser.add_argument("--model", help="folder or hub id (default: the SmolLM2-135M-Instruct wheel)")
    parser.add_argument("--calibration", default="builtin", metavar="NAME_OR_FILE")
    parser.add_argument(
        "--second", default="wikitext2", metavar="NAME_OR_FILE", help="of the options that calibrate on another text"
    )
    parser.add_argument("--windows", default="random-window", help="of the calibration text, as of ebft.run")
    parser.add_argument("--eval", nargs="+", default=["builtin"], metavar="NAME=NAME_OR_FILE")
    parser.add_argument("--eval-windows", type=int, default=40, help="from the start of each text")
    parser.add_argument("--eval-seqlen", type=int, default=512)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16", help="of the products, in tuning and in perplexities")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=REQUIRED, metavar="METHOD")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["60%", "70%"], metavar="TARGET")
    parser.add_argument("--seeds", type=int, default=3, help="0 to this, excluded")
    parser.add_argument("--work", default=".benchmarks/quality", help="folder for cells and rows")
    parser.add_argument("--keep", action="store_true", help="keep the weights of finished cells")
    parser.add_argument("--name", default="quality", help="of the result files")
    given = parser.parse_args(argv)
    if given.quick:
        given = parser.parse_args([*QUICK, "--work", ".benchmarks/quality-quick", "--name", "quality_quick", *argv])
    return given


# --- cells ----------------------------------------------------------------------------------------------------------


def _cell(
    given: argparse.Namespace,
    work: Path,
    rows: Rows,
    method: str,
    target: str,
    seed: int,
    windows: dict[str, Tensor],
) -> dict[str, Any]:
    """Run one cell, or take up its folder if it is done; gives its row."""
    output = work / "cells" / f"{method}_{target}_{seed}".replace(", ", "-").replace(" ", "-")
    flags = _flags(given, method, target, seed)
    same_time = METHODS[method].as_long_as
    if same_time:
        of = rows.find(same_time, target, seed)
        if of is None:
            raise EBFTError(f"{method} takes the time of {same_time}, whose cell at {target} comes first")
        flags += ["--lm-seconds", f"{of['seconds']:.0f}", "--lm-epochs", "100000"]
    print(f"{method} at {target}, seed {seed}: {' '.join(flags)}", flush=True)
    command = [sys.executable, "-m", "ebft.run", *flags, "--output", str(output), "--resume"]
    if not _is_done(output, flags):
        subprocess.run(command, check=True)
    found = audit(str(output))
    if found.faults:
        raise EBFTError(f"{output} does not pass the audit: {found.faults[0]}")
    perplexity = _perplexities(given, str(output), windows)
    summary = json.loads((output / "ebft_summary.json").read_text("utf-8"))
    blocks = [json.loads(line) for line in (output / "blocks.jsonl").read_text("utf-8").splitlines()]
    row = {"method": method, "target": target, "seed": seed, "flags": flags, "perplexity": perplexity}
    row["seconds"] = sum(s for stage, s in summary["stage_seconds"].items() if stage not in NOT_WORK)
    row["memory_bytes"] = max(part["peak_memory_bytes"] for part in (*blocks, *summary["whole_model"].values()))
    row["sparsity"] = summary["sparsity"]
    row["blocks"] = {name: [block[name] for block in blocks] for name in _ERRORS}
    row["versions"], row["audited"] = summary["versions"], True
    if not given.keep:
        for file in output.glob("*.safetensors"):
            if file.name != "masks.safetensors":
                file.unlink()
    return row


def _flags(given: argparse.Namespace, method: str, target: str, seed: int) -> list[str]:
    """Of a cell's run; what is said of the calibration text, where the run looks at any."""
    flags = [said.format(calibration=given.calibration, second=given.second) for said in METHODS[method].flags]
    flags = [*([] if "--preset" in flags else ["--preset", "paper"]), *flags, *TARGETS[target], "--dtype", given.dtype]
    flags += ["--eval", "", *(["--model", given.model] if given.model else [])]
    of_text = {"seed": seed, "samples": given.samples, "seqlen": given.seqlen, "windows": given.windows}
    of_text |= {} if "--calibration" in flags else {"calibration": given.calibration}
    asked, _ = parse_args(flags)
    for name, value in of_text.items():
        flags += [flag(name), str(value)] if asked.has_effect(name) else []
    return flags


def _is_done(output: Path, flags: list[str]) -> bool:
    """Whether ``output`` holds a finished run with these settings."""
    if not (output / "ebft_summary.json").is_file():
        return False
    asked, _ = parse_args([*flags, "--output", str(output)])
    said = json.loads((output / "ebft_summary.json").read_text("utf-8"))["config"]
    differ = {
        name
        for name, value in asked.flat().items()
        if name in said and name not in ORGANISATION and said[name] != value
    }
    if differ:
        raise EBFTError(f"{output} holds a run with another {min(differ)}; choose another --work")
    return True


def _perplexities(given: argparse.Namespace, model: str | None, windows: dict[str, Tensor]) -> dict[str, float]:
    source = open_model(model)
    decoder = Decoder(source.model, DEVICE, getattr(torch, given.dtype), weights=source.weights)
    return perplexities(decoder, windows)


class Rows:
    """The finished cells, a JSON object a line; others may append to the same file."""

    def __init__(self, file: Path, begin_with: Iterable[dict[str, Any]] = ()) -> None:
        self._file = file
        self.all: list[dict[str, Any]] = []
        self._read()
        for row in () if self.all else begin_with:
            self.append(row)

    def _read(self) -> None:
        if self._file.is_file():
            self.all = [json.loads(line) for line in self._file.read_text("utf-8").splitlines()]

    def append(self, row: dict[str, Any]) -> None:
        """Add a row, and take in those of others."""
        with self._file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        self._read()

    def find(self, method: str, target: str | None = None, seed: int | None = None) -> dict[str, Any] | None:
        """The row of a cell, if it is finished."""
        matching = (r for r in self.all if (r["method"], r.get("target"), r.get("seed")) == (method, target, seed))
        return next(matching, None)


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """The seeds of one method at one target: means, and standard deviations where there are several."""

    method: str
    target: str
    seeds: int
    perplexity: dict[str, tuple[float, float]]
    minutes: float
    gigabytes: float
    calibration_error: float | None
    held_out_error: float | None

    @classmethod
    def of(cls, rows: list[dict[str, Any]]) -> Summary:
        """Of rows that differ in the seed alone."""
        texts = {name: [row["perplexity"][name] for row in rows] for name in rows[0]["perplexity"]}
        calibration, held_out = (
            _mean(_mean(row["blocks"][name]) for row in rows)
            for name in ("relative_error_after", "relative_held_out_after")
        )
        return cls(
            method=rows[0]["method"],
            target=rows[0]["target"],
            seeds=len(rows),
            perplexity={name: (statistics.mean(v), statistics.stdev(v) if v[1:] else 0.0) for name, v in texts.items()},
            minutes=statistics.mean(row["seconds"] for row in rows) / 60,
            gigabytes=max(row["memory_bytes"] for row in rows) / 2**30,
            calibration_error=calibration,
            held_out_error=held_out,
        )


def summaries(rows: Iterable[dict[str, Any]]) -> list[Summary]:
    """Of every target in order, its methods in order."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "target" in row:
            cells.setdefault((row["target"], row["method"]), []).append(row)
    order = {cell: number for number, cell in enumerate((t, m) for t in TARGETS for m in METHODS)}
    return [Summary.of(cells[cell]) for cell in sorted(cells, key=order.__getitem__)]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line a method and target, the dense model first."""
    dense = next(row["perplexity"] for row in rows if row["method"] == "dense")
    lines = [
        f"| | method | {' | '.join(dense)} | minutes | GiB | error, calibration | held out | seeds |",
        f"|{' --- |' * (len(dense) + 7)}",
        f"| | dense | {' | '.join(f'{value:.2f}' for value in dense.values())} | | | | | |",
    ]
    for cell in summaries(rows):
        values = [f"{mean:.2f}" + (f" ± {deviation:.2f}" if cell.seeds > 1 else "") for mean, deviation in
                  cell.perplexity.values()]  # fmt: skip
        errors = ["" if e is None else f"{e:.3f}" for e in (cell.calibration_error, cell.held_out_error)]
        columns = [cell.target, cell.method, *values, f"{cell.minutes:.1f}", f"{cell.gigabytes:.1f}", *errors]
        lines.append(f"| {' | '.join(columns)} | {cell.seeds} |")
    return "\n".join(lines) + "\n"


def chart(rows: list[dict[str, Any]]) -> Figure:
    """Perplexity on the first text against minutes, a panel a target; the line is the frontier, grey are options."""
    cells = summaries(rows)
    targets = list(dict.fromkeys(cell.target for cell in cells))
    across = min(3, max(1, len(targets)))
    down = -(-len(targets) // across)
    figure = Figure(figsize=(5.5 * across, 4.5 * max(1, down)), layout="constrained")
    for number, target in enumerate(targets, 1):
        axes = figure.add_subplot(down, across, number)
        frontier: list[tuple[float, float]] = []
        for cell in sorted((cell for cell in cells if cell.target == target), key=lambda cell: cell.minutes):
            text, (mean, deviation) = next(iter(cell.perplexity.items()))
            minutes = max(cell.minutes, 0.01)
            if cell.method.removeprefix("light, ") in OPTIONS:
                axes.plot(minutes, mean, "o", color="0.7", markersize=4, zorder=1)
                continue
            axes.errorbar(minutes, mean, yerr=deviation, fmt="o")
            axes.annotate(cell.method, (minutes, mean), xytext=(5, 4), textcoords="offset points", fontsize="small")
            axes.set(xlabel="minutes", ylabel=f"perplexity, {text}", title=target, xscale="log", yscale="log")
            if not frontier or mean < frontier[-1][1]:
                frontier.append((minutes, mean))
        axes.plot(*zip(*frontier, strict=True), color="0.5", linewidth=0.8, zorder=0)
        axes.margins(x=0.3)
        axes.grid(visible=True, which="both", alpha=0.3)
    return figure


def _settings(given: argparse.Namespace, texts: dict[str, str]) -> dict[str, Any]:
    """What all cells of a table have in common."""
    settings = {"model": given.model and Path(given.model).name}
    settings |= {name: getattr(given, name) for name in ("eval_windows", "eval_seqlen", "samples", "seqlen", "windows")}
    settings |= {"dtype": given.dtype, "threads": torch.get_num_threads(), "calibration": Path(given.calibration).name}
    return settings | {"eval": {name: Path(text).name for name, text in texts.items()}}


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    """That a WORK's rows are of these settings; of a new one, that they will be."""
    had = json.loads(file.read_text("utf-8")) if file.is_file() else settings
    differ = [name for name, value in settings.items() if had.get(name) != value]
    if differ:
        said = f"{differ[0]} {had.get(differ[0])!r}, and {settings[differ[0]]!r} was given"
        raise SystemExit(f"{file.parent} has cells with {said}; choose another --work")
    file.write_text(json.dumps(settings), encoding="utf-8")


def _committed(given: argparse.Namespace, texts: dict[str, str]) -> list[dict[str, Any]]:
    """The cells of an earlier table of these settings on this machine."""
    file = result_file(given.name)
    found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return found["cells"] if found.get("settings") == _settings(given, texts) else []


def _write(given: argparse.Namespace, rows: Rows, texts: dict[str, str]) -> Path:
    settings = _settings(given, texts)
    kept = [{**row, "flags": [re.sub(r"[^,]*/", "", flag) for flag in row.get("flags", [])]} for row in rows.all]
    cells = [dataclasses.asdict(cell) for cell in summaries(rows.all)]
    file = write_result(given.name, {"settings": settings, "table": cells, "cells": kept})
    file.with_suffix(".md").write_text(table(rows.all), encoding="utf-8")
    chart(rows.all).savefig(file.with_suffix(".svg"), metadata={"Date": None})
    return file


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.mean(known) if known else None


if __name__ == "__main__":
    main()
