"""``python -m tests.attack``: attacks runs, files and kernels. Exit code 0; 1: something did not survive.

python -m tests.attack                     # all attacks, with a new seed
python -m tests.attack kill --rounds 200   # one of them, more often
python -m tests.attack kill --seed 7 --case 31
python -m tests.attack --write             # and put the table into docs/reliability.md
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys

for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ[name] = (
        value  # read when torch and huggingface_hub are imported; a process with threads cannot be forked
    )

from tests.attack.attacks import ATTACKS, attack, write_table  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Make the attacks that the command line names (default: ``sys.argv``)."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.attack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=f"some of {', '.join(ATTACKS)} (default: all)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="of all that is random")
    parser.add_argument("--rounds", type=int, default=32, help="runs that are killed, and disks that are full")
    parser.add_argument("--case", type=int, help="only the one of this number")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    given = parser.parse_args(argv)
    names = given.attacks or list(ATTACKS)
    if unknown := set(names) - set(ATTACKS):
        parser.error(f"there is no attack {min(unknown)!r}; expected some of {', '.join(ATTACKS)}")
    rows = attack(names, given.seed, given.rounds, given.jobs, given.case)
    if given.write:
        write_table(rows)
    return 0 if all(row.tried == row.survived for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
