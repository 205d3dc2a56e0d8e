"""Every setting of a run: sections by concern, and the settings of the methods that are chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ebft.config.fields import Needs, check_name, flag, flat_name, is_file
from ebft.config.presets import IF_UNIFORM, PRESETS
from ebft.config.sections import SECTIONS, Data, Evaluate, Model, Output, Prune, Recover, Runtime, rising_shares
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
                parts = [self.prune, self.recover, *made.values()]
                raise EBFTError(f"methods holds {_of_another(_owners_of(type(settings)), parts)}")
        object.__setattr__(self, "methods", tuple(made.values()))
        if self.recover.holdout and self.data.samples < 2:
            raise EBFTError(f"--holdout is {self.recover.holdout:g} of 1 sequence; expected --samples 2 or more")
        if self.runtime.time and self.prune.schedule:
            raise EBFTError("--time is of one run, and --schedule makes several; expected one of them")
        self._check_names()
        for method in self.chosen:
            if hasattr(method, "check"):
                method.check(self)

    def _check_names(self) -> None:
        """Files can have the names that are looked for."""
        named: dict[str, Iterable[str | None]] = {
            "--model": [self.model.source],
            "--teacher": [self.model.teacher],
            "--prune": [self.prune.criterion],
            "--allocation": [self.prune.allocation],
            "--eval": self.evaluate.texts,
            "--calibration": self.data.parts,
            "--prompts": [self.evaluate.prompts],
        }
        for said, names in named.items():
            for name in names:
                check_name(said, name or "")

    def _check_effects(self, given: Collection[str]) -> None:
        """``EBFTError`` if one of the settings that were given changes nothing, as the others are."""
        fields = {flat_name(f): f for kind in self._kinds() for f in dataclasses.fields(kind)}
        idle = [name for name, field in fields.items() if name in given and not self.has_effect(name)]
        if not idle:
            return
        needs: Needs = fields[idle[0]].metadata["needs"]
        alike = [name for name in idle if fields[name].metadata["needs"] is needs]
        has, they_need = ("has", "it needs") if len(alike) == 1 else ("have", "they need")
        said = {name: said_of(name, value) for name, value in self.flat().items()}
        raise EBFTError(
            f"{' '.join(said[name] for name in alike)} {has} no effect with "
            f"{' '.join(said.get(name, flag(name)) for name in needs.of)}: {they_need} {needs.said}"
        )

    def has_effect(self, name: str) -> bool:
        """Whether the results, or what a run asks of the machine, can depend on this setting, as the others are."""
        fields = (f for kind in self._kinds() for f in dataclasses.fields(kind))
        needs: Needs | None = next(f for f in fields if flat_name(f) == name).metadata["needs"]
        return needs is None or needs.met(self)

    def _kinds(self) -> list[type]:
        """Of all settings that there are: the sections, and those of the chosen methods."""
        return [*SECTIONS.values(), *(type(settings) for settings in self.methods)]

    # --- what follows from them -------------------------------------------------------------------------------------

    @property
    def by_criterion(self) -> bool:
        """Whether pruning chooses, and takes neither zeros nor masks that are there already."""
        return self.prune.criterion in criteria

    @property
    def looks_at_activations(self) -> bool:
        """Whether pruning wants statistics of what flows through the model."""
        if self.prune.refine != "none" or (self.by_criterion and self.prune.allocation == "owl"):
            return True
        if not self.by_criterion:
            return False
        criterion = criteria[self.prune.criterion]
        if self.prune.structured:
            return not self.prune.uniform or bool(criterion.units_need)
        return bool(criterion.needs)

    @property
    def uses_text(self) -> bool:
        """Whether anything is done with the calibration text."""
        return self.looks_at_activations or bool(self.recover.names)

    @property
    def asked_sparsity(self) -> float | None:
        """The share of all weights that is to be pruned; None where masks or a file of shares say it."""
        says = self.by_criterion and self.prune.allocation in ("uniform", "owl")
        return self.prune.mask_pattern.sparsity if says else None

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

    @property
    def goes_by_time(self) -> bool:
        """Whether one of the recoveries takes the time that it is given."""
        return any(recoveries[name].goes_by_time for name in self.recover.names)

    # --- by flat names ----------------------------------------------------------------------------------------------

    @classmethod
    def of(
        cls, _defaults: Mapping[str, Any] | None = None, _meant: Collection[str] = (), /, **settings: Any
    ) -> EBFTConfig:
        """From flat names.

        Args:
            _defaults: those of them that belong to no chosen method do not count.
            _meant: names of ``settings`` that are refused without an effect whatever their value is; others are where
                it is not the usual one.
        """
        defaults = _defaults or {}
        unknown = sorted(settings.keys() - all_flat_names())
        if unknown:
            close = nearest(unknown[0], all_flat_names()) or f"; expected one of {', '.join(sorted(all_flat_names()))}"
            raise EBFTError(f"there is no setting {unknown[0]!r}{close}")
        values = {**defaults, **settings}
        if values.get("schedule") is not None and "sparsity" not in settings:
            values["sparsity"] = rising_shares(values["schedule"])[-1]
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
            if name in _meant or not _is_usual(name, settings[name], defaults):
                owners = [method for registry in ALL for method in registry if name in _flat_names_of(method.Settings)]
                raise EBFTError(f"{flag(name)} is {_of_another(owners, [*sections.values(), *made])}")
        config = cls(**sections, methods=tuple(made))
        flat = config.flat()
        given = {n for n in settings if n in flat and (n in _meant or not _is_usual(n, flat[n], defaults))}
        if flat.keys() <= settings.keys():  # of all of them at once nobody says which are meant
            given &= set(_meant)
        config._check_effects(given)
        return config

    @classmethod
    def preset(cls, name: str, _meant: Collection[str] = (), /, **settings: Any) -> EBFTConfig:
        """The preset's settings, with ``settings``, by flat names, put over them; ``_meant`` as in ``of``."""
        return cls.of(preset_settings(name, uniform=bool(settings.get("uniform"))), _meant, **settings)

    def replace(self, **settings: Any) -> EBFTConfig:
        """The same with some of the settings changed, by flat names."""
        flat = self.flat()
        if "sparsity" not in settings and "schedule" in settings:
            del flat["sparsity"]
        return EBFTConfig.of(flat, **settings)

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
                sparsity=share,
                output=str(folder / f"{share:g}"),
                overwrite=self.output.overwrite or not self.output.resume,  # an interrupted run's, which starts over
            )
            for place, share in enumerate(shares[:-1])
        ]
        return (*between, self)


