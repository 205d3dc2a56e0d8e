"""The command line and the YAML file of ``ebft run``, made from the sections of the settings and from all methods."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ebft.config import PRESETS, SECTIONS, EBFTConfig, flag, flat_name
from ebft.errors import EBFTError
from ebft.plan.devices import DEVICES, HERE
from ebft.registry import ALL


def parse_args(argv: Sequence[str] | None = None) -> tuple[EBFTConfig, str | None]:
    """The run that a command line asks for; and where only its plan is wanted (``--plan``), on which device.

    Later beats earlier: preset, then ``--config`` file, then flags. With no ``--preset`` it is ``paper`` where a
    model is named and ``demo`` where none is.
    """
    parser = _Parser(
        prog="python -m ebft.run",
        description="Prune a decoder and win its quality back, block by block.",
        allow_abbrev=False,
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), help="starting settings (default: paper; no model: demo)")
    parser.add_argument("--config", metavar="FILE.yaml", help="settings from a YAML file, over the preset's")
    parser.add_argument(
        "--plan",
        nargs="?",
        const=HERE,
        choices=(HERE, *DEVICES),
        metavar="|".join((HERE, *DEVICES)),
        help="print what the run would need on this machine or on a named GPU, and stop",
    )
    for title, fields in groups():
        group = parser.add_argument_group(title)
        for field in fields:
            _add_flag(group, field)
    given = vars(parser.parse_args(argv))
    preset, file, plan = given.pop("preset"), given.pop("config"), given.pop("plan")
    settings = read_yaml(file) if file else {}
    from_file = settings.pop("preset", None)
    preset = preset or from_file
    settings.update({name: value for name, value in given.items() if value is not None})
    return EBFTConfig.preset(preset or ("paper" if settings.get("model") else "demo"), **settings), plan


def groups() -> Iterator[tuple[str, list[dataclasses.Field[Any]]]]:
    """The settings by section, then those of each method; one that several methods have stands with the first."""
    seen: set[str] = set()
    for name, section in SECTIONS.items():
        yield name, [*dataclasses.fields(section)]
        seen |= {flat_name(field) for field in dataclasses.fields(section)}
    for registry in ALL:
        for method in registry:
            fields = [field for field in dataclasses.fields(method.Settings) if flat_name(field) not in seen]
            seen |= {flat_name(field) for field in fields}
            if fields:
                yield f"{registry.flag} {method.name}", fields


class _Parser(argparse.ArgumentParser):
    """argparse, with errors in the sentence that every other error has."""

    def error(self, message: str) -> typing.NoReturn:
        raise EBFTError(message)


def _add_flag(parser: Any, setting: dataclasses.Field[Any]) -> None:
    meta, value = setting.metadata, setting.default
    said = " ".join(map(str, value)) if isinstance(value, tuple) else "on" if value is True else str(value)
    unsaid = value is None or value is False or value == () or "default:" in meta["help"]
    default = "" if unsaid else f" (paper: {said})"
    options: dict[str, Any] = {
        "default": None,
        "dest": flat_name(setting),
        "help": meta["help"].replace("%", "%%") + default,
    }
    if isinstance(setting.default, bool):
        options["action"] = argparse.BooleanOptionalAction
    elif setting.name == "betas":
        options |= {"nargs": 2, "metavar": ("BETA1", "BETA2")}
    elif meta["choices"]:
        options["metavar"] = "|".join(meta["choices"])
    elif meta["metavar"]:
        options["metavar"] = meta["metavar"]
    parser.add_argument(flag(flat_name(setting)), **options)


def read_yaml(file: str) -> dict[str, Any]:
    """The settings in a YAML file, flat: sections of it are taken apart."""
    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise EBFTError(f"--config {file} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise EBFTError(f"--config {file} holds {type(settings).__name__}; expected settings as 'name: value' lines")
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        name = str(name).replace("-", "_")
        if name in SECTIONS and isinstance(value, dict):
            names = {field.name: flat_name(field) for field in dataclasses.fields(SECTIONS[name])}
            flat |= {names.get(key := str(of).replace("-", "_"), key): given for of, given in value.items()}
        else:
            flat[name] = value
    return flat
