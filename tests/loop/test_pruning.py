"""Criteria and patterns: which weights go."""

import pytest
import torch
from conftest import random_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ebft import EBFTConfig, EBFTError, run_ebft
from ebft.pruning import Pattern, mask_of_best
from ebft.pruning.magnitude import Magnitude
from ebft.pruning.masker import make_masker
from ebft.pruning.statistics import InputStatistics
from ebft.pruning.wanda import Wanda


def statistics(inputs):
    result = InputStatistics.empty(inputs.shape[-1], inputs.device)
    result.add(inputs)
    return result


def test_input_statistics_add_up():
    x = torch.randn(4, 5, 7)
    whole, parts = statistics(x), InputStatistics.empty(7, x.device)
    for row in x:
        parts.add(row)
    assert whole.tokens == parts.tokens == 20
    torch.testing.assert_close(parts.squares, whole.squares)
    torch.testing.assert_close(whole.norm(), x.reshape(-1, 7).norm(dim=0) / 20**0.5)


def test_wanda_compares_within_a_row_and_weighs_by_the_inputs():
    weight, x = torch.randn(6, 40), torch.randn(100, 40) * torch.logspace(-2, 2, 40)
    mask = Wanda().mask(weight, statistics(x), Pattern(sparsity=0.6))
    score = weight.abs() * x.norm(dim=0)
    assert mask.sum(-1).tolist() == [16] * 6
    for row, kept in zip(score, mask, strict=True):
        assert row[kept].min() >= row[~kept].max()


def test_magnitude_compares_over_the_whole_matrix():
    weight = torch.randn(6, 40) * torch.arange(1, 7).unsqueeze(-1)
    mask = Magnitude().mask(weight, statistics(torch.ones(1, 40)), Pattern(sparsity=0.6))
    assert mask.sum() == 96
    assert weight.abs()[mask].min() >= weight.abs()[~mask].max()
    assert mask[5].sum() > mask[0].sum()


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:16", "1:2", "3:5"])
def test_n_m_keeps_the_best_of_each_group(pattern):
    pattern = Pattern.parse(pattern)
    weight = torch.randn(6, 80)
    for criterion in (Magnitude().mask, Wanda().mask):
        mask = criterion(weight, statistics(torch.ones(3, 80)), pattern)
        groups, scores = (t.reshape(-1, pattern.group) for t in (mask, weight.abs()))
        assert groups.sum(-1).unique().tolist() == [pattern.keep]
        kept = scores.masked_fill(~groups, torch.inf).min(-1).values
        assert (kept >= scores.masked_fill(groups, -torch.inf).max(-1).values).all()


@given(st.floats(0.01, 0.99), st.integers(1, 9), st.integers(1, 60), st.booleans())
@settings(max_examples=50, deadline=None)
def test_exactly_the_share_that_was_asked_for(sparsity, outputs, inputs, per_row):
    mask = mask_of_best(torch.randn(outputs, inputs), Pattern(sparsity=sparsity), per_row=per_row)
    if per_row:
        assert set(mask.sum(-1).tolist()) == {round(inputs * (1 - sparsity))}
    else:
        assert mask.sum() == round(inputs * outputs * (1 - sparsity))


def test_patterns_say_what_they_are():
    assert str(Pattern.parse(" 2:4 ")) == "2:4"
    assert str(Pattern(sparsity=0.7)) == "70%"
    assert Pattern.parse("1:4").sparsity == 0.75


def test_ties_go_left_in_every_criterion():
    for per_row in (False, True):
        mask = mask_of_best(torch.ones(2, 10), Pattern(sparsity=0.7), per_row=per_row)
        assert mask.flatten().nonzero().flatten().tolist() == ([0, 1, 2, 10, 11, 12] if per_row else [0, 1, 2, 3, 4, 5])


def test_conv1d_is_pruned_along_its_inputs(config, silent, tokenizer):
    """GPT-2 stores (inputs, outputs): N:M groups run down a column, and Wanda compares within one."""
    result = run_ebft(random_model("gpt2"), config(pattern="2:4", recover="none"), tokenizer=tokenizer, reporter=silent)
    mask = result.masks["transformer.h.0.mlp.c_fc.weight"]
    assert mask.shape == (32, 128)
    groups = mask.dense().T.reshape(128, 8, 4)
    assert groups.sum(-1).unique().tolist() == [2]
    wide = run_ebft(
        random_model("gpt2"), config(sparsity=0.5, recover="none", overwrite=True), tokenizer=tokenizer, reporter=silent
    )
    assert wide.masks["transformer.h.0.mlp.c_fc.weight"].dense().sum(0).unique().tolist() == [16]


