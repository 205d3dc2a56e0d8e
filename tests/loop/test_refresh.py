"""--refresh-every: masks that are partly chosen anew while a block is tuned."""

import json

import pytest
import torch
from conftest import random_model
from torch import nn

from ebft import BlockReconstructor, EBFTConfig, EBFTError, run_ebft
from ebft.output.audit import audit
from ebft.plan.planner import make_plan
from ebft.pruning import mask_of_best
from ebft.recovery.ebft.refresh import MaskRefresh, exchanged
from ebft_kernels import MaskedAdamW, PackedMask, load_masks

CPU = torch.device("cpu")


def by_hand(mask, drop, grow, share, group):
    """One row at a time, in plain Python."""
    rows = []
    for kept, weak, strong in zip(mask.tolist(), drop.tolist(), grow.tolist(), strict=True):
        row, count = list(kept), round(share * sum(kept))
        count = count if group else min(count, len(kept) - sum(kept))
        if not group:
            for place in sorted((n for n, k in enumerate(kept) if k), key=lambda n: weak[n])[:count]:
                row[place] = False
            for place in sorted((n for n, k in enumerate(kept) if not k), key=lambda n: -strong[n])[:count]:
                row[place] = True
        else:
            pairs = []
            for start in range(0, len(kept), group):
                places = range(start, start + group)
                worst = min((n for n in places if kept[n]), key=lambda n: weak[n])
                best = max((n for n in places if not kept[n]), key=lambda n: strong[n])
                pairs.append((weak[worst], worst, best))
            for _, worst, best in sorted(pairs)[:count]:
                row[worst], row[best] = False, True
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_the_exchange(group, share):
    torch.manual_seed(0)
    drop, grow = torch.rand(7, 24), torch.rand(7, 24)
    mask = PackedMask.from_scores(torch.rand(7, 24), 2, 4).dense() if group else torch.rand(7, 24) > 0.6
    new = exchanged(mask, drop, grow, share, group)
    assert torch.equal(new, by_hand(mask, drop, grow, share, group))
    assert torch.equal(new.sum(-1), mask.sum(-1))
    assert not torch.equal(new, mask)
    assert not group or PackedMask.from_dense(new).is_nm(2, 4)


def test_rows_with_nothing_to_exchange():
    mask = torch.tensor([[True] * 4, [False] * 4, [True, True, True, False]])
    scores = torch.full((3, 4), torch.nan), torch.rand(3, 4)
    for group in (0, 4):
        new = exchanged(mask, scores[1], scores[0], 1.0, group)
        assert torch.equal(new.sum(-1), mask.sum(-1))
        assert torch.equal(new[:2], mask[:2])


@pytest.mark.parametrize("grow", ["gradient", "gradient2"])
def test_scores_are_those_of_weights_moments_and_gradients(grow):
    """Two batches' gradients, whose mean and mean square differ in order; survivors keep their moments."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(12, 5, bias=False))
    weight, mask = block[0].weight, torch.rand(5, 12) > 0.5
    optimizer = MaskedAdamW([weight], lr=0.01, masks={weight: mask}, moments="bf16", compact=True)
    weight.grad = torch.randn(5, 12)
    optimizer.step()
    second, before = optimizer.second_moment(weight), weight.detach().clone()
    settings = EBFTConfig.of(refresh_every=2, refresh_share=0.4, refresh_grow=grow)
    refresh = MaskRefresh(settings, block, {"0.weight": PackedMask.from_dense(mask)}, optimizer, steps=10)
    assert [step for step in range(1, 11) if refresh.due(step)] == [2, 4, 6]
    gradients = torch.randn(2, 5, 12)
    for gradient in gradients:
        weight.grad = gradient.clone()
        refresh.see_gradients()
    score = gradients.sum(0).abs() if grow == "gradient" else gradients.square().sum(0)
    refresh.choose()
    new = by_hand(mask, before.abs() * second.sqrt(), score, 0.4, 0)
    assert torch.equal(refresh.masks["0.weight"].dense(), new)
    assert optimizer.mask_of(weight) == refresh.masks["0.weight"]
    assert torch.equal(weight.detach(), before * (mask & new))  # newcomers begin at 0
    torch.testing.assert_close(optimizer.second_moment(weight), second * (mask & new))
    assert refresh.changed() == refresh.masks
    assert "masks refreshed 1 times" in refresh.notes()[0]


def problem():
    """A layer of which one weight in five matters, and a mask that keeps any one in five."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(32, 32, bias=False)).requires_grad_(False)
    block[0].weight.mul_(torch.rand(32, 32) < 0.2)
    inputs = torch.randn(16, 4, 32)
    targets = block(inputs)
    masks = {"0.weight": PackedMask.from_topk(torch.rand(32, 32), 7)}
    masks["0.weight"].zero_pruned_(block[0].weight)
    return block, inputs, targets, masks


