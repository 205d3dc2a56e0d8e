"""Hostile files: refused in one sentence within seconds, or taken for what they soundly are; no code of theirs runs."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import yaml

import ebft.audit
import ebft.compress
from ebft import EBFTError, RunResult, load_compressed
from tests.attack.arena import Arena, command
from tests.attack.case import Case
from tests.attack.corpus import CODE, COMPRESSED, CONFIGURATIONS, MODELS, NUMBERS, OUTPUTS, Hostile, copied
from tests.attack.trap import Trap
from tests.attack.victim import Ended, Fallen, finish

_PATIENCE = 30  # seconds
_MEMORY = 4 * 2**30  # what a victim may take: sizes of 10^9 are to be refused before anything is made


def cases(rounds: int) -> Iterator[Case]:
    """Every hostile thing, with every command that reads it."""
    for hostile in MODELS:
        for name, attempt in {"run": _run, "compress": _compress}.items():
            yield Case(f"{name}, {hostile.name}", partial(attempt, hostile))
    for hostile in (*CODE[:2], *CONFIGURATIONS):  # a plan reads the configuration alone
        yield Case(f"plan, {hostile.name}", partial(_plan, hostile))
    for hostile in OUTPUTS:
        for name, attempt in {"audit": _audit, "audit against it": _audit_against, "result": _result}.items():
            yield Case(f"{name}, {hostile.name}", partial(attempt, hostile))
    for hostile in COMPRESSED:
        yield Case(f"load_compressed, {hostile.name}", partial(_load_compressed, hostile))
    for name, content in _SETTINGS.items():
        yield Case(f"--config, {name}", partial(_settings, content))
    for name, (flag, make) in _INPUTS.items():
        yield Case(f"{flag}, {name}", partial(_input, flag, make))
    for name in _NAMES:
        yield Case(f"a text called {name!r}", partial(_text_called, name))
        yield Case(f"a model called {name!r}", partial(_model_called, name))


def _judge(ended: Ended, trap: Trap, refused: bool) -> None:
    if trap.sprung():
        raise Fallen(f"its code ran; {ended}")
    if ended.code or refused:
        ended.sentence()


# --- models -------------------------------------------------------------------------------------------------------


def _run(hostile: Hostile, arena: Arena, folder: Path, random: Random) -> int:
    trap = _trap(folder)
    model = copied(arena.model, folder / "model", hostile, trap)
    more = ["--calibration", "self"] if "chat template" in hostile.name else []
    ended = _attacked(command(arena.flags_for(*more, model=model)), folder)
    _judge(ended, trap, hostile.refused)
    if not ended.code:
        _expect_sound(folder)
    return 1


def _plan(hostile: Hostile, arena: Arena, folder: Path, random: Random) -> int:
    """One that does not fit is printed, with exit code 2."""
    trap = _trap(folder)
    model = copied(arena.model, folder / "model", hostile, trap)
    ended = _attacked(command(arena.flags_for("--plan", model=model)), folder)
    if trap.sprung() or ended.code not in (0, 2) or "Traceback" in ended.said:
        raise Fallen(f"{'its code ran; ' if trap.sprung() else ''}{ended}")
    return 1


def _compress(hostile: Hostile, arena: Arena, folder: Path, random: Random) -> int:
    """What a weight's value is does not matter to it, nor what lies beside the model."""
    trap = _trap(folder)
    model = copied(arena.model, folder / "model", hostile, trap)
    ended = _attacked(partial(ebft.compress.main, [str(model), str(folder / "small")]), folder)
    _judge(ended, trap, hostile.refused and hostile not in NUMBERS)
    return 1


def _expect_sound(folder: Path) -> None:
    ended = finish(partial(ebft.audit.main, [str(folder / "out")]), folder)
    if ended.code or not ended.said.rstrip().endswith("sound"):
        raise Fallen(f"it was run with, and the output is not sound: {ended}")


# --- finished outputs and compressed models -----------------------------------------------------------------------


def _audit(hostile: Hostile, arena: Arena, folder: Path, random: Random) -> int:
    trap = _trap(folder)
    output = copied(arena.earlier, folder / "finished", hostile, trap)
    ended = _attacked(partial(ebft.audit.main, [str(output)]), folder)
    found_faults = ended.code == 1 and "\nfault: " in f"\n{ended.said}" and "Traceback" not in ended.said
    _judge(Ended(0, "") if found_faults else ended, trap, hostile.refused and not found_faults)
    return 1


