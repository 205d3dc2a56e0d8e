"""SparseGPT against optimal brain surgeon as it is written down, one weight at a time in float64."""

import pytest
import torch
from conftest import random_model

from ebft import EBFTConfig, EBFTError, run_ebft
from ebft.model.decoder import Decoder
from ebft.output.audit import audit
from ebft.plan.planner import make_plan
from ebft.pruning import Pattern
from ebft.pruning.magnitude import Magnitude
from ebft.pruning.sparsegpt import SparseGPT
from ebft.pruning.statistics import InputObserver, InputStatistics
from ebft.pruning.wanda import Wanda

CPU = torch.device("cpu")


def made(outputs=6, inputs=24, tokens=300, dtype=torch.float64, seed=0):
    """A weight, correlated inputs of different sizes, and their statistics."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=generator, dtype=dtype) * 2 / inputs**0.5 + torch.eye(inputs)
    sizes = torch.logspace(-0.7, 0.7, inputs, dtype=dtype)[torch.randperm(inputs, generator=generator)]
    x = torch.randn(tokens, inputs, generator=generator, dtype=dtype) @ mixed * sizes
    weight = torch.randn(outputs, inputs, generator=generator, dtype=dtype)
    return weight, x, InputStatistics(tokens, x.square().sum(0), None, x.T @ x)


def damped(inputs):
    hessian = inputs.gram / inputs.tokens
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return hessian


def surgeon(weight, hessian, mask):
    """Pruned weights of a row go one after the other, and those to the right take over their part."""
    weight = weight.clone()
    for row, kept in zip(weight, mask, strict=True):
        for j in range(len(row)):
            inverse = torch.linalg.inv(hessian[j:, j:])
            if not kept[j]:
                row[j:] -= row[j] / inverse[0, 0] * inverse[:, 0]
                row[j] = 0
    return weight


def criterion(**settings):
    return SparseGPT(SparseGPT.Settings(**settings))


def cost(weight, pruned, x):
    return float((x @ (weight - pruned).T).square().sum())


@pytest.mark.parametrize("act_order", [False, True])
def test_the_update_is_that_of_the_surgeon(act_order):
    weight, _, inputs = made()
    mask = torch.rand(weight.shape) > 0.5
    pruned = criterion(act_order=act_order).update(weight, mask, inputs)
    hessian = damped(inputs)
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(len(hessian))
    expected = torch.empty_like(weight)
    expected[:, order] = surgeon(weight[:, order], hessian[order][:, order], mask[:, order])
    torch.testing.assert_close(pruned, expected, rtol=1e-9, atol=1e-9)
    assert torch.count_nonzero(pruned[~mask]) == 0


def test_n_m_masks_are_the_cheapest_of_each_group_as_it_is_when_its_turn_comes():
    weight, _, inputs = made(outputs=4, inputs=15)
    mask, pruned = criterion().mask(weight, inputs, Pattern.parse("2:5"))
    hessian = damped(inputs)
    for start in range(0, 15, 5):
        so_far = mask.clone()
        so_far[:, start:] = True
        now = surgeon(weight, hessian, so_far)
        for j in range(start, start + 5):
            now[:, j] = now[:, j].square() / torch.linalg.inv(hessian[j:, j:])[0, 0]
        best = now[:, start : start + 5].topk(2).indices.sort().values
        assert torch.equal(best, mask[:, start : start + 5].nonzero()[:, 1].reshape(4, 2))
    torch.testing.assert_close(pruned, surgeon(weight, hessian, mask), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inputs", [96, 300])
@pytest.mark.parametrize("act_order", [False, True])
def test_exact_counts_and_a_smaller_error_than_without_an_update(inputs, act_order):
    weight, x, seen = made(outputs=33, inputs=inputs, tokens=1000, dtype=torch.float32)
    pattern = Pattern(sparsity=0.57)
    mask, pruned = criterion(act_order=act_order).mask(weight, seen, pattern)
    assert mask.sum() == round(33 * inputs * 0.43)
    assert torch.count_nonzero(pruned[~mask]) == 0
    for other in (Wanda().mask, Magnitude().mask):
        assert cost(weight, pruned, x) < (1 if act_order else 0.8) * cost(
            weight, weight * other(weight, seen, pattern), x
        )


def test_dead_inputs_and_a_gram_matrix_without_a_factor():
    weight, x, _ = made(outputs=5, inputs=40, tokens=7, dtype=torch.float32)
    x[:, 3] = 0
    seen = InputStatistics.empty(40, CPU, {"gram"})
    seen.add(x)
    mask, pruned = criterion(sparsegpt_damping=0.0).mask(weight, seen, Pattern(sparsity=0.5))
    assert torch.isfinite(pruned).all()
    assert mask.sum() == 100
    assert torch.count_nonzero(pruned[:, 3]) == 0
    seen.gram.fill_(torch.nan)
    with pytest.raises(EBFTError, match=r"no Cholesky factor .* expected finite inputs"):
        criterion().mask(weight, seen, Pattern(sparsity=0.5))


@pytest.mark.parametrize(
    ("family", "distinct"), [("llama-gqa", 4), ("gpt2", 4), ("opt", 4), ("qwen2-moe", 2 + 2 * 4 + 3)]
)
def test_one_gram_matrix_for_each_tensor(family, distinct):
    """Shared where q, k, v and gate, up multiply one tensor; the same as those of matrices watched alone."""
    decoder = Decoder(random_model(family), CPU)
    block, hidden = decoder.working_block(0), torch.randn(2, 12, 32)
    together = InputObserver(block, decoder.matrices[0], {"gram", "sums"})
    alone = [InputObserver(block, [matrix], {"gram", "sums"}) for matrix in decoder.matrices[0]]
    for observer in (together, *alone):
        with observer.watching():
            for part in (hidden, hidden + 1):
                decoder.run_block(0, block, part)
    assert len({id(seen) for of_matrix in together.statistics.values() for seen in of_matrix}) <= distinct
    for observer in alone:
        for name, of_matrix in observer.statistics.items():
            for seen, expected in zip(together.statistics[name], of_matrix, strict=True):
                assert seen.tokens == expected.tokens
                assert torch.equal(seen.gram, expected.gram)
                assert torch.equal(seen.sums, expected.sums)


@pytest.mark.parametrize(
    ("family", "pattern"), [("llama-gqa", None), ("gpt2", "2:4"), ("mixtral", None)], ids=lambda value: str(value)
)
def test_a_run(family, pattern, config, silent, tokenizer):
    """Kept weights change before any recovery, the audit knows, and the report's pruned model is that one."""
    settings = config(prune="sparsegpt", pattern=pattern, recover="none", eval="builtin", samples=4)
    model = random_model(family)
    model.save_pretrained(settings.output.folder + "-dense")
    result = run_ebft(model, settings, tokenizer=tokenizer, reporter=silent)
    assert result.summary["recipe"].startswith(f"sparsegpt {pattern or '60%'}")
    found = audit(str(result.output), settings.output.folder + "-dense")
    assert found.faults == []
    dense = random_model(family)
    for name, mask in result.masks.items():
        kept = mask.dense()
        assert not torch.equal(model.get_parameter(name)[kept], dense.get_parameter(name)[kept])
    idle = settings.replace(recover="ebft", lr=0.0, output=settings.output.folder + "-idle")
    idle = run_ebft(random_model(family), idle, tokenizer=tokenizer, reporter=silent)
    saved, before_recovery = (of.summary["perplexity"]["builtin"]["pruned"] for of in (result, idle))
    assert before_recovery == pytest.approx(saved, rel=1e-6)


def test_memory_is_planned(tiny):
    given = {"model": str(tiny / "model"), "eval": "", "seqlen": 16, "samples": 2, "recover": "none", "device": "cpu"}
    plain, more = (make_plan(EBFTConfig.of(prune=prune, **given)).stages for prune in ("wanda", "sparsegpt"))
    grams = 4 * (3 * 32**2 + 48**2)  # what q, k, v multiply, o, what gate and up do, down
    assert more["dense pass, with statistics"] - plain["dense pass, with statistics"] == grams
    assert more["masks of a block"] - plain["masks of a block"] > grams


def test_settings_that_do_not_go_together():
    with pytest.raises(EBFTError, match=r"--act-order takes inputs out of the order .* --pattern 2:4"):
        EBFTConfig.of(prune="sparsegpt", act_order=True, pattern="2:4")
    with pytest.raises(EBFTError, match="--sparsegpt-damping is -1; expected a finite number of at least 0"):
        EBFTConfig.of(prune="sparsegpt", sparsegpt_damping=-1)
