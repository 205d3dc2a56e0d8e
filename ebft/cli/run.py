"""``ebft run`` and ``ebft plan``.

A plan that does not fit says so itself, and gives 2 too. Ctrl-C ends a run with 130 and SIGTERM with 143; either way
what was finished is kept, as it is after a crash. A second one does not wait for what is being written. That nobody
reads what the run says does not end it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from cyclopts import Parameter

from ebft.cli.flags import config_of, presets
from ebft.cli.heavy import importing
from ebft.data.texts import check_hub
from ebft.model.locate import locate
from ebft.plan.data_sheets import DEVICES, HERE
from ebft.registry import nearest

if TYPE_CHECKING:
    from ebft.config import EBFTConfig

_Preset = Annotated[
    str | None,
    Parameter(
        help="settings to start from (default: paper; demo without a model; best with --time)", metavar=presets()
    ),
]
_File = Annotated[str | None, Parameter(help="settings from a YAML file, over the preset's", metavar="FILE.yaml")]
_Device = Annotated[
    str | None,
    Parameter(help="print what the run needs, here or on a GPU, and exit", metavar="|".join((HERE, *DEVICES))),
]


def run(
    *,
    preset: _Preset = None,
    config: _File = None,
    plan: _Device = None,
    quiet: Annotated[bool | None, Parameter(help="print errors only", negative=())] = None,
    json: Annotated[bool | None, Parameter(help="print the summary as JSON on standard output", negative=())] = None,
    **settings: Any,
) -> int:
    """Prune a model, win its quality back block by block, save it and measure it.

    Without a model it is SmolLM2-135M-Instruct from its wheel, with the settings of the preset demo.
    """
    logging.getLogger("ebft_kernels").setLevel(logging.ERROR)  # the report says which implementations run
    made: EBFTConfig | None = None
    with _signals_interrupt():
        try:
            made = config_of(preset, config, **settings)
            if plan is not None:
                return _plan(made, plan, "--plan")
            return _run(made, quiet=bool(quiet), as_json=bool(json))
        except KeyboardInterrupt as stop:
            print(f"ebft: {_what_is_left(made)}", file=sys.stderr)
            return 143 if isinstance(stop, _Terminated) else 130


def plan(
    *,
    preset: _Preset = None,
    config: _File = None,
    on: Annotated[str, Parameter(help="the machine that is planned for", metavar="|".join((HERE, *DEVICES)))] = HERE,
    **settings: Any,
) -> int:
    """Say what a run would need, in memory and time, from the model's configuration alone."""
    return _plan(config_of(preset, config, **settings), on, "--on")


def _run(config: EBFTConfig, *, quiet: bool, as_json: bool) -> int:
    if not config.output.resume:  # a finished run is not done again, and needs neither model nor text
        _check_models(config)
        check_hub(config)
    began = time.perf_counter()
    with importing(quiet=quiet):
        from ebft.distributed import SaidByTheFirst
        from ebft.output.terminal import Reporter
        from ebft.pipeline.run import run_ebft

    try:
        result = run_ebft(config=config, reporter=Reporter(quiet=quiet), since=began)
    except SaidByTheFirst:
        return 2
    if as_json:
        print(json.dumps(result.summary))
    return 0


def _plan(config: EBFTConfig, on: str, flag: str) -> int:
    from ebft.errors import EBFTError

    if on not in (HERE, *DEVICES):
        raise EBFTError(f"{flag} is {on!r}; expected {', '.join((HERE, *DEVICES))}{nearest(on, DEVICES)}")
    _check_models(config)
    with importing():
        from ebft.plan.planner import make_plan

    made = make_plan(config, on)
    print(made)
    return 2 if made.faults else 0


def _check_models(config: EBFTConfig) -> None:
    """``EBFTError`` for a model that is not there, before torch and transformers are imported, which takes seconds."""
    locate(config.model.source)
    if config.model.teacher is not None:
        locate(config.model.teacher)


# --- interruptions --------------------------------------------------------------------------------------------------


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the run in order, and a second one at once. A commit cut short has not begun."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def stop(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) > 1:
            _stop_at_once(number)
        raise _Terminated if number == signal.SIGTERM else KeyboardInterrupt

    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}  # in the background a shell turns Ctrl-C off
    try:
        yield
    finally:
        for number, handler in before.items():  # once it is interrupted nothing is left to do but to end
            signal.signal(number, signal.SIG_DFL if came else handler)


def _stop_at_once(number: int) -> NoReturn:
    """End the process as it stands, with a line; what has been committed survives that as it does a crash."""
    cursor = "\x1b[?25h" if os.isatty(2) else ""  # which the progress display has hidden
    with contextlib.suppress(OSError):
        os.write(2, f"{cursor}\nebft: interrupted again, and stopped at once; what was finished is kept\n".encode())
    os._exit(128 + number)


def _what_is_left(config: EBFTConfig | None) -> str:
    from ebft.output.folder import OutputFolder, is_kept
    from ebft.output.records import SUMMARY

    steps = config.steps if config else ()
    kept = [partial for step in steps if is_kept(partial := OutputFolder.partial(step.output.folder))]
    folders = [Path(step.output.folder) for step in steps[:-1]]
    kept += [folder for folder in folders if (folder.expanduser() / SUMMARY).is_file()]
    if kept:
        return f"interrupted; what was finished is kept in {kept[0]}: the same command with --resume goes on from there"
    return "interrupted; nothing was finished"
