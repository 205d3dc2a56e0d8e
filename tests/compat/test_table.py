"""docs/compatibility.md promises what is tested, and has a line for each test."""

import ast
import re
from pathlib import Path

from sharded import CASES

HERE = Path(__file__).parent


def test_every_line_is_a_test_and_every_test_a_line():
    table = (HERE.parent.parent / "docs" / "compatibility.md").read_text(encoding="utf-8")
    lines = [
        line for line in table.splitlines() if line.startswith("|") and "---" not in line and "| test |" not in line
    ]
    promised = [re.search(r"`(test_\w+\.py)::(\w+)` \|$", line) for line in lines]
    assert all(promised), lines[promised.index(None)] if None in promised else ""
    tests = {("test_sharded.py", case.__name__) for case in CASES}
    for file in HERE.glob("test_*.py"):
        if file.name not in ("test_sharded.py", "test_table.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
            tests |= {(file.name, name) for name in names if name.startswith("test_")}
    assert {match.groups() for match in promised} == tests
