"""A setting: a dataclass field that knows its help, its bounds and its name on the command line, and checks itself."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ebft.errors import EBFTError

LARGEST = 2**31 - 1  # of whole numbers that have no bound of their own


def setting(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    basic: bool = False,
    needs: Any = None,
) -> Any:
    """A field of a section of the settings, or of a method's.

    Args:
        help: what it does, for ``--help`` and docs/settings.md.
        flag: its name on the command line and in flat settings, with underscores (default: the field's).
        choices: the values that it may have.
        metavar: what stands for its value in the help.
        at_least, above, at_most, below: bounds of a number, or of each number of several.
        basic: ``--help`` shows it, and not ``--help all`` alone.
        needs: a ``Needs``; without it the setting has no effect, and is refused.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    about = {"help": help, "flag": flag, "choices": choices, "metavar": metavar, "basic": basic, "needs": needs}
    return dataclasses.field(default=default, metadata={**about, "bounds": bounds})


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a setting needs of others to have an effect.

    Attributes:
        said: it, in words.
        of: the flat names of the settings that decide.
        met: whether a run, an ``EBFTConfig``, has it.
    """

    said: str
    of: tuple[str, ...]
    met: Callable[[Any], bool]


def flat_name(field: dataclasses.Field[Any]) -> str:
    """What a setting is called where settings are flat: in a keyword argument, in a line of YAML."""
    return field.metadata["flag"] or field.name


def flag(name: str) -> str:
    """What a flat name is called on the command line: ``--batch-size``."""
    return "--" + name.replace("_", "-")


def check_fields(section: Any) -> None:
    """Bring the fields of a frozen dataclass into their types; ``EBFTError`` where that cannot be, or out of bounds."""
    kinds = _types_of(section.__class__)
    for field in dataclasses.fields(section):
        value = typed(flag(flat_name(field)), getattr(section, field.name), kinds[field.name])
        object.__setattr__(section, field.name, value)
        _check_bounds(field, value)


@cache
def _types_of(section: Any) -> Mapping[str, Any]:
    return typing.get_type_hints(section)


def _check_bounds(field: dataclasses.Field[Any], value: Any) -> None:
    said, choices, bounds = flag(flat_name(field)), field.metadata["choices"], field.metadata["bounds"]
    if choices and value not in choices:
        from ebft.registry import nearest

        raise EBFTError(f"{said} is {value!r}; expected one of {', '.join(choices)}{nearest(str(value), choices)}")
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers:
        if not isinstance(number, int | float) or isinstance(number, bool):
            continue
        if isinstance(number, int) and bounds["at_most"] is None and number > LARGEST:
            bounds = {**bounds, "at_most": LARGEST}
        inside = (
            (bounds["at_least"] is None or number >= bounds["at_least"])
            and (bounds["above"] is None or number > bounds["above"])
            and (bounds["at_most"] is None or number <= bounds["at_most"])
            and (bounds["below"] is None or number < bounds["below"])
            and (isinstance(number, int) or math.isfinite(number))
        )
        if not inside:
            shown = f"{number:g}" if isinstance(number, float) else str(number)
            raise EBFTError(f"{said} is {shown}; expected {_expected(number, bounds)}")


def _expected(number: float, bounds: Mapping[str, float | None]) -> str:
    """The numbers that are allowed, in words."""
    least, above, most, below = (bounds[name] for name in ("at_least", "above", "at_most", "below"))
    if isinstance(number, int):
        what = "a whole number"
        if most is None and below is None:
            return f"{what} of at least {least:g}"
        largest = _power(most if most is not None else (below or 0) - 1)
        return f"{what} of at most {largest}" if least is None else f"{what} from {least:g} to {largest}"
    if (above, below) == (0, 1):
        return "a number between 0 and 1, both excluded"
    if (least, below) == (0, 1):
        return "a share from 0 up to, not including, 1"
    if (above, most) == (0, 1):
        return "a share above 0 and up to 1"
    if (least, most) == (0, 1):
        return "a share from 0 to 1"
    return f"a finite number of at least {least:g}" if least is not None else f"a finite number above {above or 0:g}"


def _power(number: float) -> str:
    """``9223372036854775807`` as ``2^63 - 1``."""
    over = int(number) + 1
    return f"2^{over.bit_length() - 1} - 1" if over > 2**20 and over & (over - 1) == 0 else f"{int(number)}"


def typed(said: str, value: Any, wanted: Any) -> Any:
    """``value`` (from Python, YAML or a flag's text) as the type ``wanted``; ``said``: what the setting is called."""
    kinds, words = [wanted], ()
    if isinstance(wanted, types.UnionType) or typing.get_origin(wanted) is typing.Union:
        kinds = [kind for kind in typing.get_args(wanted) if typing.get_origin(kind) is not typing.Literal]
        words = tuple(word for kind in typing.get_args(wanted) if kind not in kinds for word in typing.get_args(kind))
        if value is None and types.NoneType in kinds:
            return None
        if isinstance(value, str) and value in words:
            return value
    (kind,) = (kind for kind in kinds if kind is not types.NoneType)
    fault = EBFTError(f"{said} is {_short(value)}; expected {' or '.join([*words, _described(kind)])}")
    try:
        return _CONVERT.get(kind, _tuple_of(kind))(value)
    except (TypeError, ValueError, OverflowError):
        raise fault from None


def _described(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if kind in names:
        return names[kind]
    inside = typing.get_args(kind)
    if inside[1:] == (Ellipsis,):
        return {str: "names, separated by commas", float: "numbers, separated by commas"}[inside[0]]
    return "two numbers"


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _str(value: Any) -> str:
    if not isinstance(value, str | Path):
        raise TypeError
    return str(value)


def _int(value: Any) -> int:
    if isinstance(value, bool) or value is None or (isinstance(value, str) and len(value) > 100):
        raise TypeError
    number = int(value) if isinstance(value, str) else value
    if int(number) != number:
        raise ValueError
    return int(number)


def is_file(name: str) -> bool:
    """Whether there is a file of that name, which may be too long, or hold what no name can."""
    try:
        return Path(name).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home of such a user
        return False


def check_name(said: str, name: str) -> None:
    """``EBFTError`` if no file can have the name that is to be looked for; ``said``: what the setting is called."""
    try:
        Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, no home of such a user
        reason = getattr(error, "strerror", None) or error
        raise EBFTError(f"{said} is {_short(name)}; expected a name that a file can have: {reason}") from None


def _float(value: Any) -> float:
    if isinstance(value, bool) or value is None:
        raise TypeError
    return float(value)


_CONVERT: Mapping[Any, Callable[[Any], Any]] = {bool: _bool, str: _str, int: _int, float: _float}


def _tuple_of(kind: Any) -> Callable[[Any], tuple[Any, ...]]:
    """Several of a kind: a list, or text with commas between them; each once where they are names."""
    of, *rest = typing.get_args(kind) or (str,)

    def convert(value: Any) -> tuple[Any, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            raise TypeError
        if rest != [Ellipsis]:
            first, second = parts
            return (_CONVERT[of](first), _CONVERT[of](second))
        if of is str:
            return tuple(dict.fromkeys(name for part in parts if (name := _str(part).strip())))
        return tuple(map(_CONVERT[of], parts))

    return convert


def _short(value: Any) -> str:
    text = repr(value)
    if len(text) <= 80:
        return text
    return f"{f'{value[:50]!r}' if isinstance(value, str) else text[:50]}… ({len(text)} characters)"


def parse_bytes(text: str, what: str) -> int:
    """``"8GiB"``, ``"500MB"`` … as a number of bytes; ``EBFTError`` about ``what`` for anything else."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(?:([KMGT])(i?)B?|B)?", text.strip(), re.IGNORECASE)
    size = 0.0 if not match else float(match[1])
    if match and match[2]:
        size *= (1024 if match[3] else 1000) ** ("KMGT".index(match[2].upper()) + 1)
    if not 1 <= size < math.inf:
        raise EBFTError(f"{what} is {text!r}; expected a size such as 8GiB or 500MB")
    return int(size)


def parse_seconds(text: str, what: str) -> float:
    """``"90s"``, ``"10m"``, ``"1h"``, ``"1h30m"`` … in seconds; ``EBFTError`` about ``what`` for anything else."""
    match = re.fullmatch(r"(?:([0-9.]+)h)?(?:([0-9.]+)m)?(?:([0-9.]+)s)?", text.strip().lower())
    try:
        parts = [float(part or 0) for part in match.groups()] if match else []
    except ValueError:
        parts = []
    seconds = sum(part * size for part, size in zip(parts, (3600, 60, 1), strict=False))
    if not 0 < seconds < 10**8:
        raise EBFTError(f"{what} is {_short(text)}; expected a time such as 90s, 10m or 1h30m")
    return seconds
