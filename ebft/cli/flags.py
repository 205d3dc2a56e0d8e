"""The flags of ``ebft run``, made from the sections of the settings and from all methods; and YAML files."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from cyclopts import Group, Parameter

from ebft.config import PRESETS, SECTIONS, EBFTConfig, flag, flat_name
from ebft.data.texts import check_texts
from ebft.errors import EBFTError, on_one_line
from ebft.files import ordinary
from ebft.registry import ALL, nearest

TITLES = {
    "model": "Model",
    "prune": "Pruning",
    "recover": "Recovery",
    "data": "Calibration text",
    "evaluate": "Evaluation",
    "runtime": "Device and memory",
    "output": "Output",
}


def groups() -> Iterator[tuple[str, list[dataclasses.Field[Any]]]]:
    """The settings by section, then those of each method; one that several methods have stands with the first."""
    seen: set[str] = set()
    for name, section in SECTIONS.items():
        yield TITLES[name], [*dataclasses.fields(section)]
        seen |= {flat_name(field) for field in dataclasses.fields(section)}
    for registry in ALL:
        for method in registry:
            fields = [field for field in dataclasses.fields(method.Settings) if flat_name(field) not in seen]
            seen |= {flat_name(field) for field in fields}
            if fields:
                yield f"{registry.flag} {method.name}", fields


def with_settings(
    command: Callable[..., Any], *, everything: bool, only: Collection[str] | None = None
) -> Callable[..., Any]:
    """``command(**given)`` as a command of cyclopts that takes settings; ``given`` are those that were said.

    Args:
        command: also has keyword arguments of its own, with annotations that cyclopts knows.
        everything: the help shows all settings, and not the basic ones alone.
        only: flat names of the settings that it takes (default: every one).
    """
    kinds = get_type_hints(command, include_extras=True)
    own = [
        p.replace(annotation=kinds[p.name])
        for p in inspect.signature(command).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    settings, defaults = [], "paper" if only is None else "default"
    for place, (title, fields) in enumerate(groups()):
        group = Group(title, sort_key=place + 1)
        settings += [
            _parameter(field, group, show=everything or field.metadata["basic"], defaults=defaults)
            for field in fields
            if only is None or flat_name(field) in only
        ]
    model = [p.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in settings if p.name == "model"]
    parameters = [*model, *own, *(p for p in settings if p.name != "model")]

    def run(*model: str | None, **given: Any) -> Any:
        if model:
            given["model"] = model[0]
        return command(**{name: value for name, value in given.items() if value is not None})

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _parameter(field: dataclasses.Field[Any], group: Group, *, show: bool, defaults: str) -> inspect.Parameter:
    """A flag that takes text, which the setting itself turns into what it is; nothing where it is not said."""
    meta, name, value = field.metadata, flat_name(field), field.default
    switch = isinstance(value, bool)
    pair = isinstance(value, tuple) and len(value) == 2 and all(isinstance(number, float) for number in value)
    kind: Any = bool if switch else tuple[str, str] if pair else str
    about = Parameter(
        name=flag(name),
        help=meta["help"] + _usual(meta["help"], value, defaults),
        group=group,
        show=show,
        show_default=False,
        allow_repeating=True,  # the last one counts, so that a flag can be put after those of a script
        negative=None if switch else (),
        metavar=None if switch else meta["metavar"] or _stands_for(field),
    )
    annotation = Annotated[kind | None, about]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _stands_for(field: dataclasses.Field[Any]) -> str:
    """What is shown in the place of a value."""
    if field.metadata["choices"]:
        return "|".join(field.metadata["choices"])
    kind = str(field.type)
    return "N" if kind.startswith(("int", "float", "tuple[float")) else "TEXT"


def _usual(help: str, value: Any, defaults: str) -> str:
    """The default, for the help, which calls it ``defaults``; those of the preset ``paper`` are the classes' own."""
    if value in (None, False, ()) or "default:" in help:
        return ""
    said = ",".join(map(str, value)) if isinstance(value, tuple) else "on" if value is True else str(value)
    return f" ({defaults}: {said})"


# --- from flags and files to settings -------------------------------------------------------------------------------


def config_of(preset: str | None = None, config: str | None = None, **given: Any) -> EBFTConfig:
    """The settings that a command line asks for.

    Later beats earlier: preset, then ``--config`` file, then flags. With no ``--preset`` it is ``best`` with
    ``--time``, ``paper`` where a model is named and ``demo`` where none is. A flag is meant,
    also where it says what is usual; a switch that is turned off asks for nothing.
    """
    settings = read_yaml(config) if config else {}
    preset = preset or settings.pop("preset", None)
    settings = {name: value for name, value in settings.items() if name != "preset"} | given
    meant = [name for name, value in given.items() if value is not False]
    usual = "best" if settings.get("time") else "paper" if settings.get("model") else "demo"
    made = EBFTConfig.preset(preset or usual, meant, **settings)
    check_texts(made)
    return made


def read_yaml(file: str) -> dict[str, Any]:
    """The settings in a YAML file, flat: its sections are taken apart; flat keys may stand beside them."""
    import yaml

    try:
        settings = yaml.safe_load(ordinary(Path(file).expanduser(), f"--config {file}").read_text(encoding="utf-8"))
    except RecursionError:
        raise EBFTError(f"--config {file} cannot be read: it is nested too deeply") from None
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:  # its constructors raise any
        raise EBFTError(f"--config {file} cannot be read: {on_one_line(error)}") from None
    if not isinstance(settings, dict):
        raise EBFTError(f"--config {file} holds {type(settings).__name__}; expected settings as 'name: value' lines")
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        name = str(name).replace("-", "_")
        if not isinstance(value, dict):
            flat[name] = value
            continue
        if name not in SECTIONS:
            raise EBFTError(
                f"--config {file} has a section {name!r}; expected {', '.join(SECTIONS)}{nearest(name, SECTIONS)}"
            )
        names = {field.name: flat_name(field) for field in dataclasses.fields(SECTIONS[name])}
        flat |= {names.get(key := str(of).replace("-", "_"), key): given for of, given in value.items()}
    if flat.get("trust_remote_code"):
        raise EBFTError(
            f"--config {file} has trust_remote_code; expected --trust-remote-code on the command line itself"
        )
    return flat


def presets() -> str:
    """The names of the presets, for the help."""
    return "|".join(PRESETS)
