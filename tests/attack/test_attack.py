"""The attacks themselves: traps spring where code is let run, and what does not survive is noticed."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jinja2
import pytest
import yaml

from tests.attack import attacks
from tests.attack.arena import differences
from tests.attack.attacks import ATTACKS, DOCUMENT, Row, table, write_table
from tests.attack.trap import Trap
from tests.attack.victim import Ended, Fallen, finish, start, wait
from tests.loop.faults import in_child

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "execute",
    [
        lambda trap: os.system(trap.shell),
        lambda trap: exec(trap.module),
        lambda trap: pickle.loads(trap.pickled),
        lambda trap: jinja2.Environment().from_string(trap.template).render(messages=[]),
        *(lambda trap, n=n: yaml.unsafe_load(trap.yaml[n]) for n in range(3)),
    ],
)
def test_every_trap_springs(execute, tmp_path):
    trap = Trap(tmp_path / "canary")
    assert not trap.sprung()
    execute(trap)
    assert trap.sprung()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (0, ""),
        (0, "ebft: fine"),
        (1, "ebft: a sentence"),
        (-11, ""),
        (2, ""),
        (2, "ebft: a sentence\nand another line"),
        (2, "ebft: one\nebft: two"),
        (2, "Traceback (most recent call last):\nebft: a sentence"),
    ],
)
def test_what_is_no_sentence(code, said):
    with pytest.raises(Fallen, match="expected exit code 2 and one sentence"):
        Ended(code, said).sentence()


def test_a_sentence():
    assert Ended(2, "loading x\nebft: no x; expected y\n").sentence() == "ebft: no x; expected y"


def ends_of_victims(folder: Path) -> None:
    """In a process without threads, which may be forked."""

    def killed() -> int:
        os.kill(os.getpid(), signal.SIGSEGV)
        return 0

    def raises() -> int:
        raise KeyError("x")

    def sleeps() -> int:
        time.sleep(60)
        return 0

    def takes_memory() -> int:
        return len(bytearray(2**30)) & 1

    def writes() -> int:
        try:
            Path("much").write_bytes(bytes(2**20))
        except OSError as error:
            print(error.strerror)
            return 2
        return 0

    assert finish(lambda: print("hello") or 7, folder) == Ended(7, "hello\n")
    assert finish(killed, folder).code == -signal.SIGSEGV
    assert finish(lambda: sys.exit(3), folder).code == 3
    assert "KeyError: 'x'" in finish(raises, folder).said
    assert finish(takes_memory, folder).code == 0
    assert "MemoryError" in finish(takes_memory, folder, memory=2**28).said
    assert finish(writes, folder) == Ended(0, "")
    assert finish(writes, folder, largest=2**10) == Ended(2, "File too large\n")
    assert wait(start(sleeps, folder, folder / "said"), 0.01) is None
    with pytest.raises(Fallen, match="still at work"):
        finish(sleeps, folder, patience=0.01)


def test_how_victims_end(tmp_path):
    assert in_child(ends_of_victims, tmp_path) == 0


def test_differences_are_those_of_content(tmp_path):
    """Times may differ, and nothing else: neither bytes nor permissions, files nor numbers."""
    one, other = tmp_path / "one", tmp_path / "other"
    output = one / "out"
    output.mkdir(parents=True)
    (output / "model.safetensors").write_bytes(b"weights")
    (output / "ebft_summary.json").write_text(json.dumps({"sparsity": 0.5, "seconds": 1, "lora": {"seconds": 1}}))
    (output / "blocks.jsonl").write_text(json.dumps({"block": 0, "peak_memory_bytes": 1}) + "\n")
    (output / "report.html").write_text("sparsity 50%<dt>time</dt><dd>1 s</dd>")
    shutil.copytree(one, other)
    changed = other / "out"
    (changed / "ebft_summary.json").write_text(json.dumps({"sparsity": 0.5, "seconds": 2, "lora": {"seconds": 3}}))
    (changed / "blocks.jsonl").write_text(json.dumps({"block": 0, "peak_memory_bytes": 2}) + "\n")
    (changed / "report.html").write_text("sparsity 50%<dt>time</dt><dd>1 min 2 s</dd>")
    assert differences(one, other) == []
    (changed / "ebft_summary.json").write_text(json.dumps({"sparsity": 0.6, "seconds": 2, "lora": {"seconds": 3}}))
    (changed / "blocks.jsonl").write_text(json.dumps({"block": 1, "peak_memory_bytes": 2}) + "\n")
    (changed / "report.html").write_text("sparsity 60%<dt>time</dt><dd>1 s</dd>")
    (changed / "model.safetensors").chmod(0o600)
    (changed / "more").write_text("x")
    names = ["blocks.jsonl", "ebft_summary.json", "model.safetensors", "more", "report.html"]
    assert differences(one, other) == [f"out/{name}" for name in names]


def test_the_document_tells_of_every_attack(tmp_path, monkeypatch):
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [name for name in ATTACKS if f"\n| `{name}` |" not in text] == []
    monkeypatch.setattr(attacks, "DOCUMENT", tmp_path / "reliability.md")
    (tmp_path / "reliability.md").write_text(text, encoding="utf-8")
    rows = [Row("full disks", 3, 2, r"python -m \1")]
    for _ in range(2):
        write_table(rows)
        written = (tmp_path / "reliability.md").read_text(encoding="utf-8")
        assert written.count(table(rows)) == 1
    assert written.split("<!-- table")[0] == text.split("<!-- table")[0]
    assert written.split("end of table -->")[1] == text.split("end of table -->")[1]


@pytest.mark.parametrize(("survived", "code"), [(3, 0), (2, 1)])
def test_the_exit_code(survived, code, monkeypatch):
    monkeypatch.setattr(attacks, "attack", lambda names, *rest: [Row(name, 3, survived, "") for name in names])
    assert attacks.main(["kill", "disk"]) == code


def test_an_attack_that_there_is_not(capsys):
    with pytest.raises(SystemExit):
        attacks.main(["storm"])
    assert "there is no attack 'storm'; expected some of kill, disk" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["kill", "disk"])
def test_attacks_are_survived(attack):
    done = subprocess.run(
        [sys.executable, "-m", "tests.attack", attack, "--rounds", "8"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"python -m tests.attack {attack} --seed " in done.stdout
