"""``--plan``: what a run needs, before anything is loaded."""

import re

import pytest
import torch
from conftest import random_model
from transformers import LlamaConfig

from ebft.config import EBFTConfig
from ebft.plan import make_plan
from ebft.run import main


@pytest.fixture
def configuration(tmp_path):
    """A folder that holds the configuration of LlamaV1-7B and no weights."""
    settings = {"dtype": "float16", "architectures": ["LlamaForCausalLM"]}
    LlamaConfig(**settings).save_pretrained(tmp_path)  # the class's defaults are that model
    return str(tmp_path)


def test_the_rows_of_llama_7b_are_those_of_the_paper(configuration):
    plan = make_plan(EBFTConfig(model=configuration, device="cpu"))
    weights = 202_383_360  # of a block: four 4096 x 4096, three 4096 x 11008, two norms
    assert plan.device["weights"] == 4 * weights
    assert plan.device["optimizer states"] == pytest.approx(8.125 * weights, rel=1e-3)  # two moments and the mask
    assert 0 < plan.device["gradients"] <= 4 * weights  # at the peak, which comes before the last gradient
    tokens = 256 * 1024
    training, forward = 1.14e9 * tokens * 10, 0.41e9 * tokens * 2.125  # PAPER.md's FLOPs a token and block
    assert plan.flops == pytest.approx(32 * (training + forward), rel=0.06)
    assert plan.host["input and target streams"] == 2 * tokens * 4096 * 4
    assert plan.disk["model"] == pytest.approx(2 * 6_738_415_616, rel=1e-6)


def test_the_command_prints_a_plan_and_loads_nothing(configuration, capsys, tmp_path):
    assert main(["--model", configuration, "--plan", "--device", "cpu", "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    for row in ("weights", "gradients", "optimizer states", "activations", "input and target streams", "disk", "TFLOP"):
        assert re.search(rf"\b{row}\b.*\d|{row}: \d|\d {row}", said), row
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gemma3"])
def test_a_plan_for_other_families(family, tmp_path):
    random_model(family).config.save_pretrained(tmp_path)
    plan = make_plan(
        EBFTConfig(model=str(tmp_path), device="cpu", samples=4, seqlen=16, epochs=1, batch_size=2, eval="")
    )
    assert plan.device["weights"] > 0
    assert plan.flops > 0
    assert "plan for" in str(plan)


def test_the_plan_of_the_default_model(capsys):
    assert main(["--plan"]) == 0
    said = capsys.readouterr().out
    assert "plan for SmolLM2-135M-Instruct" in said
    blocks = 3_540_096 * 4 / 2**30  # bytes of a block's float32 weights
    weights = float(re.search(r"weights +([\d.]+) GiB", said)[1])
    assert weights == pytest.approx(blocks, abs=1e-3)


def test_lengths_are_checked_in_a_plan_too(configuration, capsys):
    assert main(["--model", configuration, "--plan", "--seqlen", "5000"]) == 2
    assert "--seqlen is 5000; expected at most 2048" in capsys.readouterr().err


def test_the_paper_plan_has_more_of_everything_than_the_demo(configuration):
    paper = make_plan(EBFTConfig(model=configuration, device="cpu"))
    small = make_plan(EBFTConfig(model=configuration, device="cpu", samples=8, seqlen=64, batch_size=2))
    assert paper.flops > 10 * small.flops
    assert paper.device["activations"] > 10 * small.device["activations"]
    assert paper.device["weights"] == small.device["weights"]
    assert torch.get_default_dtype() == torch.float32
