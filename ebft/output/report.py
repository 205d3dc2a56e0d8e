"""``ebft report``: the page of a finished run anew, or of one that is not finished, from what it has committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ebft.errors import EBFTError, on_one_line
from ebft.files import ordinary, parse_json, read_json
from ebft.output.figures import STAGES
from ebft.output.page import report_page
from ebft.output.records import COMMITS, LINES, SUMMARY, WORKING, unsealed, write_whole


def write_report(path: str) -> Path:
    """Write ``report.html`` into a run's folder; gives the file.

    Args:
        path: ``OUT`` of a finished run, or ``OUT`` or ``OUT.partial`` of one that is not finished.

    Raises:
        EBFTError: no run has made the folder, or what it holds cannot be read.
    """
    given = Path(path).expanduser()
    places = [given, given.with_name(f"{given.name}.partial")] if given.name else [given]
    folder = next((place for place in places if _is_run(place)), None)
    if folder is None:
        raise EBFTError(f"{path} is no folder of a run; expected OUT, finished or not, or OUT.partial")
    try:
        if (folder / WORKING).is_file():
            page = _unfinished(folder)
        else:
            page = report_page(read_json(folder / SUMMARY, SUMMARY), _lines(folder))
        write_whole(folder / "report.html", page)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise EBFTError(f"{folder} is not what this version of ebft leaves: {on_one_line(error)}") from None
    return folder / "report.html"


def _is_run(folder: Path) -> bool:
    return (folder / SUMMARY).is_file() or (folder / WORKING).is_file()


def _unfinished(folder: Path) -> str:
    """The page of a run that has not ended."""
    begun, lines = unsealed(folder / WORKING), _lines(folder)
    if begun is None or not begun.get("about"):
        raise ValueError(f"{WORKING} does not say what the run was begun with")
    about = begun["about"]
    parts = {part.stem: content for part in (folder / COMMITS).glob("*.json") if (content := _content(part))}
    prunable = sum(line["prunable_weights"] for line in lines)
    measured = {stage: parts[name]["result"] for stage in STAGES if (name := f"{stage}_perplexity") in parts}
    written = {stage: parts[name]["result"] for stage in STAGES if (name := f"{stage}_samples") in parts}
    texts = dict.fromkeys(text for of in measured.values() for text in of)
    summary = about | {
        "sparsity": 1 - sum(line["kept_weights"] for line in lines) / prunable if prunable else 0.0,
        "perplexity": {text: {stage: of[text] for stage, of in measured.items()} for text in texts},
        "continuations": about["continuations"]
        | {
            "stages": {stage: of["texts"] for stage, of in written.items() if "texts" in of},
            "left_out": next((of["left_out"] for of in written.values() if "left_out" in of), None),
        },
        "whole_model": {name: parts[name]["result"] for name in about["config"]["recover"].split("+") if name in parts},
        "seconds": max((part["clock"]["total"] for part in parts.values()), default=0.0),
    }
    return report_page(summary, lines, f"{len(lines)} of {about['blocks']} blocks are.")


def _content(part: Path) -> dict[str, Any] | None:
    record = unsealed(part)
    return record["content"] if record else None


def _lines(folder: Path) -> list[dict[str, Any]]:
    """The blocks that are finished; a last line that is not whole is one that is just being written."""
    if not (folder / LINES).is_file():
        return []
    text = ordinary(folder / LINES, LINES).read_text(encoding="utf-8")
    return [parse_json(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