def _audit_against(hostile: Hostile, arena: Arena, folder: Path, random: Random) -> int:
    trap = _trap(folder)
    dense = copied(arena.earlier, folder / "dense", hostile, trap)
    ended = _attacked(partial(ebft.audit.main, [str(arena.earlier), "--against", str(dense)]), folder)
    if trap.sprung() or ended.code not in (0, 1, 2) or "Traceback" in ended.said:
        raise Fallen(f"{'its code ran; ' if trap.sprung() else ''}{ended}")
    return 1


def _result(hostile: Hostile, arena: Arena, folder: Path, random: Random) -> int:
    """Damaged or not, what a run left may be read in Python."""
    trap = _trap(folder)
    output = copied(arena.earlier, folder / "finished", hostile, trap)
    ended = _attacked(partial(_said_in_a_sentence, lambda: RunResult.read(output).model), folder)
    if trap.sprung():
        raise Fallen(f"its code ran; {ended}")
    return 1


def _load_compressed(hostile: Hostile, arena: Arena, folder: Path, random: Random) -> int:
    trap = _trap(folder)
    small = copied(arena.compressed, folder / "small", hostile, trap)
    _judge(_attacked(partial(_said_in_a_sentence, partial(load_compressed, small)), folder), trap, hostile.refused)
    return 1


def _said_in_a_sentence(work: Callable[[], object]) -> int:
    """As the command line does with an error."""
    try:
        work()
    except EBFTError as error:
        print(f"ebft: {error}", file=sys.stderr)
        return 2
    return 0


# --- settings and inputs ------------------------------------------------------------------------------------------

_LAUGHS = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'ha'] * 10)}]" for n in range(10))
_SETTINGS: dict[str, Callable[[Trap], str]] = {
    **{f"a tag that runs code, {n}": partial(lambda n, trap: f"sparsity: {trap.yaml[n]}\n", n) for n in range(3)},
    "100,000 brackets": lambda trap: "[" * 100_000,
    "a billion laughs": lambda trap: f"{_LAUGHS}\n",
    "a billion laughs in a setting": lambda trap: f"{_LAUGHS.replace('a9:', 'sparsity:')}\n",
    "a number of 5,000 digits": lambda trap: f"samples: {'9' * 5000}\n",
    "an endless loop": lambda trap: "sparsity: &a [*a]\n",
    "a date": lambda trap: "sparsity: 2020-01-01\n",
}


def _settings(content: Callable[[Trap], str], arena: Arena, folder: Path, random: Random) -> int:
    trap = _trap(folder)
    (folder / "run.yaml").write_text(content(trap))
    _judge(_attacked(command(arena.flags_for("--config", "run.yaml")), folder), trap, refused=True)
    return 1


def _file(name: str, content: Callable[[Trap], bytes]) -> Callable[[Path, Trap], Path]:
    def make(folder: Path, trap: Trap) -> Path:
        (folder / name).write_bytes(content(trap))
        return folder / name

    return make


def _fifo(name: str) -> Callable[[Path, Trap], Path]:
    def make(folder: Path, trap: Trap) -> Path:
        os.mkfifo(folder / name)
        return folder / name

    return make


def _link(to: str) -> Callable[[Path, Trap], Path]:
    def make(folder: Path, trap: Trap) -> Path:
        (folder / "link").symlink_to(to)
        return folder / "link"

    return make


