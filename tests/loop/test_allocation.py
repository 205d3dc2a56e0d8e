"""Shares of blocks and matrices: OWL's and a file's."""

import json
import re

import pytest
import torch
from conftest import random_model

from ebft import EBFTConfig, EBFTError, run_ebft
from ebft.model.matrices import find_matrices
from ebft.pruning import Pattern
from ebft.pruning.allocation import LAMBDA, by_outliers, make_allocation, outliers
from ebft.pruning.statistics import InputStatistics


def test_outliers_are_counted_over_the_whole_block():
    block = torch.nn.ModuleDict({"a": torch.nn.Linear(6, 10), "b": torch.nn.Linear(10, 4)}).requires_grad_(False)
    matrices = find_matrices(block)
    block["b"].weight[1, 2] = 90.0
    block["a"].weight[3, 4] = -400.0
    seen = {m.name: [InputStatistics(50, torch.rand(m.inputs) * 50)] for m in matrices}
    scores = torch.cat([
        (block[name].weight.double().abs() * (seen[f"{name}.weight"][0].squares.double() / 50).sqrt()).flatten()
        for name in ("a", "b")
    ])  # fmt: skip
    expected = float((scores > 5 * scores.mean()).double().mean())
    assert expected > 0
    assert outliers(block, matrices, seen) == expected


def test_shares_have_the_mean_that_was_asked_for():
    sizes, ratios = [100, 300, 50, 50], [0.01, 0.03, 0.2, 0.0]
    shares = by_outliers(sizes, ratios, 0.7)
    assert sum(n * share for n, share in zip(sizes, shares, strict=True)) == pytest.approx(0.7 * 500, rel=1e-12)
    assert min(shares) == shares[2] == pytest.approx(0.7 - LAMBDA)
    assert max(shares) == shares[3] <= 0.7 + LAMBDA
    gaps = [(shares[0] - shares[1]) / 0.02, (shares[1] - shares[2]) / 0.17]
    assert gaps[0] == pytest.approx(gaps[1])  # linear in the outliers
    assert by_outliers([1, 2], [0.1, 0.1], 0.5) == [0.5, 0.5]


@pytest.mark.parametrize("prune", ["wanda", "sparsegpt"])
def test_a_run_by_owl(prune, config, silent, tokenizer):
    """Within the range, the mean that was asked for but for rounding, more kept where a block has outliers."""
    model = random_model("llama-gqa")
    weight = model.get_parameter("model.layers.1.mlp.up_proj.weight").data
    weight[torch.rand(weight.shape) > 0.97] *= 20
    settings = config(prune=prune, allocation="owl", sparsity=0.5, recover="none", refine="dsnot")
    result = run_ebft(model, settings, tokenizer=tokenizer, reporter=silent)
    shares = [line["sparsity"] for line in result.blocks]
    assert min(shares) == shares[1] < 0.44
    assert all(0.5 - LAMBDA - 0.02 < share < 0.5 + LAMBDA + 0.02 for share in shares)
    assert result.summary["sparsity"] == pytest.approx(0.5, abs=0.015)  # rows of 32 and 48
    assert result.summary["recipe"].startswith(f"{prune} 50% by OWL, then DSnoT")


def test_a_file(config, silent, tokenizer, tmp_path):
    """A matrix's own share beats its block's, and what is not named has the run's."""
    file = tmp_path / "shares.json"
    shares = {"0": 0.25, "model.layers.1": 0.75, "model.layers.1.mlp.up_proj.weight": 0}
    file.write_text(json.dumps(shares))
    given = config(prune="magnitude", allocation=str(file), sparsity=0.5, recover="none", overwrite=True)
    lines = run_ebft(random_model("llama-gqa"), given, tokenizer=tokenizer, reporter=silent).blocks
    assert set(lines[0]["matrices"].values()) == {0.25}
    assert set(lines[2]["matrices"].values()) == {0.5}
    assert lines[1]["matrices"].pop("mlp.up_proj.weight") == 0
    assert set(lines[1]["matrices"].values()) == {0.75}
    for wrong, says in (
        (
            {"model.layers.9": 0.5},
            "has a share for 'model.layers.9'; expected a block such as model.layers.0, its numb",
        ),
        ({"0": 1}, "has 1 for 0; expected a share from 0 up to, not including, 1"),
        ([0.5], "holds list; expected an object, name -> share"),
        ({str(i): 0 for i in range(3)}, "prunes nothing"),
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(EBFTError, match=re.escape(says)):
            run_ebft(random_model("llama-gqa"), given, tokenizer=tokenizer, reporter=silent)
    with pytest.raises(EBFTError, match=r"--allocation is 'none\.json'; expected uniform, owl or a JSON file"):
        make_allocation("none.json", Pattern(0.5))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"pattern": "2:4"}, "--allocation owl gives blocks shares of their own, and --pattern 2:4 is the same"),
        ({"structured": True}, "--allocation owl gives blocks shares of their own, and --structured compares blocks"),
        ({"sparsity": 0.95}, r"prunes up to 0\.08 less and more than --sparsity, which is 0\.95; expected 0\.08 to"),
        ({"allocation": "x.json", "schedule": "0.3,0.5"}, r"--allocation x\.json fixes shares, and --schedule raises"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(settings, says):
    with pytest.raises(EBFTError, match=says):
        EBFTConfig.of(**{"allocation": "owl", **settings})


def test_masks_that_are_there_already_have_their_shares(config):
    with pytest.raises(EBFTError, match="--allocation owl has no effect with --prune zeros: it needs a criterion"):
        config(prune="zeros", allocation="owl")
