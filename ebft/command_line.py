"""The command line and the YAML file of ``python -m ebft.run``, made from the fields of ``EBFTConfig``."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ebft.config import PRESETS, EBFTConfig, flag
from ebft.devices import DEVICES, HERE
from ebft.errors import EBFTError
from ebft.files import ordinary


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
    for setting in dataclasses.fields(EBFTConfig):
        _add_flag(parser, setting)
    given = vars(parser.parse_args(argv))
    preset, file, plan = given.pop("preset"), given.pop("config"), given.pop("plan")
    settings = _read_yaml(file) if file else {}
    from_file = settings.pop("preset", None)
    preset = preset or from_file
    settings.update({name: value for name, value in given.items() if value is not None})
    return EBFTConfig.preset(preset or ("paper" if settings.get("model") else "demo"), **settings), plan


class _Parser(argparse.ArgumentParser):
    """argparse, with errors in the sentence that every other error has."""

    def error(self, message: str) -> typing.NoReturn:
        raise EBFTError(message)


def _add_flag(parser: argparse.ArgumentParser, setting: dataclasses.Field[Any]) -> None:
    meta, value = setting.metadata, setting.default
    said = " ".join(map(str, value)) if isinstance(value, tuple) else "on" if value is True else str(value)
    unsaid = value is None or value is False or value == "" or "default:" in meta["help"]
    default = "" if unsaid else f" (paper: {said})"
    options: dict[str, Any] = {"default": None, "help": meta["help"].replace("%", "%%") + default}
    if isinstance(setting.default, bool):
        options["action"] = argparse.BooleanOptionalAction
    elif setting.name == "betas":
        options |= {"nargs": 2, "metavar": ("BETA1", "BETA2")}
    elif meta["choices"]:
        options["metavar"] = "|".join(meta["choices"])
    elif meta["metavar"]:
        options["metavar"] = meta["metavar"]
    parser.add_argument(flag(setting.name), **options)


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(ordinary(Path(file).expanduser(), f"--config {file}").read_text(encoding="utf-8"))
    except RecursionError:
        raise EBFTError(f"--config {file} cannot be read: it is nested too deeply") from None
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:  # its constructors raise any
        raise EBFTError(f"--config {file} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise EBFTError(f"--config {file} holds {type(settings).__name__}; expected settings as 'name: value' lines")
    settings = {str(name).replace("-", "_"): value for name, value in settings.items()}
    if settings.get("trust_remote_code"):
        raise EBFTError(
            f"--config {file} has trust_remote_code; expected --trust-remote-code on the command line itself"
        )
    return settings
