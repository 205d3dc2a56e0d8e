"""The recipe of a run for people: the settings that are not the preset's, and the command that makes it again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ebft.config import closest_preset, flag
from ebft.model.locate import DEFAULT_MODEL
from ebft.output.figures import one_line, without_folder

_SAID_ELSEWHERE = {"model", "fused", "device"}


def changed_settings(summary: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The preset that the run is nearest to, and its settings that differ from that."""
    preset, changed = closest_preset(summary["config"])
    return preset, {name: without_folder(value) for name, value in changed.items() if name not in _SAID_ELSEWHERE}


def command_again(summary: dict[str, Any]) -> str:
    """The ``ebft run`` that makes the model again, on one line; paths are names alone."""
    preset, changed = changed_settings(summary)
    words = ["ebft", "run"]
    if summary["model"] != DEFAULT_MODEL:
        words.append(str(without_folder(summary["model"])))
    words += ["--preset", preset]
    for name, value in changed.items():
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
        elif name == "eval" and not value:
            words += [flag(name), "none"]
        elif value is not None and value != []:
            words += [flag(name), ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return shlex.join(map(one_line, words))


def next_commands(summary: dict[str, Any], *, finished: bool = True, out: str = "") -> list[tuple[str, str]]:
    """What most people do next, in words, and the command for it.

    Args:
        finished: the run is; otherwise the one thing to do is to go on with it.
        out: how the folder is called (default: its name alone).
    """
    if not finished:
        output = [] if Path(summary["output"]).name == "ebft-output" else ["--output", Path(summary["output"]).name]
        return [("Go on with this run:", f"{command_again(summary)} {shlex.join([*output, '--resume'])}")]
    folder = shlex.quote(one_line(out or Path(summary["output"]).name))
    dense = shlex.quote(one_line(without_folder(summary["model"]) if not out else summary["model"]))
    commands = [("Compare its text with the dense model's:", f"ebft sample {folder} --against {dense}")]
    if not summary["config"].get("uniform"):
        commands.append(("Store it without its zeros:", f"ebft compress {folder} {folder}-compressed"))
    return [
        *commands,
        ("Check that the folder is sound:", f"ebft audit {folder}"),
        ("Upload it to the hub:", f"ebft push {folder} USER/REPO --private"),
        ("Make it again:", command_again(summary)),
    ]
