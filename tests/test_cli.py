"""The command ``ebft``: what it says at once, without torch; and its reference page."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ebft.cli.app import COMMANDS, main
from ebft.cli.evaluate import SETTINGS
from ebft.cli.heavy import importing
from ebft.cli.reference import page
from ebft.config import flag

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "numpy")


def in_a_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("said", "exit_code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["methods"], 0),
        (["run", "--help"], 0),
        (["run", "--help", "all"], 0),
        (["plan", "--help"], 0),
        (["rn"], 2),
        (["run", "--sparsty", "0.5"], 2),
        (["run", "--sparsity", "2"], 2),
        (["run", "--recover", "none", "--epochs", "3"], 2),
        (["run", "--preset", "ligt"], 2),
        (["run", "--calibration", "/no/such"], 2),
        (["run", "--eval", "/no/such"], 2),
        (["run", "/no/such"], 2),
        (["run", "nobody/nothing"], 2),
        (["run", "--prune", "zeros", "--teacher", "nobody/nothing"], 2),
        (["plan", "nobody/nothing"], 2),
        (["eval", "nobody/nothing"], 2),
        (["eval", "--against", "/no/such"], 2),
        (["eval", str(ROOT), "--eval", "wikitext2"], 2),
        (["audit", "/no/such"], 2),
        (["compress", "/no/such", "out"], 2),
    ],
    ids=lambda of: " ".join(of) if isinstance(of, list) else "",
)
def test_it_answers_without_torch(said, exit_code):
    code = f"import sys; from ebft.cli.app import main; code = main({said!r}); "
    code += f"print('imported', [name for name in {HEAVY!r} if name in sys.modules], code)"
    assert in_a_new_process(code).splitlines()[-1] == f"imported [] {exit_code}"


def test_nothing_is_looked_for_among_what_is_imported():
    code = "import gc; from ebft.cli.heavy import importing\n"
    code += "with importing():\n    import torch; print(gc.isenabled(), end=' ')\n"
    code += "print(gc.isenabled(), gc.get_freeze_count() > 100_000)\n"
    code += "with importing():\n    import torch; print(gc.isenabled())"  # it is there already: a run may be going on
    assert in_a_new_process(code).split() == ["False", "True", "True", "True"]


@pytest.mark.parametrize(("quiet", "on_terminal"), [(False, True), (True, True), (False, False)])
def test_a_terminal_shows_that_modules_are_imported(quiet, on_terminal, monkeypatch, capfd):
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if on_terminal else "0")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with importing(quiet=quiet):
        pass
    shown = capfd.readouterr()
    assert ("importing torch" in shown.err) == (on_terminal and not quiet)
    assert not shown.out


def test_the_package_itself_is_lazy():
    code = f"import sys, ebft; print([name for name in {HEAVY!r} if name in sys.modules], ebft.EBFTConfig.__name__)"
    assert in_a_new_process(code).strip() == "[] EBFTConfig"


def test_eval_has_its_settings_from_those_of_a_run(capsys):
    assert main(["eval", "--help"]) == 0
    assert {flag(name) for name in SETTINGS} <= flags_in(capsys.readouterr().out)


def test_the_help_has_two_levels(capsys):
    assert main(["run", "--help"]) == 0
    basic = flags_in(capsys.readouterr().out)
    assert main(["run", "--help", "all"]) == 0
    everything = flags_in(capsys.readouterr().out)
    assert {"--model", "--sparsity", "--recover", "--output", "--resume"} <= basic < everything
    assert len(basic) < 30
    assert {"--cg-iterations", "--sparsegpt-damping", "--moments", "--max-shard-size"} <= everything - basic


def flags_in(text: str) -> set[str]:
    return {name for name in re.findall(r"--[a-z][a-z-]*", text) if not name.startswith("--no-") and name != "--help"}


def test_every_command_has_its_help(capsys):
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        said = capsys.readouterr().out
        assert "Usage" in said
        assert (f"ebft {command} --help all" in said) == (command in ("run", "plan"))


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (["run", "--sparsty", "0.5"], "Did you mean --sparsity"),
        (["run", "--prune", "wnda"], "did you mean wanda"),
        (["run", "--preset", "ligt"], "did you mean light"),
        (["run", "--epochs", "x"], "--epochs is 'x'; expected a whole number"),
        (["run", "--lr", "-1"], "--lr is -1; expected a finite number of at least 0"),
        (["run", "--cg-iterations", "3"], "--cg-iterations is a setting of --recover layerwise, and --recover is ebft"),
        (["run", "model", "second"], "second was not expected there"),
        (["plan", "--on", "rtx409"], "--on is 'rtx409'; expected here, h200"),
        (["run", "--plan", "rtx409"], "--plan is 'rtx409'; expected here, h200"),
        (["run", str(ROOT), "--calibration", "c4"], "text c4 (allenai/c4) cannot be read from the hub: "),
        (["eval", str(ROOT)], "text wikitext2 (Salesforce/wikitext) cannot be read from the hub: "),
        (["audt"], 'Did you mean "audit"'),
    ],
    ids=lambda of: " ".join(of) if isinstance(of, list) else "",
)
def test_a_mistake_is_one_sentence_that_names_the_right_word(said, sentence, capsys):
    assert main(said) == 2
    error = capsys.readouterr().err
    assert error.startswith("ebft: ")
    assert error.count("\n") == 1
    assert sentence in error


def test_the_reference_page_is_current():
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == page(), (
        "run: python -m ebft.cli.reference > docs/settings.md"
    )
