"""Learning rates that find themselves: the search on known curves, in a block, over a run; and runs by time."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from faults import job
from several import on_ranks
from torch import nn

import ebft.recovery.allowance
from ebft import EBFTConfig, EBFTError, run_ebft
from ebft.cli.flags import config_of
from ebft.config.fields import parse_seconds
from ebft.distributed import Ranks
from ebft.pipeline.context import Clock
from ebft.pipeline.pace import Pace
from ebft.recovery.allowance import Allowance
from ebft.recovery.ebft.reconstruct import BlockReconstructor
from ebft.recovery.rates import COST, FACTOR, FIRST, Trials, found_rate
from ebft_kernels import PackedMask

CPU = torch.device("cpu")


def valley(lowest: float):
    """Losses that rise with the distance from the best rate, on a logarithmic scale; 1 without a trial."""
    return lambda rate, steps: 0.5 + 0.1 * abs(math.log(rate / lowest))


@pytest.mark.parametrize("lowest", [2e-3, 9e-3, 0.03, 0.11, 0.8])
def test_the_best_rate_is_found_wherever_it_is(lowest):
    trials = Trials(valley(lowest), length=4, judging=1.0, most=1000)
    assert max(lowest, trials.climbed(FIRST, 1.0)) / min(lowest, trials.climbed(FIRST, 1.0)) <= math.sqrt(FACTOR) * 1.01


def test_rates_that_diverge_lose():
    def loss(rate, steps):
        return math.nan if rate > 0.02 else valley(0.1)(rate, steps)

    assert Trials(loss, length=4, judging=1.0, most=1000).climbed(FIRST, 1.0) == pytest.approx(0.01)


def test_where_the_first_does_harm_no_higher_one_is_tried():
    tried = []

    def loss(rate, steps):
        tried.append(rate)
        return 2.0 if rate > 0.02 else 0.5

    Trials(loss, length=4, judging=1.0, most=1000).climbed(FIRST, 1.0)
    assert max(tried) == FIRST


def test_where_no_lower_one_is_to_be_tried_the_first_stays():
    trials = Trials(valley(1e-3), length=4, judging=1.0, most=1000)
    assert trials.climbed(FIRST, 1.0, down=False) == FIRST
    assert trials.climbed(FIRST, 1.0) < FIRST / 10


@pytest.mark.parametrize(("steps", "blocks"), [(28, 6), (28, 30), (224, 30), (8, 2), (1, 1)])
def test_trials_cost_no_more_than_they_may(steps, blocks):
    """Over a whole walk, but for two trials in the first block, which there are in any case."""
    finished, spent = [], 0.0
    for _ in range(blocks):
        trials = Trials.of(valley(0.2), steps=steps, judging=1.3, whole=steps * blocks)
        rate = found_rate(trials, 1.0, steps, finished)
        finished.append({"learning_rate": rate, "trial_steps": trials.spent})
        spent += trials.spent
        assert trials.length <= max(1, steps // 4)
    assert spent <= max(COST * steps * blocks, 2 * (trials.length + 1.3))


def test_later_blocks_step_aside_and_keep_what_is_better():
    """The best rate moves from block to block, and the search follows it, sides in turn."""
    finished = []
    for index in range(60):
        trials = Trials.of(valley(0.03 * 1.05**index), steps=100, judging=1.0, whole=6000)
        rate = found_rate(trials, 1.0, 100, finished)
        finished.append({"learning_rate": rate, "trial_steps": trials.spent})
    assert rate > 0.2
    assert {line["trial_steps"] for line in finished} > {0.0}


def fitted(**given):
    """A pruned block, tuned for two epochs on twelve samples; its result, and the block."""
    torch.manual_seed(0)
    block, dense = (nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
    block.load_state_dict(dense.state_dict())
    masks = {n: PackedMask.from_dense(torch.rand(p.shape) > 0.5) for n, p in block.named_parameters() if p.dim() == 2}
    for name, mask in masks.items():
        mask.zero_pruned_(block.get_parameter(name).data)
    inputs = torch.randn(12, 8, 16)
    with torch.no_grad():
        targets = dense(inputs)
    settings = {"epochs": 2, "batch_size": 1, "lr": "auto", "lr_scale": "rms", "holdout": 0.25, "weight_decay": 0.0}
    config = EBFTConfig.of(**{**settings, **given})
    seconds = given.get("time") and 4.0
    return BlockReconstructor(config, CPU).fit(block, inputs, targets, masks=masks, seconds=seconds), block


def test_a_trial_leaves_no_trace():
    """Weights and states begin anew: the same bits as at the rate that was found, given as a number."""
    found, block = fitted()
    given, other = fitted(lr=found.learning_rate)
    assert found.trial_steps > 0
    assert given.trial_steps == 0
    assert found.losses == given.losses
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "sign", "muon"])
def test_any_optimizer_begins_anew(optimizer):
    found, block = fitted(optimizer=optimizer)
    _, other = fitted(optimizer=optimizer, lr=found.learning_rate)
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"holdout": 0.0}, "expected --holdout above 0"),
        ({"lr_scale": "absolute"}, "expected --lr-scale rms"),
        ({"target": "dense-stream", "input": "dense-stream"}, "expected --input sparse-stream or mix, or a number"),
        ({"lr": "much"}, "--lr is 'much'; expected auto or a number"),
        ({"time": "soon"}, "--time is 'soon'; expected a time such as 90s, 10m or 1h30m"),
        ({"time": "1m", "epochs": 3}, "--epochs 3 has no effect with --time 1m"),
        ({"time": "1m", "refresh_every": 4}, "--refresh-every counts a block's steps beforehand"),
        ({"time": "1m", "recover": "layerwise"}, "it needs a recovery that goes by time"),
        ({"time": "1m", "schedule": [0.4, 0.5]}, "expected one of them"),
        ({"recover": "distill", "samples": 1}, "--samples is 1; expected 2 or more"),
    ],
)
def test_what_does_not_go_together_is_said(given, sentence):
    settings = {"lr": "auto", "lr_scale": "rms", "holdout": 0.1} if given.get("recover") is None else {}
    with pytest.raises(EBFTError) as said:
        EBFTConfig.of(**{**settings, **given})
    assert sentence in str(said.value)


def test_a_time_alone_asks_for_the_best_preset():
    """On the command line, unless another one is named; without a time it is the published recipe."""
    common = {"model": "x", "calibration": "builtin", "eval": "builtin"}
    assert config_of(**common, time="10m").recover.method == "ebft+distill"
    assert config_of("light", **common, time="10m").recover.method == "ebft"
    assert config_of(**common).flat() == EBFTConfig.preset("paper", **common).flat()


def test_times():
    assert [parse_seconds(text, "") for text in ("90s", "10m", "1h30m", "0.5h")] == [90, 600, 5400, 1800]
    for text in ("", "m", "10", "-1m", "0s", "1m2h", "1..5m"):
        with pytest.raises(EBFTError, match="expected a time"):
            parse_seconds(text, "--time")


def test_a_block_takes_its_time(monkeypatch):
    """A clock that is a tenth of a second later every time it is read."""
    now = iter(range(10**6))
    monkeypatch.setattr(ebft.recovery.allowance, "time", SimpleNamespace(perf_counter=lambda: next(now) / 10))
    result, _ = fitted(time="1m", epochs=10)
    assert 4.0 <= result.seconds < 5.0
    assert 5 < len(result.losses) < 40


def pace_of(limit: str | None, whole: bool = True) -> Pace:
    """Of a model of 1 MB on a clock that the test sets, with 10 s of measuring and a walk that began after 20 s."""
    config = EBFTConfig.preset("best", model="x", **({} if limit is None else {"time": limit}))
    clock = Clock()
    clock.total = lambda: clock.now
    clock.now = 20.0
    model = nn.Linear(500, 500, bias=False)
    context = SimpleNamespace(
        config=config,
        clock=clock,
        decoder=SimpleNamespace(model=model),
        recovery=object(),
        whole_model={"distill": object()} if whole else {},
        reporter=SimpleNamespace(say=lambda sentence: None),
        ranks=Ranks(),
        sharing=Ranks(),
    )
    pace = Pace(context)
    pace.begin_walk(10.0)
    return pace


def test_the_plan_of_the_time_adds_up():
    """However long blocks take, the recovery of the whole model ends when measuring and saving have to begin."""
    pace = pace_of("10m")
    lines, clock = [], pace.context.clock
    for index in range(10):
        seconds = pace.of_block(lines, 10)
        tuning = seconds * (1.5 if index == 3 else 1.0)
        lines.append({"seconds": tuning + 2.0, "tuning_seconds": tuning})
        clock.now += tuning + 2.0
    walk = clock.now - 20
    assert walk == pytest.approx(0.3 * (600 * 0.97 - 20 - 3 - 20), rel=0.1)
    clock.now += 10
    clock.laps["pruned_perplexity"] = 10.0
    assert clock.now + pace.of_whole(1) == pytest.approx(600 * 0.97 - 10 - 3, abs=1)
    clock.now = 1000
    assert pace.of_whole(1) == pace.of_block(lines[:9], 10) == 0


def test_without_a_time_nothing_is_limited():
    pace = pace_of(None)
    assert pace.of_block([], 10) is None
    assert pace.of_whole(1) is None
    allowance = Allowance(None, CPU, SimpleNamespace())
    assert allowance.passed() == 0
    assert allowance.left() is None


def test_the_walk_alone_has_all_of_it():
    pace, part = pace_of("10m", whole=False), pace_of("10m")
    lines = [{"seconds": 5.0, "tuning_seconds": 5.0}]
    assert pace.of_block(lines, 10) == pytest.approx(part.of_block(lines, 10) / 0.3)


@pytest.mark.parametrize("preset", ["light", "best"])
def test_the_presets_find_their_rates(preset, short_run, silent):
    """And a rate that was found stands in the lines of the blocks, which a resumed run goes on from."""
    settings = short_run("one", samples=8, batch_size=2)
    settings = {name: value for name, value in settings.items() if name not in ("lr", "epochs")}
    result = run_ebft(config=EBFTConfig.preset(preset, **settings), reporter=silent)
    assert all(block["learning_rate"] > 0 for block in result.blocks)
    assert result.blocks[0]["trial_steps"] > 0
    assert ("distill" in result.summary["whole_model"]) == (preset == "best")


def test_a_run_by_time_ends(short_run, silent):
    """In a time that is over before it begins: a step in each block and one of the whole model, and all is saved."""
    settings = short_run("one", samples=8, batch_size=2, time="0.1s")
    settings = {name: value for name, value in settings.items() if name not in ("lr", "epochs")}
    result = run_ebft(config=EBFTConfig.preset("best", **settings), reporter=silent)
    assert {len(block["losses"]) for block in result.blocks} == {1}
    assert len(result.summary["whole_model"]["distill"]["losses"]) == 1


def test_ranks_agree_on_the_time(short_run):
    """Each has its own clock, and both take the same number of steps: otherwise one would wait for ever."""
    given = {"samples": 8, "time": "8s", "recover": "ebft+distill", "lr": "auto", "lr_scale": "rms", "holdout": 0.25}
    settings = short_run("one", **given)
    assert on_ranks(2, job, {name: value for name, value in settings.items() if name != "epochs"}) == [0, 0]


def test_settings_keep_the_word():
    """``auto`` is kept as it was said, from Python, YAML and flags alike, and numbers become numbers."""
    config = EBFTConfig.preset("light", model="x")
    assert config.flat()["lr"] == "auto"
    assert EBFTConfig.of(config.flat()).flat() == config.flat()
    assert dataclasses.replace(config).flat()["lr"] == "auto"
    assert EBFTConfig.preset("light", model="x", lr="0.02").flat()["lr"] == 0.02
