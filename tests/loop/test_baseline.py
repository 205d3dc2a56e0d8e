"""The loop against the straightforward one of benchmarks/: the same masks, losses and weights."""

import copy

import pytest
import torch
from conftest import random_model

from benchmarks.baseline_loop import run_baseline
from ebft import run_ebft
from ebft.data.calibration import calibration_tokens


def test_both_loops_do_the_same(config, silent, tokenizer):
    settings = config(sparsity=0.6, epochs=3, lr=1e-3, weight_decay=0.1, device="cpu")
    ours, theirs = random_model("llama-gqa"), random_model("llama-gqa")
    tokens = calibration_tokens("builtin", tokenizer, samples=8, seqlen=24, windows="packed")
    dense = copy.deepcopy(theirs.state_dict())
    baseline = run_baseline(theirs, tokens.ids, settings)
    result = run_ebft(ours, settings, tokenizer=tokenizer, reporter=silent)
    assert len(baseline.losses) == 3
    for line, losses in zip(result.blocks, baseline.losses, strict=True):
        assert line["losses"] == pytest.approx(losses, rel=2e-3)
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weight, rtol=2e-2, atol=2e-4)
        if name in result.masks:
            assert torch.count_nonzero(weight[~result.masks[name].dense()]) == 0
            assert not torch.equal(weight, dense[name])
    assert baseline.tuning_seconds > 0
