"""``python -m ebft.audit``: the same as ``ebft audit``."""

import sys
from collections.abc import Sequence

from ebft.cli.app import main as command


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for (default: ``sys.argv``); gives the exit code."""
    return command(["audit", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