@pytest.mark.parametrize("layout", [{}, {"moments": "int8", "compact": True}, {"micro_batch": 3}])
def test_random_masks_become_better(layout):
    errors = {}
    for every in (0, 6):
        block, inputs, targets, masks = problem()
        of_refresh = {"refresh_every": every, "refresh_share": 0.25} if every else {}
        settings = EBFTConfig.of(lr=1e-2, epochs=16, batch_size=4, weight_decay=0.0, **of_refresh, **layout)
        result = BlockReconstructor(settings, CPU).fit(block, inputs, targets, masks=masks)
        mask = result.masks.get("0.weight", masks["0.weight"])
        assert bool(result.masks) == bool(every)
        assert torch.equal(mask.dense().sum(1), masks["0.weight"].dense().sum(1))
        assert torch.count_nonzero(block[0].weight[~mask.dense()]) == 0
        errors[every] = result.error_after
    assert errors[6] < 0.5 * errors[0]


@pytest.mark.parametrize("holdout", [0.0, 0.25])
def test_earlier_weights_have_their_masks(holdout):
    """Tuning diverges at once, so that the weights, and masks, of the beginning are kept."""
    block, inputs, targets, masks = problem()
    before = block[0].weight.clone()
    settings = EBFTConfig.of(refresh_every=1, lr=3.0, epochs=3, batch_size=4, weight_decay=0.0, holdout=holdout)
    result = BlockReconstructor(settings, CPU).fit(block, inputs, targets, masks=masks)
    assert torch.equal(block[0].weight, before)
    assert not result.masks


def any_masks(weight, inputs, pattern):
    """A criterion that looks at nothing."""
    scores = torch.rand(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    return mask_of_best(scores, pattern, per_row=True)


@pytest.mark.parametrize(
    ("family", "given"),
    [("gpt2", {"pattern": "2:4"}), ("mixtral", {"sparsity": 0.6}), ("llama-gqa", {"unit": "halves"})],
)
def test_a_run(family, given, config, tokenizer, silent, tmp_path):
    """The new masks are those that are saved, of Conv1D and fused experts too; and an auditor finds no fault."""
    masks, results, perplexity = {}, {}, {}
    for every in (0, 4):
        of_refresh = {"refresh_every": every, "refresh_share": 0.1} if every else {}
        settings = config(epochs=8, eval="builtin", output=str(tmp_path / str(every)), **of_refresh, **given)
        results[every] = run_ebft(
            random_model(family), settings, criterion=any_masks, tokenizer=tokenizer, reporter=silent
        )
        masks[every] = load_masks(results[every].output / "masks.safetensors")
        perplexity[every] = results[every].summary["perplexity"]["builtin"]
    assert perplexity[0]["pruned"] == pytest.approx(perplexity[4]["pruned"], rel=1e-5)
    assert perplexity[0]["recovered"] != perplexity[4]["recovered"]
    assert masks[0] != masks[4]
    for line in results[4].blocks:
        assert any("masks refreshed" in note for note in line["notes"])
    for name, mask in masks[4].items():
        assert mask.count() == masks[0][name].count()
        weight = results[4].model.get_parameter(name)
        assert torch.count_nonzero(weight[~mask.dense()]) == 0
        if "pattern" in given:
            assert PackedMask.from_dense(mask.dense().mT.contiguous()).is_nm(2, 4)
    assert [line["matrices"] for line in results[0].blocks] == [line["matrices"] for line in results[4].blocks]
    assert not audit(str(results[4].output)).faults
    assert json.loads((results[4].output / "ebft_summary.json").read_text())["config"]["refresh_every"] == 4


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"refresh_every": -1}, "--refresh-every is -1; expected a whole number of at least 0"),
        ({"refresh_share": 0}, "--refresh-share is 0; expected a share above 0 and up to 1"),
        ({"refresh_every": 4, "optimizer": "muon"}, "and --optimizer is muon; expected --optimizer adamw"),
        ({"refresh_every": 4, "update_in_backward": True, "clip": 0}, "which --update-in-backward never makes"),
        ({"refresh_every": 4, "structured": True}, "which --structured does not have"),
    ],
)
def test_what_it_does_not_go_with(given, says):
    with pytest.raises(EBFTError, match=says):
        EBFTConfig.of(**given)
    with pytest.raises(EBFTError, match="products in float16 need a loss scale"):
        BlockReconstructor(EBFTConfig.of(refresh_every=4), CPU, torch.float16)


def test_a_plan_counts_it(short_run):
    without, with_it = (make_plan(EBFTConfig.of(**short_run(refresh_every=every, eval=""))) for every in (0, 2))
    assert with_it.device_peak > without.device_peak
    assert with_it.flops > without.flops
    assert sum(with_it.disk.values()) > sum(without.disk.values())