_INPUTS: dict[str, tuple[str, Callable[[Path, Trap], Path]]] = {
    "a pickle as masks": ("--prune", _file("masks.safetensors", lambda trap: trap.pickled)),
    "a pickle called .pt as masks": ("--prune", _file("masks.pt", lambda trap: trap.pickled)),
    "a fifo as masks": ("--prune", _fifo("masks.safetensors")),
    "a fifo as text": ("--calibration", _fifo("text.txt")),
    "a fifo as settings": ("--config", _fifo("run.yaml")),
    "an endless device as text": ("--calibration", lambda folder, trap: Path("/dev/zero")),
    "a program as text": ("--calibration", _file("text.py", lambda trap: trap.module.encode())),
    "a pickle as a table": ("--calibration", _file("text.parquet", lambda trap: trap.pickled)),
    "no rows": ("--calibration", _file("text.jsonl", lambda trap: b"")),
    "rows of 100,000 brackets": ("--calibration", _file("text.jsonl", lambda trap: b"[" * 100_000)),
    "rows of numbers": ("--calibration", _file("text.jsonl", lambda trap: b'{"text": 1}\n[2]\n')),
    "an allocation of 100,000 brackets": ("--allocation", _file("shares.json", lambda trap: b"[" * 100_000)),
    "an allocation of NaN": ("--allocation", _file("shares.json", lambda trap: b'{"0": NaN}')),
    "a name of 300 characters": ("--output", lambda folder, trap: folder / ("x" * 300)),
    "a name with NUL": ("--output", lambda folder, trap: folder / "a\0b"),
    "a link to itself": ("--output", _link("link")),
    "a file": ("--output", _file("out", lambda trap: b"precious")),
}


def _input(flag: str, make: Callable[[Path, Trap], Path], arena: Arena, folder: Path, random: Random) -> int:
    trap = _trap(folder)
    given = make(folder, trap)
    _judge(_attacked(command(arena.flags_for(flag, str(given))), folder), trap, refused=True)
    return 1


# --- names --------------------------------------------------------------------------------------------------------

_NAMES = (
    "<b>bold",
    "<script>alert(1)<!--",
    "a | b | c",
    "a\n---\nlicense: evil\n---\n",
    "`a` *b* [c](d)",
    "{{ 7 * 7 }}",
)


def _text_called(name: str, arena: Arena, folder: Path, random: Random) -> int:
    text = folder / f"{name}.txt"
    text.write_bytes(arena.text.read_bytes())
    more = ("--eval", text.name, "--calibration", text.name, "--recover", "ebft+lora", "--lm-epochs", "1")
    return _named(arena.flags_for(*more), arena, folder)


def _model_called(name: str, arena: Arena, folder: Path, random: Random) -> int:
    shutil.copytree(arena.model, folder / name)
    return _named(arena.flags_for(model=folder / name), arena, folder)


def _named(flags: list[str], arena: Arena, folder: Path) -> int:
    """The page has no element that another page has not, and the card has the settings and tables that others have."""
    trap = _trap(folder)
    ended = _attacked(command(flags), folder)
    _judge(ended, trap, refused=False)
    if not ended.code:
        _expect_sound(folder)
        usual = arena.whole("lora") / "out"
        if strange := _elements(folder / "out") - _elements(usual):
            raise Fallen(f"report.html has elements of the name's: {sorted(strange)}")
        if _front_matter(folder / "out") != _front_matter(usual):
            raise Fallen(f"the card's front matter is {_front_matter(folder / 'out')}")
        if broken := _broken_rows(folder / "out"):
            raise Fallen(f"a table of the card is broken: {broken[0]!r}")
    return 1


def _elements(output: Path) -> set[str]:
    found = set()
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.add(tag)  # type: ignore[method-assign]
    parser.feed((output / "report.html").read_text(encoding="utf-8"))
    return found


def _front_matter(output: Path) -> object:
    """What the card says of itself to the hub, but for the figures, which name the text."""
    front = (output / "README.md").read_text(encoding="utf-8").split("\n---\n")[0].removeprefix("---\n")
    return {name: value for name, value in yaml.safe_load(front).items() if name != "model-index"}


def _broken_rows(output: Path) -> list[str]:
    """Rows that have other cells than the heading of their table, and what follows a row and is none."""
    broken, cells = [], 0
    for line in (output / "README.md").read_text(encoding="utf-8").splitlines():
        columns = len(re.findall(r"(?<!\\)\|", line))
        if cells and line and columns != cells:
            broken.append(line)
        cells = columns if line.startswith("|") else 0
    return broken


# --- helpers ------------------------------------------------------------------------------------------------------


def _trap(folder: Path) -> Trap:
    return Trap(folder / "canary")


def _attacked(work: Callable[[], int], folder: Path) -> Ended:
    return finish(work, folder, patience=_PATIENCE, memory=_MEMORY)
