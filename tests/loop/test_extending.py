"""docs/extending.md's criterion and recovery: what somebody else writes is wherever ours are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import tomllib
from faults import assert_same
from safetensors.torch import load_file

from ebft import EBFTError, registry
from ebft.audit import main as audit
from ebft.cli.app import main as ebft
from ebft.config import EBFTConfig
from ebft.output.folder import OutputFolder
from ebft.run import main
from ebft_kernels import load_masks

GUIDE = Path(__file__).parents[2] / "docs" / "extending.md"
NAMES = ("alternating", "rescaled")


def blocks_of_the_guide(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(), re.DOTALL)


@pytest.fixture
def made_up(monkeypatch) -> Iterator[ModuleType]:
    """A module of the guide's Python, which registers both methods."""
    module = ModuleType("of_the_guide")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile("\n\n".join(blocks_of_the_guide("python")), str(GUIDE), "exec"), module.__dict__)
    yield module
    for kind, name in zip((registry.criteria, registry.recoveries), NAMES, strict=True):
        kind.forget(name)


@pytest.fixture
def flags(tiny, tmp_path, made_up) -> list[str]:
    """Of a run with both, whose settings come from the command line and from a file."""
    (tmp_path / "settings.yaml").write_text("recover: rescaled\nstrength: 0.5\n")
    text = str(tiny / "text.txt")
    small = ["--samples", "4", "--seqlen", "16", "--batch-size", "2", "--eval-seqlen", "32", "--device", "cpu"]
    files = ["--model", str(tiny / "model"), "--calibration", text, "--eval", text, "--windows", "packed"]
    chosen = ["--prune", "alternating", "--parity", "1", "--config", str(tmp_path / "settings.yaml")]
    return [*files, *small, *chosen, "--output", str(tmp_path / "out")]


def test_they_are_listed(made_up, capsys):
    assert ebft(["methods"]) == 0
    listed = capsys.readouterr().out
    for said in (*NAMES, made_up.Alternating.__doc__, made_up.Rescaled.__doc__, "--parity", "--strength"):
        assert said in listed
    assert main(["--help", "all"]) == 0
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for said in ("--prune alternating", "--parity N", "which of every two weights", "--recover rescaled", "--strength"):
        assert said in shown
    assert main(["--help"]) == 0
    assert "--parity" not in capsys.readouterr().out  # it is not among the settings that matter to most


def test_an_installed_package_is_found_by_its_entry_points(tmp_path):
    """As pip would leave it: two files, and what the guide's lines of pyproject.toml become."""
    (tmp_path / "my_package").mkdir()
    for name, code in zip(NAMES, blocks_of_the_guide("python"), strict=True):
        (tmp_path / "my_package" / f"{name}.py").write_text(code)
    told = tmp_path / "my_package-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    points = tomllib.loads("".join(blocks_of_the_guide("toml")))["project"]["entry-points"]
    lines = [f"[{group}]\n{name} = {where}" for group, of in points.items() for name, where in of.items()]
    (told / "entry_points.txt").write_text("\n".join(lines))

    def listed() -> subprocess.CompletedProcess[str]:
        paths = os.pathsep.join([str(tmp_path), str(GUIDE.parents[1])])
        command = [sys.executable, "-m", "ebft", "methods"]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)

    said = listed().stdout
    assert all(f"  {name} " in said for name in NAMES)
    (tmp_path / "my_package" / "rescaled.py").write_text("import not_there")
    broken = listed()
    assert broken.returncode == 2
    assert "the recovery 'rescaled' of my_package.rescaled:Rescaled cannot be imported: No module" in broken.stderr


def test_they_are_planned(flags, tmp_path, capsys):
    assert main([*flags, "--plan"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"the number of each matrix +0\.000 GiB", said)
    assert not (tmp_path / "out").exists()
    assert main([*flags, "--plan", "--recover", "none"]) == 2  # the file's --strength is of no recovery now
    assert "--strength is a setting of --recover rescaled, and --recover is none" in capsys.readouterr().err


def test_they_run_and_are_reported_and_audited(flags, tiny, tmp_path):
    assert main(flags) == 0
    out = tmp_path / "out"
    summary = json.loads((out / "ebft_summary.json").read_text())
    assert (summary["config"]["parity"], summary["config"]["strength"]) == (1, 0.5)
    assert summary["recipe"].startswith("alternating 70%, recovered by rescaled")
    assert list(*summary["perplexity"].values()) == ["dense", "pruned", "recovered"]
    for file in ("report.html", "README.md"):
        shown = (out / file).read_text()
        for said in (*NAMES, "parity", "strength"):
            assert said in shown, (file, said)
    assert "tuned by a number a matrix, on" in (out / "README.md").read_text()
    page = (out / "report.html").read_text()
    assert "every matrix was rescaled" in page
    assert "Reconstruction error, block by block" in page  # although it has no losses to draw
    assert "No recovery was asked for" not in page
    dense, saved = (load_file(folder / "model.safetensors") for folder in (tiny / "model", out))
    for name, mask in load_masks(out / "masks.safetensors").items():
        assert mask.dense()[:, 1::2].sum() > 5 * mask.dense()[:, 0::2].sum()  # what --parity 1 says
        assert saved[name].equal(dense[name] * mask.dense() * 1.005), name  # what --strength 0.5 says
    assert audit([str(out), "--against", str(tiny / "model")]) == 0


def test_a_run_with_them_is_gone_on_with(flags, tmp_path, monkeypatch):
    assert main(flags) == 0
    (tmp_path / "out").rename(tmp_path / "whole")
    commit = OutputFolder.commit_part

    def interrupted(self, name, content, files=()):
        commit(self, name, content, files)
        if name == "block-00000":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(OutputFolder, "commit_part", interrupted)
        assert main(flags) != 0
    assert not (tmp_path / "out").exists()
    assert main([*flags, "--resume", "--strength", "1"]) == 2  # other settings are another run
    assert main([*flags, "--resume"]) == 0
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_their_settings_are_theirs(made_up):
    chosen = EBFTConfig.of(prune="alternating", parity=1, recover="rescaled")
    assert chosen.of_method(made_up.Alternating.Settings) == made_up.Alternating.Settings(parity=1)
    assert chosen.of_method(made_up.Rescaled.Settings).strength == 1.0
    with pytest.raises(EBFTError, match="--parity is a setting of --prune alternating, and --prune is wanda; expected"):
        EBFTConfig.of(parity=1)
    with pytest.raises(EBFTError, match="methods holds a setting of --prune alternating, and --prune is wanda"):
        EBFTConfig(methods=(made_up.Alternating.Settings(parity=1),))
    with pytest.raises(EBFTError, match="--strength is 2; expected a share from 0 to 1"):
        EBFTConfig.of(recover="rescaled", strength=2)
    with pytest.raises(EBFTError, match=r"--recover is 'rescald'; .* did you mean rescaled"):
        EBFTConfig.of(recover="rescald")