def test_a_users_own_criterion_and_text(config, silent, tokenizer):
    seen = []

    def every_other(weight, inputs, pattern):
        seen.append((tuple(weight.shape), inputs.tokens, str(pattern)))
        return (torch.arange(weight.shape[1]) % 2 == 0).expand(weight.shape)

    text = (f"My own text, number {i}, about nothing in particular." for i in range(100))
    model = random_model("llama")
    result = run_ebft(
        model, config(sparsity=0.5), criterion=every_other, text=text, tokenizer=tokenizer, reporter=silent
    )
    assert len(seen) == 3 * 7
    assert seen[0] == ((32, 32), 8 * 24, "50%")
    for name, mask in result.masks.items():
        assert torch.count_nonzero(model.get_parameter(name)[:, 1::2]) == 0  # the model in memory has been pruned
        assert mask.density() == 0.5
    assert result.summary["calibration"]["begins"].startswith("My own text, number 0")
    assert result.summary["calibration"]["source"] == "an iterable of strings"
    assert result.summary["recipe"] == "every_other 50%, recovered by ebft"


def test_a_masker_may_change_weights_and_look_at_all_blocks_first(trained, config, silent, tmp_path, monkeypatch):
    """The pruned perplexity is that of the weights it left, and what it concluded is there when a run is resumed."""

    class Doubling:
        needs, given, name = frozenset({"sums", "gram"}), False, "doubling"

        def __init__(self, of):
            self.of, self.surveyor, self.taken = of, self, []

        def check(self, *_):
            pass

        def look(self, name, block, matrices, statistics):
            assert all(seen.gram.diagonal().allclose(seen.squares, rtol=1e-4) for (seen,) in statistics.values())
            assert all(seen.sums.shape == seen.squares.shape for (seen,) in statistics.values())
            return name, statistics[matrices[0].name][0].tokens

        def conclude(self, seen):
            return [list(pair) for pair in seen]

        def take(self, concluded):
            self.taken.append(concluded)

        def __call__(self, name, block, matrices, statistics):
            result = self.of(name, block, matrices, statistics)
            last = matrices[-1].name
            block.get_parameter(last).mul_(2)
            result.changed.append(last)
            return result

    made = []

    def doubling(*args):
        made.append(Doubling(make_masker(*args)))
        return made[-1]

    def run(output):
        settings = config(
            model=str(trained),
            recover="ebft",
            lr=0.0,
            samples=4,
            seqlen=16,
            eval="builtin",
            eval_seqlen=64,
            output=output,
        )
        return run_ebft(config=settings, reporter=silent)

    plain = run(str(tmp_path / "plain"))
    monkeypatch.setattr("ebft.pipeline.prepare.make_masker", doubling)
    doubled = run(str(tmp_path / "doubled"))
    (concluded,) = made[0].taken
    assert concluded == [[line["name"], 64] for line in doubled.blocks]
    values, before = (result.summary["perplexity"]["builtin"] for result in (doubled, plain))
    assert values["pruned"] == pytest.approx(values["recovered"], rel=1e-6)
    assert values["pruned"] != pytest.approx(before["pruned"], rel=1e-3)


def test_zeros_that_no_group_needs_are_not_enough(config, tokenizer, silent):
    """Half of the weights are 0, but not two of every four: 2:4 has something to prune, and pruned once has not."""
    model = random_model("llama-gqa")
    for matrix in (parameter for name, parameter in model.named_parameters() if "_proj" in name):
        matrix.data[:, ::4] = matrix.data[:, 1::8] = matrix.data[:, 2::8] = 0
    run_ebft(model, config(pattern="2:4"), tokenizer=tokenizer, reporter=silent)
    with pytest.raises(EBFTError, match="prunes only weights that are zero already"):
        run_ebft(model, config(pattern="2:4", overwrite=True), tokenizer=tokenizer, reporter=silent)


FLAP = {"structured": True, "uniform": True, "prune": "flap", "sparsity": 0.3}


@pytest.mark.parametrize("pruned", [{}, FLAP], ids=["wanda", "flap"])
def test_masks_go_by_the_inputs_of_the_block_if_asked(pruned, short_run, silent, tmp_path):
    """Unrecovered the sparse stream is the same whatever the targets are; so then are masks, and FLAP's biases."""
    saved = []
    for name, changes in {
        "paper": {"target": "sparse-stream"},
        "input": {"target": "dense-stream", "statistics": "input"},
        "target": {"target": "dense-stream"},
    }.items():
        run_ebft(config=EBFTConfig.of(**short_run(name, recover="none", eval="", **pruned, **changes)), reporter=silent)
        saved.append((tmp_path / name / "model.safetensors").read_bytes())
    assert saved[0] == saved[1]
    assert saved[0] != saved[2]


def test_other_statistics_leave_the_recovery_its_own(short_run, silent):
    """The closed form goes by the dense block's Gram matrices, on the stream that makes the targets."""

    def by_size(weight, inputs, pattern):  # the same masks, whatever the inputs are
        return mask_of_best(weight.abs(), pattern, per_row=False)

    errors = []
    for statistics in ("target", "input"):
        changes = {"target": "dense-stream", "statistics": statistics, "recover": "layerwise", "cg_inputs": "dense"}
        config = EBFTConfig.of(**short_run(statistics, eval="", **changes))
        result = run_ebft(config=config, criterion=by_size, reporter=silent)
        errors.append([line["loss_after"] for line in result.blocks])
    assert errors[0] == errors[1]
