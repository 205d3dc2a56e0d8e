"""``ebft compress``."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from cyclopts import Parameter

from ebft.cli.heavy import importing
from ebft.model.locate import locate


def compress(
    model: Annotated[str, Parameter(help="folder or hub id of a pruned model", metavar="MODEL")],
    output: Annotated[str, Parameter(help="folder to write", metavar="OUT")],
    /,
    *,
    values: Annotated[
        Literal["fp32", "bf16", "fp16", "int8"] | None,
        Parameter(help="how survivors are stored (default: as they are)"),
    ] = None,
    overwrite: Annotated[bool, Parameter(help="replace OUT if an earlier call made it", negative=())] = False,
) -> int:
    """Store a pruned model without its zeros."""
    locate(model)
    with importing():
        from ebft.compressed.layers import save_compressed

    saved = save_compressed(model, output, values=values, overwrite=overwrite)
    dense, small = saved["dense_bytes"] / 2**20, saved["bytes"] / 2**20
    print(
        f"{len(saved['layers'])} layers: {dense:.1f} MiB of weights in {small:.1f} MiB "
        f"({small / max(dense, 1e-9):.2f}); load it with ebft.load_compressed({output!r})"
    )
    if left := saved["left"]:
        print(f"{len(left)} stay dense, because other modules read their weights: {', '.join(_kinds(left))}")
    return 0


def _kinds(names: list[str]) -> list[str]:
    """Names without the numbers of blocks and experts, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names))
