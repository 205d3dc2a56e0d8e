"""Whole runs of ``python -m ebft.run``: with ``--fused``, and with the native library turned off, taking turns; who
goes first changes from round to round.

python -m benchmarks.fused_run [--rounds 3] [-- any flags of ebft.run]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import write_result

CONTENDERS: dict[str, tuple[list[str], dict[str, str]]] = {
    "--fused": (["--fused"], {}),
    "torch alone": ([], {"EBFT_NATIVE": "0"}),
}
DEFAULT = ["--samples", "48"]


def main() -> None:
    """Run the rounds and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="fused_run")
    parser.add_argument("flags", nargs="*", help=f"for ebft.run (default: {' '.join(DEFAULT)})")
    given = parser.parse_args()
    flags = given.flags or DEFAULT
    rows: list[dict[str, Any]] = []
    for number in range(given.rounds):
        for contender in sorted(CONTENDERS, reverse=bool(number % 2)):
            extra, environment = CONTENDERS[contender]
            with tempfile.TemporaryDirectory() as scratch:
                output = Path(scratch) / "out"
                command = [sys.executable, "-m", "ebft.run", *flags, *extra, "--output", str(output)]
                subprocess.run(command, check=True, env={**os.environ, **environment})
                summary = json.loads((output / "ebft_summary.json").read_text(encoding="utf-8"))
                blocks = [json.loads(line) for line in (output / "blocks.jsonl").read_text("utf-8").splitlines()]
            rows.append(
                {
                    "round": number,
                    "contender": contender,
                    "seconds": summary["seconds"],
                    "tuning_seconds": sum(block["tuning_seconds"] for block in blocks),
                    "stage_seconds": summary["stage_seconds"],
                    "perplexity": summary["perplexity"],
                }
            )
            print(rows[-1], flush=True)
    medians = {
        contender: {
            key: statistics.median(row[key] for row in rows if row["contender"] == contender)
            for key in ("seconds", "tuning_seconds")
        }
        for contender in CONTENDERS
    }
    print(medians, write_result(given.name, {"flags": flags, "medians": medians, "runs": rows}))


if __name__ == "__main__":
    main()
