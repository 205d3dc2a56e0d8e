"""``report.html``: one self-contained page about a run, finished or not; its template is page.html."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ebft.output.charts import (
    Chart,
    a_bar_a_block,
    block_errors,
    block_losses,
    chart,
    perplexity_bars,
    sparsity_map,
    whole_losses,
)
from ebft.output.figures import (
    STAGES,
    duration,
    held_out,
    memory,
    number,
    one_line,
    perplexity_table,
    plain_merge,
    size,
    text_samples,
    without_folder,
    won_back,
    zero_shot_rows,
)
from ebft.output.recipe import changed_settings, next_commands
from ebft.registry import recoveries

HARDLY = 0.1  # of its error, that a block has to lose to count as recovered
EVEN = 0.005  # that sparsities may differ by, and still be called the same

_PAGE = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def report_page(summary: dict[str, Any], blocks: list[dict[str, Any]], unfinished: str = "") -> str:
    """The page.

    Args:
        summary: what ``ebft_summary.json`` holds.
        blocks: the lines of ``blocks.jsonl``.
        unfinished: of a run that goes on, how far it is, in a sentence.
    """
    wholes, (headings, figures) = summary["whole_model"], perplexity_table(summary)
    noted = [(block["name"], block["notes"]) for block in blocks] + [(name, of["notes"]) for name, of in wholes.items()]
    preset, changed = changed_settings(summary)
    name = without_folder(summary["model"])
    return _PAGE.get_template("page.html").render(
        summary=summary,
        name=name,
        unfinished=unfinished,
        headline=_headline(summary),
        facts=_facts(summary),
        headings=headings,
        figures=[[without_folder(text), *cells] for text, *cells in figures],
        bars=[bars for text, of in summary["perplexity"].items() if (bars := _bars(text, of))],
        zero_shot=zero_shot_rows(summary),
        samples=text_samples(summary),
        left_out=summary["continuations"]["left_out"],
        remarks=_remarks(blocks) or ([] if wholes else ["No recovery was asked for."]),
        curves=[*_of_blocks(blocks), *(_of_the_whole(summary, name) for name in wholes)],
        costs=_costs(blocks),
        sparsity=_sparsity(blocks),
        even=f"Every matrix is {summary['sparsity']:.1%} sparse.",
        notes=[(of, note) for of, notes in noted for note in notes],
        commands=next_commands(summary, finished=not unfinished),
        preset=preset,
        settings=[[setting, value] for setting, value in changed.items()] or [["none", ""]],
        rows=[_row(block) for block in blocks],
        versions=_versions(summary["versions"]),
        text=_text(summary["calibration"]),
        memory=memory,
    )


# --- in words -------------------------------------------------------------------------------------------------------


def _headline(summary: dict[str, Any]) -> str:
    for text, values in summary["perplexity"].items():
        said = ", ".join(f"{number(values[stage])} {stage}" for stage in STAGES if stage in values)
        won = won_back(values) if all(stage in values for stage in STAGES) else "-"
        begin = f"Recovery won back {won} of what pruning lost: perplexity"
        if won.startswith("-"):  # nothing was lost, or more after it
            begin = "Perplexity"
        if said:
            return f"{begin} on {without_folder(text)} is {said}. The recipe: {summary['recipe']}."
    return f"The recipe: {summary['recipe']}."


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    sizes = summary["size"]
    facts = [("sparsity", f"{summary['sparsity']:.2%}")]
    for text, values in list(summary["perplexity"].items())[:1]:
        if all(stage in values for stage in STAGES):
            facts.append((f"won back, {without_folder(text)}", won_back(values)))
    if sizes["saved"]:
        facts.append(("size, dense", size(sizes["dense"])))
        facts.append(("size, saved", size(sizes["saved"])))
        facts += [("size without zeros, about", size(sizes["compressed"]))] if sizes["compressed"] else []
    return [*facts, ("time", duration(summary["seconds"]))]


def _remarks(blocks: Sequence[dict[str, Any]]) -> list[str]:
    """What is to be said of the blocks' errors; nothing where none was recovered."""
    recovered = [block for block in blocks if block["relative_error_after"] is not None]
    if not recovered:
        return []
    before, after = (_mean(block[f"relative_error_{when}"] for block in recovered) for when in ("before", "after"))
    said = [f"On average recovery brought a block's error from {before:.3g} to {after:.3g} of its targets' energy."]
    hardly = [b for b in recovered if b["relative_error_after"] > (1 - HARDLY) * b["relative_error_before"]]
    if hardly:
        one = len(hardly) == 1
        said.append(
            f"Block{'' if one else 's'} {_ranges([b['block'] for b in hardly])} hardly recovered: "
            f"{'its error' if one else 'their errors'} fell by less than {HARDLY:.0%}. More epochs, more calibration "
            "samples, a lower sparsity for them (--allocation), or --recover ebft+distill may help."
        )
    return said


