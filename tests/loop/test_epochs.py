"""--epochs-where error: epochs that blocks save go to later ones with a larger error."""

import pytest
from faults import assert_same

from ebft import EBFTConfig, EBFTError, run_ebft
from ebft.recovery.ebft import EBFT, reconstruct
from ebft.recovery.ebft.epochs import epochs_for

WHERE = {"epochs_where": "error", "holdout": 0.3}


def line(error, epochs):
    return {"relative_error_before": error, "epochs": epochs}


@pytest.mark.parametrize(
    ("finished", "error", "most"),
    [
        ([], 1.0, 4),
        ([line(0.1, 2), line(0.3, 3)], 0.3, 7),  # 3 saved, and the mean is 0.2
        ([line(0.1, 2), line(0.3, 3)], 0.2, 4),
        ([line(0.1, 1), line(0.1, 1), line(0.1, 1)], 0.3, 8),  # 9 saved, and no more than twice 4
        ([line(0.1, 1), line(0.2, 7)], 0.3, 4),  # 3 were saved and are spent
        ([line(0.1, 4)], float("nan"), 4),
    ],
)
def test_what_a_block_may_take(finished, error, most):
    assert epochs_for(EBFT.Settings(epochs=4, epochs_where="error"), finished, error) == most
    assert epochs_for(EBFT.Settings(epochs=4), finished, error) == 4


@pytest.fixture
def given():
    """Blocks end after their first epoch, because of a learning rate that is far too large for them."""
    return {
        **WHERE,
        "samples": 10,
        "epochs": 4,
        "patience": 1,
        "lr": 1.0,
        "recover": "layerwise+ebft",
        "target": "dense-stream",
    }


def test_a_run_spends_no_more_in_all(given, short_run, silent, monkeypatch):
    """Errors are those of the pruned blocks, although the closed form comes first."""
    asked = []

    def told(own, finished, error):
        asked.append((finished, error, epochs_for(own, finished, error)))
        return asked[-1][2]

    monkeypatch.setattr(reconstruct, "epochs_for", told)
    lines = run_ebft(config=EBFTConfig.of(**short_run(**given)), reporter=silent).blocks
    for index, ((finished, error, most), line) in enumerate(zip(asked, lines, strict=True)):
        assert [before["block"] for before in finished] == list(range(index))
        assert error == pytest.approx(line["relative_error_before"])
        assert 1 <= line["epochs"] <= most
        assert len(line["losses"]) == line["epochs"] * 4
    assert lines[0]["epochs"] < 4
    assert any(most > 4 for _, _, most in asked)
    assert sum(line["epochs"] for line in lines) <= 4 * len(lines)


def test_it_is_gone_on_with(given, short_run, silent, tmp_path, monkeypatch):
    run_ebft(config=EBFTConfig.of(**short_run("whole", **given)), reporter=silent)

    class Stop(Exception):
        pass

    def stopped(own, finished, error):
        if finished:
            raise Stop
        return epochs_for(own, finished, error)

    monkeypatch.setattr(reconstruct, "epochs_for", stopped)
    with pytest.raises(Stop):
        run_ebft(config=EBFTConfig.of(**short_run(**given)), reporter=silent)
    monkeypatch.undo()
    run_ebft(config=EBFTConfig.of(**short_run(**given, resume=True)), reporter=silent)
    assert_same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"holdout": 0}, "which none does without --holdout; expected --holdout above 0"),
        ({"input": "dense-stream", "target": "dense-stream"}, "expected --input sparse-stream or mix"),
        ({"unit": "halves"}, "expected --unit block"),
    ],
)
def test_what_it_needs(changes, says):
    with pytest.raises(EBFTError, match=says):
        EBFTConfig.of(**{**WHERE, **changes})
