"""A criterion and a recovery that somebody else writes, each in a file like this one, are there wherever ours are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest

from ebft import EBFTError, registry
from ebft.audit import main as audit
from ebft.config import EBFTConfig
from ebft.config.fields import setting
from ebft.pruning import Criterion, mask_of_best
from ebft.recovery import BlockRecovery, Footprint
from ebft.recovery.settings import Checked
from ebft.registry import register_criterion, register_recovery
from ebft.run import main

# --- what docs/extending.md walks through ---------------------------------------------------------------------------


class Alternating(Criterion):
    """Every other weight of a row is worth more: a criterion of no use, to show what one is."""

    needs = frozenset({"squares"})

    @dataclass(frozen=True)
    class Settings(Checked):
        """Its flags."""

        parity: int = setting(0, "which of every two weights is worth more", at_least=0, at_most=1)

    def mask(self, weight, inputs, pattern):
        worth = weight.abs() * inputs.norm()
        worth[:, self.settings.parity :: 2] += worth.max()
        return mask_of_best(worth, pattern, per_row=True)


class Rescaled(BlockRecovery):
    """Every matrix is multiplied by one number: a recovery of little use, to show what one is."""

    told: ClassVar[str] = "by a number a matrix"

    @dataclass(frozen=True)
    class Settings(Checked):
        """Its flags."""

        strength: float = setting(1.0, "how far the number is followed", at_least=0, at_most=1)

    def footprint(self, shapes):
        return Footprint(device={"the number of each matrix": 4 * len(shapes.matrices)}, flops=1e9)

    def recover(self, task):
        from ebft.recovery.judge import Judge

        judge = Judge(task, self.config.recover, self.place.device, self.place.ranks)
        for matrix in task.matrices:
            task.block.get_parameter(matrix.name).mul_(1 + 0.01 * self.settings.strength)
        return judge.result(notes=["every matrix was rescaled"])


# --- and that it works ----------------------------------------------------------------------------------------------


@pytest.fixture
def made_up() -> Iterator[None]:
    register_criterion("alternating")(Alternating)
    register_recovery("rescaled", scope="block")(Rescaled)
    yield
    for kind, name in ((registry.criteria, "alternating"), (registry.recoveries, "rescaled")):
        kind.forget(name)


FLAGS = ["--prune", "alternating", "--parity", "1", "--recover", "rescaled", "--strength", "0.5"]


@pytest.fixture
def flags(tiny, tmp_path, made_up) -> list[str]:
    text = str(tiny / "text.txt")
    small = ["--samples", "4", "--seqlen", "16", "--batch-size", "2", "--eval-seqlen", "32", "--device", "cpu"]
    files = ["--model", str(tiny / "model"), "--calibration", text, "--eval", text, "--windows", "packed"]
    return [*files, *small, *FLAGS, "--output", str(tmp_path / "out")]


def test_they_are_listed(made_up, capsys):
    assert main(["--help", "all"]) == 0
    shown = capsys.readouterr().out
    assert "--parity" in shown
    assert "--strength" in shown
    from ebft.cli.app import main as command

    assert command(["methods"]) == 0
    listed = capsys.readouterr().out
    for said in ("alternating", "rescaled", "to show what one is", "--parity", "--strength"):
        assert said in listed


def test_they_are_planned_run_resumed_reported_and_audited(flags, tmp_path, capsys):
    assert main([*flags, "--plan"]) == 0
    assert "the number of each matrix" in capsys.readouterr().out
    assert main(flags) == 0
    out = tmp_path / "out"
    summary = json.loads((out / "ebft_summary.json").read_text())
    assert summary["config"]["parity"] == 1
    assert summary["config"]["strength"] == 0.5
    assert "alternating" in summary["recipe"]
    for file in ("report.html", "README.md"):
        shown = (out / file).read_text()
        for said in ("alternating", "rescaled", "parity", "strength"):
            assert said in shown, (file, said)
    assert "by a number a matrix" in (out / "README.md").read_text()
    assert audit([str(out)]) == 0
    assert main([*flags, "--resume"]) == 0


def test_their_settings_are_theirs(made_up):
    with pytest.raises(EBFTError, match="--parity is a setting of --prune alternating, and --prune is wanda"):
        EBFTConfig.of(parity=1)
    with pytest.raises(EBFTError, match="--strength is 2; expected a share from 0 to 1"):
        EBFTConfig.of(recover="rescaled", strength=2)