def _mean(numbers: Iterable[float]) -> float:
    values = list(numbers)
    return sum(values) / len(values)


def _ranges(numbers: Sequence[int]) -> str:
    """``[1, 2, 3, 7]`` as ``1 to 3 and 7``."""
    runs: list[list[int]] = []
    for value in numbers:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    words = [f"{run[0]} to {run[-1]}" if len(run) > 2 else " and ".join(map(str, run)) for run in runs]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _versions(versions: dict[str, Any]) -> str:
    named = [f"{name} {versions[name]}" for name in ("ebft", "python", "torch", "transformers") if name in versions]
    place = f" on {versions['device']}" if "device" in versions else ""
    count = versions.get("threads")
    threads = f" with {count} thread{'' if count == 1 else 's'}" if count else ""
    return f"Made by {', '.join(named)}{place}{threads}."


def _text(use: dict[str, Any] | None) -> str:
    return f"{use['tokens']} tokens of {without_folder(use['source'])} ({use['windows']})" if use else ""


def _row(block: dict[str, Any]) -> list[Any]:
    before, after = block["relative_error_before"], block["relative_error_after"]
    errors = ["-" if error is None else f"{error:.3g}" for error in (before, after)]
    seconds, peak = f"{block['seconds']:.1f}", size(block["peak_memory_bytes"])
    return [block["block"], f"{block['sparsity']:.1%}", *errors, seconds, peak]


# --- in pictures ----------------------------------------------------------------------------------------------------


def _over(draw: Any, blocks: Sequence[dict[str, Any]], *more: Any) -> Any:
    return lambda axes: draw(axes, blocks, *more)


def _bars(text: str, values: dict[str, float]) -> Chart | None:
    return perplexity_bars(one_line(without_folder(text)), values) if len(values) > 1 else None


def _of_blocks(blocks: Sequence[dict[str, Any]]) -> list[Chart]:
    """Of the recoveries in the walk; those that take no steps have no losses."""
    recovered = [block for block in blocks if block["relative_error_after"] is not None]
    tuned = [block for block in recovered if block["losses"]]
    errors = partial(
        chart,
        "Reconstruction error, block by block",
        "Mean squared error against the targets, relative to how far these are from the block's inputs.",
    )
    losses = partial(
        chart,
        "Loss while blocks are tuned",
        "Each block's loss over its own start: the median of all blocks, the middle half of them, and all.",
    )
    return [
        *([errors(_over(block_errors, recovered))] if recovered else []),
        *([losses(_over(block_losses, tuned))] if tuned else []),
    ]


def _of_the_whole(summary: dict[str, Any], name: str) -> Chart:
    entry, loss = summary["whole_model"][name], recoveries[name].loss
    merged = plain_merge(summary) if "plain_merge" in entry else ""
    note = f"Of the whole model, nats a token, before each step.{merged}"
    if told := held_out(entry):
        note += f" {told[:1].upper()}{told[1:]}."
    return chart(f"{loss[:1].upper()}{loss[1:]} ({name})", note, partial(whole_losses, losses=entry["losses"]))


def _costs(blocks: Sequence[dict[str, Any]]) -> list[Chart]:
    if not blocks:
        return []
    return [
        chart("Seconds per block", "Pruning, recovery and saving.", _over(a_bar_a_block, blocks, "seconds", 1.0, "s")),
        chart(
            "Peak memory per block",
            "Of the GPU's allocator; on a CPU, of the whole process so far.",
            _over(a_bar_a_block, blocks, "peak_memory_bytes", 2.0**30, "GiB"),
        ),
    ]


def _sparsity(blocks: Sequence[dict[str, Any]]) -> Chart | None:
    """Of every matrix; nothing where it is the same for all."""
    shares = [share for block in blocks for share in block["matrices"].values()]
    if not shares or max(shares) - min(shares) <= EVEN:
        return None
    return chart("Sparsity per layer", "Pruned share of each matrix.", _over(sparsity_map, blocks))
