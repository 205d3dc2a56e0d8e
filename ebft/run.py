"""``python -m ebft.run``: the command line. Exit code 0, or 2 with one sentence on standard error.

A plan that does not fit says so itself, and gives 2 too. Ctrl-C ends a run with 130 and SIGTERM with 143; either way
what was finished is kept, as it is after a crash.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ebft.cli.flags import parse_args
from ebft.config import EBFTConfig
from ebft.distributed import SaidByTheFirst
from ebft.errors import EBFTError
from ebft.output.folder import SUMMARY, OutputFolder, is_kept
from ebft.pipeline.run import run_ebft
from ebft.plan.planner import make_plan


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for (default: ``sys.argv``)."""
    logging.getLogger("ebft_kernels").setLevel(logging.ERROR)  # the report says which implementations run
    config: EBFTConfig | None = None
    try:
        with _sigterm_interrupts():
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
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does. A commit that it cuts short is as if it had not begun."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _what_is_left(config: EBFTConfig | None) -> str:
    steps = config.steps if config else ()
    kept = [partial for step in steps if is_kept(partial := OutputFolder.partial(step.output.folder))]
    kept += [
        Path(step.output.folder) for step in steps[:-1] if (Path(step.output.folder).expanduser() / SUMMARY).is_file()
    ]
    if kept:
        return f"interrupted; what was finished is kept in {kept[0]}: the same command with --resume goes on from there"
    return "interrupted; nothing was finished"


if __name__ == "__main__":
    sys.exit(main())