# Where things are and how the work is organised: the same results whatever these are.
ORGANISATION = frozenset(
    {
        "output",
        "overwrite",
        "resume",
        "streams",
        "gpu_memory",
        "host_memory",
        "max_shard_size",
        "log",
        "trust_remote_code",
    }
)


def preset_settings(name: str, *, uniform: bool = False) -> dict[str, Any]:
    """The flat settings of a preset; ``uniform``: with ``--uniform``."""
    if name not in PRESETS:
        raise EBFTError(f"--preset is {name!r}; expected one of {', '.join(PRESETS)}{nearest(name, PRESETS)}")
    return {**PRESETS[name], **(IF_UNIFORM.get(name, {}) if uniform else {})}


def closest_preset(flat: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The preset that flat settings differ from in the fewest places, and the settings in which they do.

    Where things are and how the work is organised does not count.
    """
    of_run = {setting: value for setting, value in flat.items() if setting not in ORGANISATION}
    of_nobody = {name for name, value in of_run.items() if not _is_usual(name, value, {})}
    differing = {}
    for name in PRESETS:
        usual = preset_settings(name, uniform=bool(flat.get("uniform")))
        differing[name] = {
            n: value
            for n, value in of_run.items()
            if (not _is_usual(n, value, usual) if n in usual else n in of_nobody)
        }
    closest = min(differing, key=lambda name: len(differing[name]))
    return closest, differing[closest]


def _chosen(prune: Prune, recover: Recover, made: Iterable[Any]) -> Iterator[Any]:
    """The classes of the methods that are chosen, each before those that it uses.

    Args:
        made: settings of methods; those of a method that uses others are looked up there once it has been given.
    """
    if prune.criterion in criteria:
        yield criteria[prune.criterion]
    elif prune.criterion != "zeros" and not is_file(prune.criterion):
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
    by_scope = [method.name for scope in ("block", "model") for method in recoveries if method.scope == scope]
    if [name for name in by_scope if name in names] != names and names != ["none"]:
        unknown = next((name for name in names if name not in [*by_scope, "none"]), None)
        raise EBFTError(
            f"--recover is {recover!r}; expected none, or one or more of {', '.join(by_scope)} in this order, "
            f"joined by +{nearest(unknown, by_scope) if unknown else ''}"
        )
    return [] if names == ["none"] else names


def _of_another(owners: list[Any], parts: Iterable[Any]) -> str:
    """Says that settings are of methods that are not chosen.

    Args:
        owners: these methods.
        parts: the sections, and the settings of the methods that are chosen.
    """
    chosen = {flag(flat_name(f)): getattr(part, f.name) for part in parts for f in dataclasses.fields(part)}
    names, given = dict[str, list[str]](), dict[str, None]()
    for method in owners:
        choice = _BY_KIND[method.kind].flag
        if choice in chosen:
            given[f"{choice} is {chosen[choice]}"] = None
        else:  # a loss or an optimizer is chosen by a setting of a recovery, which is not chosen itself
            user = next(user for user in recoveries if choice in map(flag, _flat_names_of(user.Settings)))
            given[f"--recover is {chosen['--recover']}"] = None
            choice = f"--recover {user.name} {choice}"
        names.setdefault(choice, []).append(method.name)
    theirs = ", or ".join(f"{choice} {' or '.join(of)}" for choice, of in names.items())
    expected = theirs if len(owners) == 1 else "one of these"
    return f"a setting of {theirs}, and {' and '.join(given)}; expected {expected}, or no such setting"


def _is_usual(name: str, value: Any, defaults: Mapping[str, Any]) -> bool:
    """Whether a setting has a value that it has where nobody gives one: then it need not have been meant."""
    if name in defaults:
        usual = [defaults[name], [defaults[name]]]  # names separated by commas may be one
    else:
        kinds = [*SECTIONS.values(), *(method.Settings for registry in ALL for method in registry)]
        usual = [f.default for kind in kinds for f in dataclasses.fields(kind) if flat_name(f) == name]
    return _plain(value) in map(_plain, usual)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def said_of(name: str, value: Any) -> str:
    """A setting as it is said on the command line."""
    if isinstance(value, bool):
        return flag(name) if value else flag(f"no_{name}")
    if value is None or value in ("", [], ()):
        return f"no {flag(name)}"
    return f"{flag(name)} {','.join(map(str, value)) if isinstance(value, list | tuple) else value}"


def _owners_of(settings: type) -> list[Any]:
    return [method for registry in ALL for method in registry if method.Settings is settings]


def _flat_names_of(settings: type) -> set[str]:
    return {flat_name(f) for f in dataclasses.fields(settings)}


def all_flat_names() -> frozenset[str]:
    """Of every setting of a section and of every method that is registered."""
    kinds = [*SECTIONS.values(), *(method.Settings for registry in ALL for method in registry)]
    return frozenset(name for kind in kinds for name in _flat_names_of(kind))
