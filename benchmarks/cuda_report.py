"""What nvcc says of csrc/cuda: each kernel's registers, spills and shared memory on every architecture; no GPU needed.

    python -m benchmarks.cuda_report                  # writes results/static/cuda.json and cuda.md
    python -m benchmarks.cuda_report --arch 80 90

A verdict a line; exit code 1 if a file does not compile or a kernel spills, 2 where there is no nvcc.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS
from ebft_kernels._build import NVCC_FLAGS, cuda_sources

CSRC = Path(__file__).parent.parent / "csrc"
ARCHITECTURES = (75, 80, 86, 89, 90, 100)
_REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


def device_sources() -> list[Path]:
    """The .cu files: the binding beside them needs a torch that has CUDA."""
    return [file for file in cuda_sources(CSRC) if file.suffix == ".cu"]


def compile_facts(file: Path, architecture: int) -> list[dict[str, Any]]:
    """One row a kernel: from ptxas, through ``nvcc -Xptxas -v``. ``CalledProcessError`` if it does not compile."""
    with tempfile.TemporaryDirectory() as scratch:
        target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        command = ["nvcc", *NVCC_FLAGS, "-Xptxas", "-v", target, f"-I{CSRC}", "-c", str(file), "-o", f"{scratch}/out.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = []
    for found in _REPORT.finditer(done.stderr):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        rows.append(
            {
                "file": file.name,
                "kernel": _readable(found["name"]),
                "sm": architecture,
                "registers": int(found["registers"]),
                "stack": int(found["stack"]),
                "spill_bytes": int(found["stores"]) + int(found["loads"]),
                "shared_bytes": int(shared[1]) if shared else 0,
            }
        )
    return rows


def _readable(mangled: str) -> str:
    filt = shutil.which("c++filt")
    if filt is None:
        return mangled
    name = subprocess.run([filt, mangled], capture_output=True, text=True, check=True).stdout.strip()
    # Without namespaces, of which one is named by nvcc's hash of the file, and without arguments.
    return re.sub(r"ebft::cuda::|_GLOBAL__N__\w+::|\(anonymous namespace\)::|^void |\([^()]*\)$", "", name)


def main() -> int:
    """Compile everything, print the verdicts, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--out", type=Path, default=RESULTS / "static")
    given = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("there is no nvcc here; the CUDA sources were not compiled", file=sys.stderr)
        return 2
    rows, failed = [], 0
    for file in device_sources():
        for architecture in given.arch:
            try:
                facts = compile_facts(file, architecture)
            except subprocess.CalledProcessError as error:
                failed += 1
                print(f"FAILS  {file.name} sm_{architecture}: {error.stderr.strip()[-500:]}")
                continue
            rows += facts
            spilled = [row["kernel"] for row in facts if row["spill_bytes"] or row["stack"]]
            failed += bool(spilled)
            most = max(row["registers"] for row in facts)
            verdict = (
                f"spills in {', '.join(spilled)}"
                if spilled
                else f"{len(facts)} kernels, at most {most} registers, no spills"
            )
            print(f"{'FAILS' if spilled else 'ok   '}  {file.name} sm_{architecture}: {verdict}", flush=True)
    version = (
        subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
        .stdout.strip()
        .splitlines()[-1]
    )
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "cuda.json").write_text(
        json.dumps({"nvcc": version, "kernels": rows}, indent=1) + "\n", encoding="utf-8"
    )
    columns = ("file", "kernel", "sm", "registers", "stack", "spill_bytes", "shared_bytes")
    table = [
        f"# csrc/cuda, as compiled by {version}",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
    ]
    table += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]
    (given.out / "cuda.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
