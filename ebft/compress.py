"""``python -m ebft.compress MODEL OUT``: stores a pruned model without its zeros. Exit code 0, or 2 and a sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ebft.compressed import save_compressed
from ebft.errors import EBFTError
from ebft.terminal import lasting_output


@lasting_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Compress what the command line names (default: ``sys.argv``)."""
    parser = argparse.ArgumentParser(prog="python -m ebft.compress", description=__doc__, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of a pruned model")
    parser.add_argument("output", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--values", choices=("fp32", "bf16", "fp16", "int8"), help="how survivors are stored (default: as they are)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if an earlier call made it")
    given = parser.parse_args(argv)
    try:
        saved = save_compressed(given.model, given.output, values=given.values, overwrite=given.overwrite)
    except EBFTError as error:
        print(f"ebft: {error}", file=sys.stderr)
        return 2
    dense, small = saved["dense_bytes"] / 2**20, saved["bytes"] / 2**20
    print(
        f"{len(saved['layers'])} layers: {dense:.1f} MiB of weights in {small:.1f} MiB "
        f"({small / max(dense, 1e-9):.2f}); load it with ebft.load_compressed({given.output!r})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
