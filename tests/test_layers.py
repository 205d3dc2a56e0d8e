"""The two packages, and which way they look: read from the imports themselves."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ebft_kernels

ROOT = Path(__file__).parent.parent


def imports_of(file: Path) -> list[tuple[str, list[str]]]:
    """(module, names taken from it) for every import in a file, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, [alias.name for alias in node.names]))
    return found


def files_of(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 5
    return files


def test_the_kernels_know_nothing_of_language_models():
    for file in files_of("ebft_kernels"):
        for module, _ in imports_of(file):
            assert module.split(".")[0] not in {"ebft", "transformers", "datasets", "benchmarks", "tests"}, file


def test_the_loop_uses_only_public_names_of_the_kernels():
    used = set()
    for file in files_of("ebft"):
        for module, names in imports_of(file):
            assert not module.startswith("ebft_kernels."), f"{file} looks inside: {module}"
            assert module.split(".")[0] not in {"benchmarks", "tests"}, file
            if module == "ebft_kernels":
                used.update(names)
    assert used
    assert used <= set(ebft_kernels.__all__)


ORDER = {
    "ebft_kernels": [
        "_build",
        "_extension",
        "adamw",
        "reference",
        "_triton",
        "ops",
        "_build",
        "_extension",
        "dispatch",
        "sharding",
        "mask",
        "updates",
        "functional",
        "compressed",
        "nn",
        "states",
        "optim",
        "compressed",
        "testing",
        "__init__",
    ],
    "ebft": [
        "version",
        "errors",
        "files",
        "limits",
        "ranks",
        "devices",
        "shapes",
        "glue",
        "matrices",
        "pruning",
        "config",
        "command_line",
        "report",
        "report_page",
        "weights",
        "checkpoint",
        "in_memory",
        "output",
        "decoder",
        "biases",
        "narrow",
        "stream",
        "calibration",
        "generation",
        "evaluate",
        "zero_shot",
        "recovery",
        "reconstruct",
        "checks",
        "job",
        "plan",
        "survey",
        "walk",
        "pipeline",
        "audit",
        "compressed",
        "__init__",
        "compress",
        "run",
        "compress",
    ],
}


@pytest.mark.parametrize("package", ORDER)
def test_files_import_only_from_those_below(package):
    order = ORDER[package]
    for file in files_of(package):
        room = file.relative_to(ROOT / package).parts[0].removesuffix(".py")
        for module, names in imports_of(file):
            top, _, rest = module.partition(".")
            if top == package:
                used = [rest.split(".")[0]] if rest else [name for name in names if name in order]
                for name in used:
                    assert name == room or order.index(name) < order.index(room), f"{file.name} imports {name}"


def test_what_is_imported_is_declared():
    declared = {re.split(r"[<>=;\[ ]", line)[0].lower() for line in tomllib_dependencies()}
    known_as = {"yaml": "pyyaml"}
    for package in ORDER:
        for file in files_of(package):
            for module, _ in imports_of(file):
                top = module.split(".")[0]
                if top not in sys.stdlib_module_names and top not in ORDER:
                    assert known_as.get(top, top).lower() in declared, f"{file} imports {top}"


def tomllib_dependencies() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'"([^"]+)"', re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)[1])


@pytest.mark.parametrize("package", ["ebft", "ebft_kernels"])
def test_importing_reaches_for_nothing(package):
    """No datasets (seconds), no compiler at import; the kernels bring no transformers along."""
    banned = ["datasets"] if package == "ebft" else ["transformers", "datasets", "triton"]
    code = f"import sys, {package}; print([name for name in {banned} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
