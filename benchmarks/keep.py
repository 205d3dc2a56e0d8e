"""Keeps what pytest-benchmark measured as a result file: medians, without the thousands of single times.

make bench && python -m benchmarks.keep .benchmarks/latest.json adamw --only test_adamw
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.machine import write_result


def main() -> None:
    """Read one of pytest-benchmark's JSON files and write ``results/<device>/NAME.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("name")
    parser.add_argument("--only", default="", help="benchmarks whose full name holds this")
    given = parser.parse_args()
    rows = [
        {
            "group": case["group"],
            "case": case["name"],
            "median_ms": round(case["stats"]["median"] * 1e3, 4),
            "min_ms": round(case["stats"]["min"] * 1e3, 4),
            "iqr_ms": round(case["stats"]["iqr"] * 1e3, 4),
            "rounds": case["stats"]["rounds"],
            **case["extra_info"],
        }
        for case in json.loads(given.source.read_text(encoding="utf-8"))["benchmarks"]
        if given.only in case["fullname"]
    ]
    rows.sort(key=lambda row: (row["group"], row["median_ms"]))
    print(f"{len(rows)} cases written to {write_result(given.name, {'cases': rows})}")


if __name__ == "__main__":
    main()
