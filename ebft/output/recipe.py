"""The recipe of a run for people: the settings that are not the preset's, and the command that makes it again."""

from __future__ import annotations

import shlex
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
