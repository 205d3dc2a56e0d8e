"""Transposable N:M, against all patterns one by one and against the optimum of the linear program (a flow)."""

from itertools import combinations, product

import networkx
import pytest
import torch
from conftest import random_model

from ebft import EBFTConfig, EBFTError, run_ebft
from ebft.output.audit import audit
from ebft.pruning import Pattern, mask_of_best
from ebft.pruning.sparsegpt import SparseGPT
from ebft.pruning.statistics import InputStatistics
from ebft.pruning.transposable import transposable_mask
from ebft.pruning.wanda import Wanda
from ebft_kernels import PackedMask, load_masks, save_masks


def is_transposable(mask, keep, group):
    return all(PackedMask.from_dense(side.contiguous()).is_nm(keep, group) for side in (mask, mask.T))


def tiles_of(matrix, group):
    rows, columns = matrix.shape
    cut = matrix.reshape(rows // group, group, columns // group, group)
    return cut.transpose(1, 2).reshape(-1, group, group)


def best_of_all(tile, keep):
    size, best = len(tile), -float("inf")
    for rows in product(combinations(range(size), keep), repeat=size):
        if all(sum(j in row for row in rows) == keep for j in range(size)):
            best = max(best, sum(float(tile[i, j]) for i, row in enumerate(rows) for j in row))
    return best


def optimum(tile, keep):
    """The largest sum, by a flow of least cost in whole millionths."""
    graph = networkx.DiGraph()
    for i in range(len(tile)):
        graph.add_edge("from", ("row", i), capacity=keep, weight=0)
        graph.add_edge(("column", i), "to", capacity=keep, weight=0)
        for j, score in enumerate(tile[i].tolist()):
            graph.add_edge(("row", i), ("column", j), capacity=1, weight=-round(score * 1e6))
    flow = networkx.max_flow_min_cost(graph, "from", "to")
    return sum(s for i, row in enumerate(tile.tolist()) for j, s in enumerate(row) if flow["row", i]["column", j])


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 4), (3, 4), (1, 2), (2, 3)])
def test_small_tiles_are_the_best_there_are(keep, group):
    scores = torch.randn(2 * group, 3 * group, generator=torch.Generator().manual_seed(0)).double()
    mask = transposable_mask(scores, keep, group)
    assert is_transposable(mask, keep, group)
    for tile, kept in zip(tiles_of(scores, group), tiles_of(mask, group), strict=True):
        assert kept.sum() == keep * group
        assert float(tile[kept].sum()) == pytest.approx(best_of_all(tile, keep))


@pytest.mark.parametrize(("keep", "group"), [(4, 8), (1, 8), (6, 8), (3, 5), (8, 16), (4, 16)])
@pytest.mark.parametrize("like", ["weights", "wanda"])
def test_large_tiles_come_near_the_best(keep, group, like):
    """Within 1 % of the optimum, every one."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2 * group, 4 * group, generator=generator).abs()
    if like == "wanda":  # inputs and outputs of very different sizes
        sizes = torch.logspace(-1, 1, 4 * group)[torch.randperm(4 * group, generator=generator)]
        scores *= sizes * torch.rand(2 * group, 1, generator=generator)
    mask = transposable_mask(scores, keep, group)
    assert is_transposable(mask, keep, group)
    for tile, kept in zip(tiles_of(scores, group), tiles_of(mask, group), strict=True):
        assert kept.sum() == keep * group
        assert float(tile[kept].sum()) >= 0.99 * optimum(tile, keep)


@pytest.mark.parametrize("group", [4, 8, 16, 32])
def test_scores_that_say_nothing_still_give_a_mask(group):
    """Ties everywhere, zeros, and a tile with one row that is worth everything."""
    scores = torch.zeros(3 * group, 2 * group)
    scores[group : 2 * group] = 1
    scores[2 * group] = 1e6
    mask = transposable_mask(scores, group // 2, group)
    assert is_transposable(mask, group // 2, group)
    assert mask.sum() == mask.numel() // 2


def test_sparsegpt_scores_all_columns_first_and_updates_for_that_mask():
    torch.manual_seed(0)
    x = torch.randn(400, 32) @ (torch.eye(32) + 0.3 * torch.randn(32, 32))
    weight, seen = torch.randn(16, 32), InputStatistics.empty(32, x.device, {"gram"})
    seen.add(x)
    pattern = Pattern.parse("4:8", transposable=True)
    mask, pruned = SparseGPT().mask(weight, seen, pattern)
    assert is_transposable(mask, 4, 8)
    assert mask.sum() == 256
    torch.testing.assert_close(pruned, SparseGPT().update(weight, mask, seen))
    without = weight * Wanda().mask(weight, seen, pattern)
    assert (x @ (weight - pruned).T).square().sum() < (x @ (weight - without).T).square().sum()


@pytest.mark.parametrize(
    ("family", "prune", "pattern"),
    [("llama-gqa", "wanda", "2:4"), ("gpt2", "sparsegpt", "2:4"), ("mixtral", "ria", "4:8")],
)
def test_runs(family, prune, pattern, config, silent, tokenizer, tmp_path):
    random_model(family).save_pretrained(tmp_path / "dense")
    settings = config(prune=prune, pattern=pattern, transposable=True, recover="none", samples=4)
    result = run_ebft(random_model(family), settings, tokenizer=tokenizer, reporter=silent)
    assert result.summary["recipe"] == f"{prune} {pattern} transposable, no recovery"
    keep, group = map(int, pattern.split(":"))
    for mask in result.masks.values():
        for matrix in mask.dense().reshape(-1, *mask.shape[-2:]):
            assert is_transposable(matrix, keep, group)
    assert audit(str(result.output), str(tmp_path / "dense")).faults == []
    masks = load_masks(result.output / "masks.safetensors")
    name, mask = next(iter(masks.items()))
    masks[name] = PackedMask.from_dense(first_of_groups(mask.shape, -2 if family == "gpt2" else -1, keep, group))
    save_masks(masks, result.output / "masks.safetensors")
    assert f"the mask of {name} is not {pattern} transposable" in audit(str(result.output)).faults


def first_of_groups(shape, along, keep, group):
    """N:M along the inputs, the first of every group, and so not along the outputs."""
    first = torch.arange(shape[along]) % group < keep
    return (first.unsqueeze(-1) if along == -2 else first).expand(shape).contiguous()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"pattern": None}, "--transposable is of N:M masks; expected --pattern with it"),
        (
            {"refine": "dsnot"},
            "--transposable holds along the outputs too, which --refine dsnot would not keep so",
        ),
        ({"refresh_every": 5}, "which --refresh-every 5 would not keep so; expected one of both"),
    ],
)
def test_what_does_not_go_together(settings, says):
    with pytest.raises(EBFTError, match=says):
        EBFTConfig.of(**{"pattern": "2:4", "transposable": True, **settings})


def test_sizes_that_cannot_be_cut_and_masks_that_are_there(config, silent, tokenizer):
    assert mask_of_best(torch.rand(4, 8), Pattern.parse("2:4", transposable=True), per_row=True).sum() == 16
    pattern = Pattern.parse("2:4", transposable=True)
    with pytest.raises(EBFTError, match="--pattern 2:4 transposable: q has 6 outputs, which 4 does not divide"):
        pattern.check_shape("q", 6, 8)
    settings = config(prune="zeros", pattern="2:4", transposable=True)
    with pytest.raises(
        EBFTError, match="--transposable is how a criterion prunes, and --prune is zeros; expected a criterion"
    ):
        run_ebft(random_model("llama-gqa"), settings, tokenizer=tokenizer, reporter=silent)
