"""Every setting of a run: sections by concern, and the settings of the methods that are chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ebft.config.fields import flag, flat_name
from ebft.config.presets import IF_UNIFORM, PRESETS
from ebft.config.sections import SECTIONS, Data, Evaluate, Model, Output, Prune, Recover, Runtime
from ebft.errors import EBFTError
from ebft.registry import ALL, criteria, nearest, recoveries, refinements

S = TypeVar("S")
_BY_KIND = {registry.kind: registry for registry in ALL}


@dataclass(frozen=True)
class EBFTConfig:
    """Every setting of one run.

    Three ways to make one: by sections, ``EBFTConfig(prune=Prune(sparsity=0.6))``; by flat names, those of the command
    line, ``EBFTConfig.of(sparsity=0.6, lr=1e-3)``; or from a preset, ``EBFTConfig.preset("paper", sparsity=0.5)``.
    Values are checked when the object is made.

    Attributes:
        methods: the settings of the methods that the sections choose, an object of each one's ``Settings``; those that
            are not given have their defaults.

    Raises:
        EBFTError: a value is out of bounds, two settings do not go together, or settings are of a method that is not
            chosen.
    """

    model: Model = field(default_factory=Model)
    prune: Prune = field(default_factory=Prune)
    recover: Recover = field(default_factory=Recover)
    data: Data = field(default_factory=Data)
    evaluate: Evaluate = field(default_factory=Evaluate)
    runtime: Runtime = field(default_factory=Runtime)
    output: Output = field(default_factory=Output)
    methods: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        given, made = list(self.methods), dict[type, Any]()
        for method in _chosen(self.prune, self.recover, given):
            own = next((settings for settings in given if type(settings) is method.Settings), None)
            made[method.Settings] = method.Settings() if own is None else own
        for settings in given:
            if type(settings) not in made:
                raise EBFTError(_of_another(_owners_of(type(settings)), self.prune, self.recover))
        object.__setattr__(self, "methods", tuple(made.values()))
        if self.recover.holdout and self.data.samples < 2:
            raise EBFTError(f"--holdout is {self.recover.holdout:g} of 1 sequence; expected --samples 2 or more")
        for method in self.chosen:
            if hasattr(method, "check"):
                method.check(self)

    # --- the methods ------------------------------------------------------------------------------------------------

    @property
    def chosen(self) -> list[Any]:
        """The classes of the methods that the settings choose, and of those that these use."""
        return list(_chosen(self.prune, self.recover, list(self.methods)))

    def of_method(self, kind: type[S]) -> S:
        """The settings of a method that is chosen, by their class."""
        return next(settings for settings in self.methods if type(settings) is kind)

    @property
    def whole_model_recoveries(self) -> tuple[str, ...]:
        """Those of ``recover`` that follow the walk, and hold the whole model in memory."""
        return tuple(name for name in self.recover.names if recoveries[name].scope == "model")

    @property
    def block_recoveries(self) -> tuple[str, ...]:
        """Those of them that are a part of the walk."""
        return tuple(name for name in self.recover.names if recoveries[name].scope == "block")

    # --- by flat names ----------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, _defaults: Mapping[str, Any] | None = None, /, **settings: Any) -> EBFTConfig:
        """From flat names; of ``_defaults`` those that belong to no chosen method do not count."""
        unknown = sorted(settings.keys() - all_flat_names())
        if unknown:
            close = nearest(unknown[0], all_flat_names()) or f"; expected one of {', '.join(sorted(all_flat_names()))}"
            raise EBFTError(f"there is no setting {unknown[0]!r}{close}")
        values = {**(_defaults or {}), **settings}
        sections = {
            name: section(
                **{f.name: values[flat_name(f)] for f in dataclasses.fields(section) if flat_name(f) in values}
            )
            for name, section in SECTIONS.items()
        }
        taken = {flat_name(f) for section in SECTIONS.values() for f in dataclasses.fields(section)}
        made: list[Any] = []
        for method in _chosen(sections["prune"], sections["recover"], made):
            fields = {flat_name(f): f.name for f in dataclasses.fields(method.Settings)}
            made.append(method.Settings(**{fields[name]: values[name] for name in fields if name in values}))
            taken |= fields.keys()
        for name in sorted(settings.keys() - taken):
            owners = [method for registry in ALL for method in registry if name in _flat_names_of(method.Settings)]
            raise EBFTError(f"{flag(name)} is {_of_another(owners, sections['prune'], sections['recover'])}")
        return cls(**sections, methods=tuple(made))

    @classmethod
    def preset(cls, name: str, /, **settings: Any) -> EBFTConfig:
        """The preset's settings, with ``settings``, by flat names, put over them."""
        return cls.of(preset_settings(name, uniform=bool(settings.get("uniform"))), **settings)

    def replace(self, **settings: Any) -> EBFTConfig:
        """The same with some of the settings changed, by flat names."""
        return EBFTConfig.of(self.flat(), **settings)

    def flat(self) -> dict[str, Any]:
        """Flat name -> value: plain ones, for JSON, YAML and the model card; of the methods, those that are chosen."""
        parts = [*(getattr(self, name) for name in SECTIONS), *self.methods]
        found = {flat_name(f): getattr(part, f.name) for part in parts for f in dataclasses.fields(part)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    # --- a schedule -------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> tuple[EBFTConfig, ...]:
        """The runs of ``--schedule``, in order; each begins with the ``output`` of the one before."""
        shares = self.prune.schedule or (self.prune.sparsity,)
        folder = Path(self.output.folder).with_name(Path(self.output.folder).name + ".schedule")
        between = [
            self.replace(
                schedule=shares[: place + 1],
                output=str(folder / f"{share:g}"),
                overwrite=self.output.overwrite or not self.output.resume,  # an interrupted run's, which starts over
            )
            for place, share in enumerate(shares[:-1])
        ]
        return (*between, self)


# Where things are and how the work is organised: the same results whatever these are.
ORGANISATION = frozenset(
    {"output", "overwrite", "resume", "streams", "gpu_memory", "host_memory", "max_shard_size", "trust_remote_code"}
)


def preset_settings(name: str, *, uniform: bool = False) -> dict[str, Any]:
    """The flat settings of a preset; ``uniform``: with ``--uniform``."""
    if name not in PRESETS:
        raise EBFTError(f"--preset is {name!r}; expected one of {', '.join(PRESETS)}{nearest(name, PRESETS)}")
    return {**PRESETS[name], **(IF_UNIFORM.get(name, {}) if uniform else {})}


def _chosen(prune: Prune, recover: Recover, made: Iterable[Any]) -> Iterator[Any]:
    """The classes of the methods that are chosen, each before those that it uses.

    Args:
        made: settings of methods; those of a method that uses others are looked up there once it has been given.
    """
    if prune.criterion in criteria:
        yield criteria[prune.criterion]
    elif prune.criterion != "zeros" and not Path(prune.criterion).expanduser().is_file():
        raise EBFTError(
            f"--prune is {prune.criterion!r}; expected {', '.join(criteria.names())}, zeros or an existing file of "
            f"masks{nearest(prune.criterion, criteria.names())}"
        )
    if prune.refine != "none":
        yield refinements[prune.refine]
    used = dict[Any, None]()
    for name in _in_order(recover.method):
        method = recoveries[name]
        yield method
        settings = next((of for of in made if type(of) is method.Settings), None) or method.Settings()
        for kind, other in getattr(method, "uses", lambda _: ())(settings):
            used[_BY_KIND[kind][other]] = None
    yield from used


def _in_order(recover: str) -> list[str]:
    """The names that a sum of recoveries is made of."""
    names = recover.split("+")
    for name in names:
        if name != "none":
            recoveries[name]  # which says what is wrong with it
    by_scope = [method.name for scope in ("block", "model") for method in recoveries if method.scope == scope]
    if [name for name in by_scope if name in names] != names and names != ["none"]:
        raise EBFTError(
            f"--recover is {recover!r}; expected none, or one or more of {', '.join(by_scope)} in this order, "
            "joined by +"
        )
    return [] if names == ["none"] else names


def _of_another(owners: list[Any], prune: Prune, recover: Recover) -> str:
    """Says that settings are of methods that are not chosen."""
    first = owners[0]
    registry = _BY_KIND[first.kind]
    names = " or ".join(method.name for method in owners)
    chosen = {"--prune": prune.criterion, "--refine": prune.refine, "--recover": recover.method}.get(registry.flag)
    given = f"and {registry.flag} is {chosen}" if chosen else f"which --recover {recover.method} does not use"
    return f"a setting of {registry.flag} {names}, {given}; expected {registry.flag} {first.name}, or no such setting"


def _owners_of(settings: type) -> list[Any]:
    return [method for registry in ALL for method in registry if method.Settings is settings]


def _flat_names_of(settings: type) -> set[str]:
    return {flat_name(f) for f in dataclasses.fields(settings)}


def all_flat_names() -> frozenset[str]:
    """Of every setting of a section and of every method that is registered."""
    kinds = [*SECTIONS.values(), *(method.Settings for registry in ALL for method in registry)]
    return frozenset(name for kind in kinds for name in _flat_names_of(kind))
