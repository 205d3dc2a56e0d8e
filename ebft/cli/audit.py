"""``ebft audit``."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from ebft.cli.heavy import importing
from ebft.model.locate import DEFAULT_MODEL, locate
from ebft.output.records import finished_folder


def audit(
    output: Annotated[str, Parameter(help="the folder of a finished run", metavar="OUT")],
    /,
    *,
    against: Annotated[
        str | None, Parameter(help="the model that was pruned: hub id, folder or .gguf file", metavar="DENSE")
    ] = None,
    trust_remote_code: Annotated[
        bool, Parameter(help="allow transformers to run code shipped with the models", negative=())
    ] = False,
) -> int:
    """Look through a finished folder: zeros where the masks say so, N:M, shards and index, no NaN, and that it loads.

    Exit code 0, or 1 with a line for each fault.
    """
    finished_folder(output)
    if against not in (None, DEFAULT_MODEL):
        locate(against)
    with importing():
        from ebft.output.audit import audit as look_through

    found = look_through(output, against, trust_remote_code=trust_remote_code)
    for name, share in found.layers.items():
        print(f"{share:8.2%}  {name}")
    for note in found.notes:
        print(f"note: {note}")
    for fault in found.faults:
        print(f"fault: {fault}")
    print(f"{output}: {f'{len(found.faults)} faults' if found.faults else 'sound'}")
    return 1 if found.faults else 0
