"""Text samples: what a model writes after a few prompts, and what of it a run keeps."""

import json

import pytest
import torch
from conftest import random_model

from ebft import EBFTConfig, EBFTError, run_ebft
from ebft.evaluation.continuations import BUILTIN, CannotContinue, continuations, read_prompts
from ebft.model.checkpoint import load_model

PROMPTS = ["The capital of France is", "To", "It was a dark and stormy night"]


def greedy(model, tokenizer, prompt, tokens):
    """One prompt alone, without a cache."""
    ids = tokenizer(prompt)["input_ids"]
    before = len(tokenizer.decode(ids, skip_special_tokens=True))
    for _ in range(tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        if int(logits.argmax()) == model.config.eos_token_id:
            break
        ids.append(int(logits.argmax()))
    return tokenizer.decode(ids, skip_special_tokens=True)[before:]


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "gemma3"])
def test_prompts_together_are_continued_as_each_alone(family, tokenizer):
    model = random_model(family)
    model.generation_config.do_sample, model.generation_config.repetition_penalty = True, 5.0
    expected = [greedy(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert continuations(model, tokenizer, PROMPTS, 12) == expected


def test_a_text_ends_where_the_model_ends_it(tokenizer):
    model = random_model("llama-gqa")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens alike: the first, which ends a text
    assert continuations(model, tokenizer, PROMPTS) == ["", "", ""]


def test_a_model_with_few_positions_writes_as_far_as_they_go(tokenizer):
    model = random_model("gpt2")  # of 64
    ids = tokenizer("a " * 50)["input_ids"]
    assert 30 < len(ids) < 64
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    (text,) = continuations(model, tokenizer, ["a " * 50], 1000)
    assert text
    with pytest.raises(CannotContinue, match=r"a prompt has \d+ tokens and the model 64 positions"):
        continuations(model, tokenizer, ["a " * 200])


def test_what_prompts_there_are(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("One.\n\n  Two \n")
    assert read_prompts("none") == []
    assert read_prompts(str(file)) == ["One.", "Two"]
    assert len(BUILTIN) == 3
    file.write_text("a\n" * 21)
    for name, said in (
        (str(file), "holds 21 prompts; expected 1 to 20"),
        ("some", "expected builtin, none, or a text"),
    ):
        with pytest.raises(EBFTError, match=said):
            read_prompts(name)


@pytest.fixture
def prompted(short_run, tmp_path):
    """Makes the settings of a short run that continues two prompts."""

    def make(**settings):
        (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
        settings |= {"prompts": str(tmp_path / "prompts.txt"), "target": "dense-stream"}  # so that masks are the same
        return EBFTConfig.of(**short_run(**settings))

    return make


@pytest.mark.parametrize("prune", ["wanda", "sparsegpt"])
def test_a_run_keeps_what_its_three_models_write(prune, prompted, tiny, tokenizer, silent):
    result = run_ebft(config=prompted(prune=prune), reporter=silent)
    kept = json.loads((result.output / "ebft_summary.json").read_text())["continuations"]
    assert (kept["prompts"], kept["left_out"]) == (PROMPTS[:2], None)
    assert kept["stages"].keys() == {"dense", "pruned", "recovered"}
    assert kept["stages"]["dense"] == continuations(load_model(str(tiny / "model")).float(), tokenizer, PROMPTS[:2])
    assert kept["stages"]["recovered"] == continuations(result.model.float(), tokenizer, PROMPTS[:2])
    pruned = run_ebft(
        config=prompted(prune=prune, recover="none", output=str(result.output) + "2"), reporter=silent
    ).summary["continuations"]["stages"]
    assert pruned == {stage: kept["stages"][stage] for stage in ("dense", "pruned")}


def test_a_model_that_does_not_fit_is_left_out_and_the_report_says_so(prompted, silent, monkeypatch):
    monkeypatch.setattr("ebft.pipeline.continuations.free_memory", lambda device: 100_000)
    kept = run_ebft(config=prompted(), reporter=silent).summary["continuations"]
    assert kept["stages"] == {}
    assert kept["left_out"].startswith("the whole model takes 0.")
    assert kept["left_out"].endswith("MiB in float32, and 0.0477 MiB can be spared for it")


def test_without_prompts_no_model_is_held(short_run, silent, monkeypatch):
    monkeypatch.setattr("ebft.pipeline.continuations.continuations", lambda *args: pytest.fail("asked"))
    result = run_ebft(config=EBFTConfig.of(**short_run(prompts="none")), reporter=silent)
    assert result.summary["continuations"]["prompts"] == []
    assert not {"dense_samples", "pruned_samples", "recovered_samples"} & result.summary["stage_seconds"].keys()
