"""``python -m ebft.run``: the command line. Exit code 0, or 2 with one sentence on standard error.

A plan that does not fit says so itself, and gives 2 too. Ctrl-C ends a run with 130 and SIGTERM with 143; either way
what was finished is kept, as it is after a crash. A second one does not wait for what is being written. That nobody
reads what the run says does not end it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ebft.command_line import parse_args
from ebft.config import EBFTConfig
from ebft.errors import EBFTError
from ebft.output import SUMMARY, OutputFolder, is_kept
from ebft.pipeline import run_ebft
from ebft.plan import make_plan
from ebft.ranks import SaidByTheFirst
from ebft.terminal import lasting_output


@lasting_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for (default: ``sys.argv``)."""
    logging.getLogger("ebft_kernels").setLevel(logging.ERROR)  # the report says which implementations run
    config: EBFTConfig | None = None
    with _signals_interrupt():
        try:
            config, planned_on = parse_args(argv)
            if planned_on is not None:
                plan = make_plan(config, planned_on)
                print(plan)
                return 2 if plan.faults else 0
            run_ebft(config=config)
        except SaidByTheFirst:
            return 2
        except EBFTError as error:
            print(f"ebft: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as stop:
            print(f"ebft: {_what_is_left(config)}", file=sys.stderr)
            return 143 if isinstance(stop, _Terminated) else 130
    return 0


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
    steps = config.steps if config else ()
    kept = [partial for step in steps if is_kept(partial := OutputFolder.partial(step.output))]
    kept += [Path(step.output) for step in steps[:-1] if (Path(step.output).expanduser() / SUMMARY).is_file()]
    if kept:
        return f"interrupted; what was finished is kept in {kept[0]}: the same command with --resume goes on from there"
    return "interrupted; nothing was finished"


if __name__ == "__main__":
    sys.exit(main())
