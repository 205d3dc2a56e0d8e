"""The figures of a run for people: what the terminal, the page and the model card show alike."""

from __future__ import annotations

from math import isfinite, log
from pathlib import Path
from typing import Any
from unicodedata import category

STAGES = ("dense", "pruned", "recovered")
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"}


def perplexity_table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: of the stages that were measured, and what recovery won back where there was one."""
    measured = [stage for stage in STAGES if any(stage in values for values in summary["perplexity"].values())]
    both = measured == [*STAGES]
    rows = [
        [text, *(number(values[stage]) for stage in measured), *([won_back(values)] if both else [])]
        for text, values in summary["perplexity"].items()
    ]
    return ["perplexity", *measured, *(["won back"] if both else [])], rows


def recovered_share(values: dict[str, float]) -> float | None:
    """Share of the lost log-perplexity that recovery won back; None where pruning lost nothing."""
    if not all(isfinite(values[stage]) for stage in STAGES) or values["pruned"] <= values["dense"]:
        return None
    return log(values["pruned"] / values["recovered"]) / log(values["pruned"] / values["dense"])


def zero_shot_rows(summary: dict[str, Any]) -> list[list[str]]:
    """Of every zero-shot task and metric: task, questions, metric, value, standard error."""
    rows = []
    for task, values in summary["zero_shot"].items():
        for name, value in metrics_of(values).items():
            metric, comma, kind = name.partition(",")
            error = values.get(f"{metric}_stderr{comma}{kind}")
            said = "-" if error is None else f"{error:.3g}"
            rows.append([without_folder(task), str(values.get("documents", "-")), name, f"{value:.4g}", said])
    return rows


def metrics_of(values: dict[str, float]) -> dict[str, float]:
    """Without standard errors and counts."""
    return {name: value for name, value in values.items() if name != "documents" and "_stderr" not in name}


def won_back(values: dict[str, float]) -> str:
    """``recovered_share`` for people."""
    share = recovered_share(values)
    return "-" if share is None else f"{share:.0%}"


def plain_merge(summary: dict[str, Any]) -> str:
    """What merging adapters without the masks would have given, in a sentence; nothing where there were none."""
    entry = next((of for of in summary["whole_model"].values() if "plain_merge" in of), None)
    if entry is None:
        return ""
    merged, masked = entry["plain_merge"], summary["config"].get("lora_masked", True)
    figures = ", ".join(f"{number(value)} on {text}" for text, value in merged["perplexity"].items())
    return (
        f" The plain merge of the adapters, which fills the zeros and was not saved, would be {merged['sparsity']:.2%} "
        f"sparse{f', of perplexity {figures}' if figures else ''}; the adapters were tuned "
        f"{'under the masks, as they were merged' if masked else 'without masks'}."
    )


def held_out(entry: dict[str, Any]) -> str:
    """What a recovery of the whole model came to on the sequences that were held out, in words; nothing without any."""
    if entry["held_out_before"] is None:
        return ""
    figures = {"loss": [entry["held_out_before"], entry["held_out_after"]], **entry["held_out_parts"]}
    said = ", ".join(f"{name} {before:.3f} before and {after:.3f} after" for name, (before, after) in figures.items())
    return f"on held-out sequences, nats a token: {said}"


def text_samples(summary: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Of every prompt: what each stage's model wrote after it."""
    of = summary["continuations"]
    stages = [stage for stage in STAGES if stage in of["stages"]]
    if not stages:
        return []
    return [
        (prompt, [(stage, of["stages"][stage][place]) for stage in stages])
        for place, prompt in enumerate(of["prompts"])
    ]


def one_line(value: Any) -> str:
    """``value`` as text without line ends and characters that cannot be seen or stored."""
    return " ".join("".join(" " if category(letter) in _UNSEEN else letter for letter in str(value)).split())


def number(value: float) -> str:
    """A perplexity for people."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """``75`` as ``1 min 15 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def size(number: int) -> str:
    """Bytes for people: ``1.20 GiB``, ``257 MiB``."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.3g} MiB"


def memory(peak: dict[str, int | None]) -> str:
    """Peak memory of the host, in a few words."""
    resident, anonymous = (None if size is None else f"{size / 2**30:.2f} GiB" for size in peak.values())
    return f"{resident} resident{f' ({anonymous} anonymous)' if anonymous else ''}"


def without_folder(value: Any) -> Any:
    """The name of a file or folder of this machine, in place of its path; of several too, joined by commas."""
    if not isinstance(value, str):
        return value
    return ",".join(_name_alone(part) for part in value.split(","))


def _name_alone(part: str) -> str:
    kind, colon, path = part.rpartition(":") if part.startswith("local:") else ("", "", part)
    return kind + colon + (Path(path).name or path if Path(path).is_absolute() else path)
