"""What the packages import is declared, and nothing heavy comes before it is needed (contracts: pyproject.toml)."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("ebft", "ebft_kernels")


def imports_of(file: Path) -> list[str]:
    """The modules that a file imports, wherever the import stands."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def test_what_is_imported_is_declared():
    declared = {re.split(r"[<>=;\[ ]", line)[0].lower() for line in dependencies()}
    known_as = {"yaml": "pyyaml"}
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    assert len(files) > 100
    for file in files:
        for module in imports_of(file):
            top = module.split(".")[0]
            if top not in sys.stdlib_module_names and top not in PACKAGES:
                assert known_as.get(top, top).lower() in declared, f"{file} imports {top}"


def dependencies() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'"([^"]+)"', re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)[1])


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_reaches_for_nothing(package):
    """No datasets (seconds), no compiler at import; the kernels bring no transformers along."""
    banned = ["torch", "transformers", "datasets"] if package == "ebft" else ["transformers", "datasets", "triton"]
    code = f"import sys, {package}; print([name for name in {banned} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
