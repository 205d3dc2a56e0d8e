"""``ebft report``."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from ebft.cli.heavy import importing


def report(
    output: Annotated[
        str, Parameter(help="the folder of a run: OUT, or OUT.partial while it works", metavar="OUT|OUT.partial")
    ],
    /,
) -> int:
    """Make the report page of a run, finished or not, from what its folder holds."""
    with importing():
        from ebft.output.report import write_report

    print(write_report(output))
    return 0
