"""Text that the dense model writes itself, and mixtures of texts to calibrate on."""

import json
import random

import pytest
import torch
from conftest import VOCABULARY, random_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import ebft.data.generation
import ebft.pipeline.prepare
from ebft import EBFTConfig, EBFTError, run_ebft
from ebft.config.sections import apportion
from ebft.data.calibration import TextUse, Tokens, mixture
from ebft.data.generation import generate
from ebft.distributed import Ranks
from ebft.output.folder import OutputFolder
from ebft.plan.planner import make_plan
from ebft.recovery.samples import Split

CPU = torch.device("cpu")


def written(model, tokenizer, **changes):
    return generate(model, tokenizer, **{"samples": 5, "seqlen": 12, "seed": 3, "device": CPU, **changes})


@pytest.fixture(scope="module")
def beginning(tokenizer):
    """The same tokenizer, which starts every text with a token of its own."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="a $A", special_tokens=[("a", backend.token_to_id("a"))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", bos_token="a")


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2"])
def test_tokens_are_where_the_distribution_takes_a_number(family, tokenizer):
    """A reference without cache, batches and transformers' generate, in float64."""
    model = random_model(family).double()
    ids = written(model, tokenizer)
    numbers = torch.rand(5, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for row, chances in zip(ids, numbers, strict=True):
        assert row[0] == 1 + int(chances[0] * (VOCABULARY - 1))  # any but the special token, which is 0
        for place in range(1, 12):
            with torch.no_grad():
                likely = model(row[None, :place], use_cache=False).logits[0, -1].softmax(dim=-1)
            before = likely[: row[place]].sum()
            assert before - 1e-6 <= chances[place] <= before + likely[row[place]] + 1e-6
    assert len(set(ids[:, 1:].flatten().tolist())) > 20


def test_text_depends_on_the_seed_and_not_on_the_batch(tokenizer, monkeypatch):
    model = random_model("llama").double()
    whole = written(model, tokenizer)
    assert torch.equal(written(model, tokenizer, samples=3), whole[:3])
    assert not torch.equal(written(model, tokenizer, seed=4), whole)
    monkeypatch.setattr(ebft.data.generation, "WRITTEN_AT_ONCE", 24)
    assert torch.equal(written(model, tokenizer), whole)


def test_an_end_of_text_is_followed_by_a_beginning_and_nothing_else_ends_or_bends_it(tokenizer, beginning):
    model = random_model("llama").double()
    begin, end = beginning.bos_token_id, beginning.eos_token_id
    assert begin not in (None, end)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # any token is as likely as any other
    model.generation_config.update(eos_token_id=end, repetition_penalty=9.0, suppress_tokens=[end], max_length=4)
    kept = model.generation_config
    ids = written(model, beginning, samples=64, seqlen=60)
    assert (ids[:, 0] == begin).all()
    ends = (ids[:, :-1] == end).nonzero()
    assert len(ends) > 2
    assert all(ids[row, place + 1] == begin for row, place in ends.tolist())
    assert model.generation_config is kept
    followers = written(model, tokenizer, samples=64, seqlen=60)  # which has no beginning
    ends = (followers[:, :-1] == end).nonzero()
    assert any(followers[row, place + 1] != begin for row, place in ends.tolist())


def test_a_model_that_cannot_write(tokenizer):
    model = random_model("llama")
    with torch.no_grad():
        model.lm_head.weight[7, 7] = torch.nan
    with pytest.raises(EBFTError, match="--calibration self: the dense model's logits hold NaN or infinity"):
        written(model, tokenizer)
    model.can_generate = lambda: False
    with pytest.raises(EBFTError, match="LlamaForCausalLM cannot generate text; expected another text"):
        written(model, tokenizer)


# --- mixtures ---------------------------------------------------------------------------------------------------------


def test_names_and_shares(tmp_path, monkeypatch):
    def parts(calibration, samples=10):
        return EBFTConfig.of(calibration=calibration, samples=samples).data.parts

    assert parts("c4") == {"c4": 10}
    assert parts("c4, wikitext2,self") == {"c4": 4, "wikitext2": 3, "self": 3}
    assert parts("c4:3,self:1", 8) == {"c4": 6, "self": 2}
    assert parts("c4:0.5,builtin:0.26,self:0.24") == {"c4": 5, "builtin": 3, "self": 2}
    monkeypatch.chdir(tmp_path)
    for name in ("a,b:0.5", "b:0.5", "c:1,d"):
        (tmp_path / name).write_text("x")
    assert parts("a,b:0.5") == {"a,b:0.5": 10}
    assert parts("self,a,b:0.5") == {"self": 5, "a,b:0.5": 5}
    assert parts("b:0.5:0.2,c:1,d:0.8") == {"b:0.5": 2, "c:1,d": 8}
    for wrong, says in {
        "c4,": "expected names or files, each once, joined by commas",
        "": "expected names or files",
        "c4:0.5,c4:0.5": "expected names or files, each once",
        "c4:0.5,self": "expected a share for each of the texts",
        "c4:0,self:1": "expected shares above 0",
        "c4:nan": "expected shares above 0",
        "c4:99,self:1": "--samples is 10, of which none is left for self; expected more",
    }.items():
        with pytest.raises(EBFTError, match=says):
            parts(wrong)


def test_whole_parts_are_the_nearest_to_the_shares():
    choose = random.Random(0)
    for _ in range(50):
        shares, total = [choose.random() for _ in range(choose.randint(1, 6))], choose.randint(1, 40)
        parts = apportion(total, shares)
        assert sum(parts) == total
        assert all(abs(part - total * share / sum(shares)) < 1 for part, share in zip(parts, shares, strict=True))


@pytest.mark.parametrize(("samples", "holdout"), [((6, 6), 0.25), ((10, 5, 5), 0.2), ((30, 3), 0.1), ((2, 3), 0.0)])
def test_held_out_sequences_are_of_all_texts(samples, holdout):
    use = TextUse("", "packed", 1, 0, "", "")
    parts = [Tokens(torch.arange(count)[:, None] + 100 * number, use) for number, count in enumerate(samples)]
    split = Split.of(sum(samples), holdout, Ranks())
    mixed = mixture(parts, [split.held_out, split.tuned]).ids[:, 0]
    assert sorted(mixed.tolist()) == torch.cat([part.ids for part in parts]).flatten().tolist()
    for group in (split.held_out, split.tuned):
        of_part = torch.bincount(mixed[group] // 100, minlength=len(samples)).tolist()
        assert all(abs(got - len(group) * n / sum(samples)) < 1 for got, n in zip(of_part, samples, strict=True))
        for number in range(len(samples)):  # in their order, and spread over the whole group
            mine = [(place, value) for place, value in enumerate(mixed[group].tolist()) if value // 100 == number]
            assert [value for _, value in mine] == sorted(value for _, value in mine)
            assert not mine or mine[0][0] <= len(group) / len(mine)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_on_a_mixture_and_its_resumption(short_run, silent, tmp_path, monkeypatch):
    text = short_run()["calibration"]
    given = short_run(calibration=f"{text}:0.5,self:0.5", holdout=0.25, samples=8)
    commit, written = OutputFolder.commit_part, []
    write = ebft.pipeline.prepare.generate

    def stop_after_a_block(self, name, *rest):
        commit(self, name, *rest)
        if name == "block-00000":
            raise KeyboardInterrupt

    monkeypatch.setattr(
        ebft.pipeline.prepare, "generate", lambda *args, **how: written.append(how) or write(*args, **how)
    )
    whole = run_ebft(config=EBFTConfig.of(**{**given, "output": str(tmp_path / "whole")}), reporter=silent)
    monkeypatch.setattr(OutputFolder, "commit_part", stop_after_a_block)
    with pytest.raises(KeyboardInterrupt):
        run_ebft(config=EBFTConfig.of(**given), reporter=silent)
    monkeypatch.setattr(OutputFolder, "commit_part", commit)
    assert len(written) == 2
    result = run_ebft(config=EBFTConfig.of(**given, resume=True), reporter=silent)
    assert len(written) == 2  # it is not written again
    weights = [(out / "model.safetensors").read_bytes() for out in (result.output, whole.output)]
    assert weights[0] == weights[1]
    assert not (result.output / "text").exists()
    use = result.summary["calibration"]
    assert (use["source"], use["tokens"]) == (f"{text}, self", 8 * 16)
    assert [(part["source"], part["windows"], part["tokens"]) for part in use["parts"]] == [
        (text, "random-window", 64),
        ("self", "generated", 64),
    ]
    assert json.loads((result.output / "ebft_summary.json").read_text())["stage_seconds"]["generation"] > 0


def test_a_model_in_memory_writes_what_the_same_one_on_disk_writes(short_run, silent, tokenizer, tmp_path):
    given = short_run(calibration="self", recover="none", eval="")
    on_disk = run_ebft(config=EBFTConfig.of(**given), reporter=silent)
    model = AutoModelForCausalLM.from_pretrained(given["model"])
    config = EBFTConfig.of(**{**given, "output": str(tmp_path / "other"), "model": None})
    in_memory = run_ebft(model, config, tokenizer=tokenizer, reporter=silent)
    uses = [result.summary["calibration"] for result in (on_disk, in_memory)]
    assert uses[0] == uses[1]
    assert uses[0]["source"] == "self"


def test_text_that_is_kept(tmp_path):
    ids = torch.arange(12).reshape(3, 4)
    with OutputFolder(str(tmp_path / "out"), overwrite=False) as first:
        [file] = first.write_generated(ids, "this")
        first.commit_part("generated", {}, [file])
    again = OutputFolder(str(tmp_path / "out"), overwrite=False, resume=True)
    assert torch.equal(again.generated("this"), ids)
    assert again.generated("that") is None
    assert OutputFolder(str(tmp_path / "out"), overwrite=False).generated("this") is None
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert again.generated("this") is None
    file.write_bytes(content[:20])
    assert again.generated("this") is None


def test_a_plan_counts_the_model_that_writes(tiny):
    usual = {"model": str(tiny / "model"), "device": "cpu", "seqlen": 16, "samples": 4, "eval": ""}
    plan = make_plan(EBFTConfig.of(**usual, calibration="builtin:0.5,self:0.5"))
    model = sum(p.numel() for p in random_model("llama-gqa").parameters())
    cache = 3 * 2 * 16 * 8192  # keys and values of two heads of 8 in three blocks
    logits = 4 * 2 * 512 * VOCABULARY
    assert plan.stages["text by the dense model"] == 4 * (model + cache + logits)
    assert "text by the dense model" not in make_plan(EBFTConfig.of(**usual, calibration="builtin")).stages
