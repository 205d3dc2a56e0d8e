"""Methods by name: criteria, refinements, recoveries, losses and optimizers, ours and those of other packages.

A method is a class in a file of its own, with its settings, and a decorator puts it here. Another package's is found by
an entry point of a group such as ``ebft.criteria`` whose object is the class, so that installing the package is enough.
Nothing here, and nothing that a method's file does when it is imported, needs torch: ``ebft --help`` lists all of them
at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from ebft.errors import EBFTError

M = TypeVar("M", bound=type)


@dataclasses.dataclass(frozen=True)
class NoSettings:
    """The settings of a method that has none."""


class Registry(Generic[M]):
    """The methods of one kind.

    Args:
        kind: what one of them is, in a word; its plural names the group of entry points.
        flag: the setting that chooses among them.
        home: the package whose import registers our own.
    """

    def __init__(self, kind: str, plural: str, flag: str, home: str) -> None:
        self.kind, self.plural, self.flag, self.home = kind, plural, flag, home
        self._methods: dict[str, M] = {}
        self._loaded = False

    def register(self, name: str, **facts: Any) -> Callable[[M], M]:
        """A decorator that puts a class here as ``name``; ``facts`` become attributes of it."""

        def put(method: M) -> M:
            taken = self._methods.get(name)
            if taken is not None and taken.__qualname__ != method.__qualname__:
                raise EBFTError(f"the {self.kind} {name!r} is registered twice: by {taken!r} and {method!r}")
            for fact, value in {"name": name, "kind": self.kind, **facts}.items():
                setattr(method, fact, value)
            if not hasattr(method, "Settings"):
                method.Settings = NoSettings  # type: ignore[attr-defined]
            self._methods[name] = method
            return method

        return put

    def forget(self, name: str) -> None:
        """Take a method out again."""
        del self._methods[name]

    def __iter__(self) -> Iterator[M]:
        self._load()
        return iter(self._methods.values())

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._methods

    def __getitem__(self, name: str) -> M:
        self._load()
        if name not in self._methods:
            raise EBFTError(
                f"{self.flag} is {name!r}; expected {', '.join(self._methods)}{nearest(name, self._methods)}"
            )
        return self._methods[name]

    def names(self) -> list[str]:
        """All of them, in the order in which they were registered."""
        self._load()
        return list(self._methods)

    def _load(self) -> None:
        if self._loaded:
            return
        import_module(self.home)
        for point in entry_points(group=f"ebft.{self.plural}"):
            try:
                method = point.load()
            except (ImportError, AttributeError) as error:
                raise EBFTError(
                    f"the {self.kind} {point.name!r} of {point.value} cannot be imported: {error}; mend or uninstall it"
                ) from error
            if point.name not in self._methods:
                self.register(point.name)(method)
        self._loaded = True


criteria: Registry[Any] = Registry("criterion", "criteria", "--prune", "ebft.pruning")
refinements: Registry[Any] = Registry("refinement", "refinements", "--refine", "ebft.pruning")
recoveries: Registry[Any] = Registry("recovery", "recoveries", "--recover", "ebft.recovery")
losses: Registry[Any] = Registry("loss", "losses", "--loss", "ebft.recovery")
optimizers: Registry[Any] = Registry("optimizer", "optimizers", "--optimizer", "ebft.recovery")
ALL = (criteria, refinements, recoveries, losses, optimizers)

register_criterion = criteria.register
register_refinement = refinements.register
register_recovery = recoveries.register
register_loss = losses.register
register_optimizer = optimizers.register


def nearest(name: str, known: Any) -> str:
    """``; did you mean …?`` where something known is spelled nearly like ``name``."""
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def summary_of(method: type) -> str:
    """What a method is, in a line: the first of its docstring."""
    return (method.__doc__ or "").strip().splitlines()[0] if method.__doc__ else ""
