"""``ebft push``."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from ebft.cli.heavy import importing
from ebft.output.records import finished_folder


def push(
    output: Annotated[str, Parameter(help="the folder of a finished run", metavar="OUT")],
    repo: Annotated[str, Parameter(help="where to, on the hub", metavar="USER/REPO")],
    /,
    *,
    private: Annotated[bool, Parameter(help="make it a private repository", negative=())] = False,
) -> int:
    """Audit a finished folder and upload the files that its run made to the hub.

    Exit code 0, or 1 with a line for each fault, and nothing uploaded.
    """
    folder = finished_folder(output)
    from ebft.output.push import check_repo, push_folder

    check_repo(repo)
    with importing():
        from ebft.output.audit import audit

    faults = audit(output).faults
    for fault in faults:
        print(f"fault: {fault}")
    if faults:
        print(f"{output}: {len(faults)} faults; nothing was uploaded")
        return 1
    print(f"{output} is sound; uploading", file=sys.stderr)
    print(push_folder(folder, repo, private=private))
    return 0
