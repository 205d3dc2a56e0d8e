"""RIA and DSnoT, against what they say of one weight or one row at a time."""

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file
from several import job, on_ranks

from ebft import EBFTConfig, EBFTError, run_ebft
from ebft.model.matrices import find_matrices
from ebft.output.audit import audit
from ebft.pruning import Pattern
from ebft.pruning.dsnot import dsnot
from ebft.pruning.magnitude import Magnitude
from ebft.pruning.masker import make_masker
from ebft.pruning.ria import RIA
from ebft.pruning.sparsegpt import SparseGPT
from ebft.pruning.statistics import InputStatistics
from ebft.pruning.wanda import Wanda
from ebft_kernels import PackedMask, load_masks, save_masks


def made(outputs, inputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, inputs, generator=generator) * torch.rand(inputs, generator=generator) * 2
    x += torch.randn(inputs, generator=generator)
    seen = InputStatistics.empty(inputs, x.device, {"sums"})
    seen.add(x)
    return torch.randn(outputs, inputs, generator=generator), x, seen


def test_ria_scores_shares_of_row_and_column():
    weight, x, seen = made(7, 20)
    weight[2] *= 30
    weight[4] = 0
    scores = torch.zeros(7, 20, dtype=torch.float64)
    size = weight.abs().double()
    for i in range(7):
        for j in range(20):
            if size[i, j]:
                share = size[i, j] / size[i].sum() + size[i, j] / size[:, j].sum()
                scores[i, j] = share * x[:, j].double().square().sum() ** 0.25
    mask = RIA().mask(weight, seen, Pattern(sparsity=0.6))
    assert mask.sum() == round(140 * 0.4)
    assert scores[mask].min() >= scores[~mask].max()
    groups = RIA().mask(weight, seen, Pattern.parse("2:4")).reshape(-1, 4)
    assert groups.sum(1).unique().tolist() == [2]


def test_an_input_that_is_constant_is_the_first_to_be_taken():
    """Its variance is 0, so what it is worth is infinite."""
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 5.0, -5.0, 0.0])
    x[:, 0] = 10
    seen = InputStatistics.empty(4, x.device, {"sums"})
    seen.add(x)
    weight, mask = torch.tensor([[1.0, 0.3, 0.3, 1.0]]), torch.tensor([[False, True, True, True]])
    better = dsnot(weight, mask, seen, Pattern(sparsity=0.25), threshold=0.1, cycles=50)
    errors = [abs(float((weight * x.mean(0)).masked_fill(m, 0).sum())) for m in (mask, better)]
    assert better[0, 0]
    assert errors[1] < 2 < errors[0]


def row_by_row(weight, mask, x, width, threshold, cycles):
    """The same in float64, with loops over rows and weights."""
    mask, x = mask.clone(), x.double()
    mean, variance, norm = x.mean(0), x.var(0, correction=0), x.norm(dim=0)
    for w, kept in zip(weight.double(), mask, strict=True):
        for _ in range(cycles):
            error = (w * mean)[~kept].sum()
            if abs(error) < threshold:
                break
            helps = [j for j in range(len(w)) if w[j] * mean[j] * error > 0]
            hurts = [j for j in range(len(w)) if w[j] * mean[j] * error < 0]
            pairs = [
                (abs(w[g] * mean[g]) / variance[g], -abs(w[p]) * norm[p], g, p)
                for g in helps
                for p in hurts
                if not kept[g] and kept[p] and g // width == p // width
            ]
            if not pairs:
                break
            _, _, g, p = max(pairs)
            if abs(error - w[g] * mean[g] + w[p] * mean[p]) >= abs(error):
                break
            kept[g], kept[p] = True, False
    return mask


