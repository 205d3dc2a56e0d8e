"""``python -m ebft.run``: the command line. Exit code 0, or 2 with one sentence on standard error.

A plan that does not fit says so itself, and gives 2 too.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from ebft.config import parse_args
from ebft.errors import EBFTError
from ebft.pipeline import run_ebft
from ebft.plan import make_plan


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for (default: ``sys.argv``)."""
    logging.getLogger("ebft_kernels").setLevel(logging.ERROR)  # the report says which implementations run
    try:
        config, planned_on = parse_args(argv)
        if planned_on is not None:
            plan = make_plan(config, planned_on)
            print(plan)
            return 2 if plan.faults else 0
        run_ebft(config=config)
    except EBFTError as error:
        print(f"ebft: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ebft: interrupted; finished blocks, if any, are in the output's .partial folder", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
