"""All attacks by name, what is made of them, and the table."""

from __future__ import annotations

import argparse
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random

from tests.attack import closed_pipes, full_disk, fuzzed, hostile, killed
from tests.attack.arena import Arena, prepare
from tests.attack.case import Case, Outcome
from tests.attack.victim import Fallen

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
_TABLE = re.compile(r"(?<=<!-- table of attacks -->\n).*?(?=<!-- end of table -->)", re.DOTALL)


@dataclass(frozen=True)
class Attack:
    """A kind of attack.

    Attributes:
        title: what the table calls it.
        cases: the cases of so many rounds.
    """

    title: str
    cases: Callable[[int], Iterable[Case]]


ATTACKS = {
    "kill": Attack("`kill -9` at random moments", killed.cases),
    "disk": Attack("full disks", full_disk.cases),
    "pipes": Attack("closed pipes", closed_pipes.cases),
    "files": Attack("hostile files", hostile.cases),
    "fuzz": Attack("fuzzed kernels and headers", fuzzed.cases),
}


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    attack: str
    tried: int
    survived: int
    repeat: str


def main(argv: Sequence[str] | None = None, description: str | None = None) -> int:
    """Make the attacks that the command line names (default: ``sys.argv``)."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.attack", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=f"some of {', '.join(ATTACKS)} (default: all)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="of all that is random")
    parser.add_argument("--rounds", type=int, default=32, help="runs that are killed, and disks that are full")
    parser.add_argument("--case", type=int, help="only the one of this number")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    given = parser.parse_args(argv)
    names = given.attacks or list(ATTACKS)
    if unknown := set(names) - set(ATTACKS):
        parser.error(f"there is no attack {min(unknown)!r}; expected some of {', '.join(ATTACKS)}")
    rows = attack(names, given.seed, given.rounds, given.jobs, given.case)
    if given.write:
        write_table(rows)
    return 0 if all(row.tried == row.survived for row in rows) else 1


def attack(names: Sequence[str], seed: int, rounds: int, jobs: int, only: int | None = None) -> list[Row]:
    """Make the attacks called ``names``; says what is not survived at once, and the table at the end."""
    rows = []
    # The processes of the pool fork the victims: they begin before this one has a thread, and have none themselves.
    with tempfile.TemporaryDirectory() as scratch, get_context("fork").Pool(jobs) as pool:
        print(f"seed {seed}", flush=True)
        arena = prepare(_new(Path(scratch) / "arena"), pool)
        for name in names:
            began, outcomes = time.monotonic(), []
            numbers = range(len(list(ATTACKS[name].cases(rounds)))) if only is None else [only]
            for outcome in pool.imap_unordered(partial(_outcome, arena, Path(scratch), name, seed, rounds), numbers):
                outcomes.append(outcome)
                if outcome.fault:
                    repeat = f"python -m tests.attack {name} --seed {seed} --rounds {rounds} --case {outcome.number}"
                    print(f"NOT SURVIVED: {name}: {outcome.name}: {outcome.fault}\n    {repeat}", flush=True)
            tried, survived = (sum(getattr(outcome, what) for outcome in outcomes) for what in ("tried", "survived"))
            print(f"{name}: {survived} of {tried} survived, {time.monotonic() - began:.0f} s", flush=True)
            repeat = f"python -m tests.attack {name} --seed {seed} --rounds {rounds}"
            rows.append(Row(ATTACKS[name].title, tried, survived, repeat))
    print(table(rows))
    return rows


def _outcome(arena: Arena, scratch: Path, name: str, seed: int, rounds: int, number: int) -> Outcome:
    case = list(ATTACKS[name].cases(rounds))[number]  # not given: what it calls is made on the spot, and has no name
    folder = _new(scratch / f"{name}-{number}")
    try:
        tried = case.attempt(arena, folder, Random(f"{seed} {name} {number}"))
    except Fallen as fallen:
        return Outcome(number, case.name, 1, 0, str(fallen))
    return Outcome(number, case.name, tried, tried)


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def table(rows: Iterable[Row]) -> str:
    """The table, in Markdown."""
    lines = ["| attack | tried | survived | repeat it with |", "| --- | --- | --- | --- |"]
    lines += [f"| {row.attack} | {row.tried} | {row.survived} | `{row.repeat}` |" for row in rows]
    return "\n".join(lines) + "\n"


def write_table(rows: Iterable[Row]) -> None:
    """Put the table into docs/reliability.md, in place of the one that stands there."""
    text, found = _TABLE.subn(lambda _: table(rows), DOCUMENT.read_text(encoding="utf-8"))
    assert found == 1, f"{DOCUMENT} has no place for the table"
    DOCUMENT.write_text(text, encoding="utf-8")