@pytest.mark.parametrize("pattern", [Pattern(sparsity=0.6), Pattern.parse("2:4"), Pattern.parse("3:5")], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_swaps_are_those_of_single_rows(pattern, threshold):
    weight, x, seen = made(12, 20)
    start = Wanda().mask(weight, seen, pattern)
    mask = dsnot(weight, start, seen, pattern, threshold=threshold, cycles=6)
    assert torch.equal(mask, row_by_row(weight, start, x, pattern.group or 20, threshold, 6))
    assert not torch.equal(mask, start)
    assert torch.equal(mask.sum(1), start.sum(1))
    if pattern.group:
        assert mask.reshape(-1, pattern.group).sum(1).unique().tolist() == [pattern.keep]
    errors = [((weight * x.mean(0)) * ~kept).sum(1).abs() for kept in (start, mask)]
    assert (errors[1] <= errors[0]).all()


def test_a_row_that_is_done_stays():
    weight, _, seen = made(8, 20)
    start = Magnitude().mask(weight, seen, Pattern(sparsity=0.5))
    assert torch.equal(dsnot(weight, start, seen, Pattern(0.5), threshold=1e9, cycles=50), start)
    for kept in (torch.zeros_like(start), torch.ones_like(start)):  # nothing to prune, nothing to grow
        assert torch.equal(dsnot(weight, kept, seen, Pattern(0.5), threshold=0.0, cycles=50), kept)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama-gqa", {"prune": "wanda"}),
        ("mixtral", {"prune": "ria"}),
        ("gpt2", {"prune": "sparsegpt", "pattern": "2:4"}),
    ],
    ids=["llama-wanda", "mixtral-ria", "gpt2-sparsegpt"],
)
def test_runs(family, settings, config, silent, tokenizer, tmp_path):
    """Other masks with as many weights; sound, also where SparseGPT's update follows; pruned is what was pruned."""
    usual = {"recover": "none", "samples": 4, "eval": "builtin"}
    random_model(family).save_pretrained(tmp_path / "dense")

    def run(output, **more):
        model, chosen = random_model(family), config(output=str(tmp_path / output), **{**usual, **settings, **more})
        return run_ebft(model, chosen, tokenizer=tokenizer, reporter=silent)

    better = {"refine": "dsnot", "dsnot_threshold": 0.0}
    plain, refined, idle = run("plain"), run("refined", **better), run("idle", **better, recover="ebft", lr=0.0)
    assert any(mask != refined.masks[name] for name, mask in plain.masks.items())
    assert all(mask.count() == refined.masks[name].count() for name, mask in plain.masks.items())
    assert audit(str(refined.output), str(tmp_path / "dense")).faults == []
    saved, before_recovery = (of.summary["perplexity"]["builtin"]["pruned"] for of in (refined, idle))
    assert before_recovery == pytest.approx(saved, rel=1e-6)
    assert ", then DSnoT, " in refined.summary["recipe"]


def test_masks_from_a_file(config, silent, tokenizer, tmp_path):
    model = random_model("llama-gqa")
    first = run_ebft(model, config(recover="none", pattern="2:4"), tokenizer=tokenizer, reporter=silent)
    given = {"prune": str(first.output / "masks.safetensors"), "refine": "dsnot", "recover": "none"}
    given |= {"dsnot_threshold": 0.0, "output": tmp_path / "second"}
    second = run_ebft(random_model("llama-gqa"), config(pattern="2:4", **given), tokenizer=tokenizer, reporter=silent)
    assert all(mask.is_nm(2, 4) for mask in second.masks.values())
    assert any(mask != first.masks[name] for name, mask in second.masks.items())
    masks = load_masks(given["prune"])
    name = next(iter(masks))
    masks[name] = PackedMask.ones(masks[name].shape)
    save_masks(masks, tmp_path / "other.safetensors")
    given |= {"prune": str(tmp_path / "other.safetensors"), "overwrite": True}
    with pytest.raises(EBFTError, match=f"--pattern is 2:4, and what --prune .* keeps of {name} is not"):
        run_ebft(random_model("llama-gqa"), config(pattern="2:4", **given), tokenizer=tokenizer, reporter=silent)


def test_ranks_choose_the_same_masks(short_run, tmp_path):
    """Gram matrices, sums and outliers over all sequences, whoever has them."""
    settings = {"prune": "sparsegpt", "refine": "dsnot", "dsnot_threshold": 0.0, "allocation": "owl", "sparsity": 0.5}
    for count in (1, 2):
        assert on_ranks(count, job, short_run(f"on-{count}", recover="none", eval="", **settings)) == [0] * count
    one, two = (load_file(tmp_path / f"on-{count}" / "masks.safetensors") for count in (1, 2))
    assert all(torch.equal(words, two[name]) for name, words in one.items())


def test_what_does_not_go_together(config, silent, tokenizer):
    for settings in ({"prune": "zeros"}, {"structured": True}):
        with pytest.raises(EBFTError, match="--refine dsnot swaps single weights for pruned ones, and cannot with --"):
            EBFTConfig.of(refine="dsnot", **settings)
    with pytest.raises(EBFTError, match="--dsnot-cycles is 0; expected a whole number of at least 1"):
        EBFTConfig.of(refine="dsnot", dsnot_cycles=0)

    def updating(weight, inputs, pattern):
        return SparseGPT().mask(weight, inputs, pattern)

    updating.needs = SparseGPT.needs
    model = random_model("llama-gqa")
    with pytest.raises(EBFTError, match="goes by the dense weights, and the criterion has changed them"):
        run_ebft(model, config(refine="dsnot"), criterion=updating, tokenizer=tokenizer, reporter=silent)


def test_a_matrix_that_saw_no_tokens_keeps_its_mask_and_the_report_says_so():
    model = random_model("llama")
    block, matrices = model.model.layers[0], find_matrices(model.model.layers[0])
    config = EBFTConfig.of(prune="magnitude", refine="dsnot", sparsity=0.5)
    plain, refined = (make_masker(c)("block", block, matrices, {}) for c in (config.replace(refine="none"), config))
    assert plain.masks == refined.masks
    assert all(any(f"{matrix.name} (or experts" in note for note in refined.notes) for matrix in matrices)
