"""Zero-shot tasks: questions made from a text, what a run says of the answers, and the harness itself."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ebft.evaluation.zero_shot
from ebft import EBFTConfig, EBFTError, run_ebft
from ebft.data.calibration import builtin_documents
from ebft.evaluation.zero_shot import ZeroShot, cloze
from ebft.model.checkpoint import load_model
from ebft.plan.planner import make_plan
from ebft.run import main


def test_questions_are_made_from_the_text():
    documents = builtin_documents("evaluation")
    questions = cloze("local:builtin", documents)
    words = [" ".join(document.split()) for document in documents]
    assert len(questions) > 100
    assert len({question["context"] for question in questions}) == len(questions)
    for question in questions:
        true = question["choices"][question["answer"]]
        assert [len(part.split()) for part in (question["context"], true)] == [32, 4]
        assert any(f"{question['context']} {true}" in document for document in words)
        assert len(set(question["choices"])) == 4
        assert all(any(choice in document for document in words) for choice in question["choices"])
    counts = [sum(question["answer"] == place for question in questions) for place in range(4)]
    assert min(counts) > len(questions) / 8
    assert cloze("local:builtin", documents) == questions
    assert len(cloze("local:long", documents * 20)) == 1000


def test_what_cannot_be_had(monkeypatch, tmp_path):
    with pytest.raises(
        EBFTError, match=r"local:x has 3 passages of 36 words, with 1 different ends; expected at least 4"
    ):
        cloze("local:x", ["word " * 120])
    with pytest.raises(EBFTError, match="--eval-limit is 0; expected a whole number of at least 1"):
        EBFTConfig.of(eval_limit=0)
    monkeypatch.setattr(ebft.evaluation.zero_shot, "find_spec", lambda name: None)
    with pytest.raises(EBFTError, match=r"lm-evaluation-harness, which is not installed \(pip install ebft\[tasks\]\)"):
        ZeroShot.prepare(["piqa"], None)
    monkeypatch.setattr(ebft.evaluation.zero_shot, "find_spec", lambda name: name)
    with pytest.raises(EBFTError, match=r"text 'nowhere.txt': expected c4, wikitext2, builtin, or an existing"):
        ZeroShot.prepare(["local:nowhere.txt"], None)


ANSWERS = {
    "documents": 7,
    "acc": 0.5,
    "acc_stderr": 0.125,
    "match,strict": 0.25,
    "match_stderr,strict": 0.1,
}


def test_a_run_asks_the_saved_model_once(short_run, silent, tmp_path, monkeypatch):
    asked, text = [], short_run()["calibration"]

    def measure(self, model, tokenizer, device):
        saved = load_model(str(tmp_path / "out.partial"))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters(), strict=True))
        asked.append((self.names, self.limit, list(self.local)))
        return dict.fromkeys(self.local, ANSWERS)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ebft.evaluation.zero_shot, "find_spec", lambda name: name)
    monkeypatch.setattr(ZeroShot, "measure", measure)
    given = short_run(eval_tasks=f"local:{text},local:builtin", eval_limit=7)
    with monkeypatch.context() as broken:
        broken.setattr(ebft.pipeline.run, "summarise", fail)
        with pytest.raises(KeyboardInterrupt):
            run_ebft(config=EBFTConfig.of(**given), reporter=silent)
    result = run_ebft(config=EBFTConfig.of(**given, resume=True), reporter=silent)
    assert asked == [([], 7, [f"local:{text}", "local:builtin"])]
    assert result.summary["zero_shot"] == {f"local:{text}": ANSWERS, "local:builtin": ANSWERS}
    for row in (
        "| local:text.txt | 7 | acc | 0.5 | 0.125 |",
        "| local:builtin | 7 | match,strict | 0.25 | 0.1 |",
    ):
        assert row in (result.output / "README.md").read_text()
    assert (
        '<th scope="row">local:text.txt</th><td>7</td><td>acc</td><td>0.5</td>'
        in (result.output / "report.html").read_text()
    )
    assert "local:builtin" in silent.console.file.getvalue()
    assert str(tmp_path) not in (result.output / "README.md").read_text().split("| setting")[0].split("---")[-1]


def test_another_text_is_another_run(short_run, silent, tmp_path, monkeypatch):
    text = tmp_path / "questions.txt"
    documents = builtin_documents("evaluation")
    text.write_text(" ".join(documents[:20]))
    monkeypatch.setattr(ebft.evaluation.zero_shot, "find_spec", lambda name: name)
    monkeypatch.setattr(ZeroShot, "measure", lambda *_: 1 / 0)
    given = short_run(eval_tasks=f"local:{text}", eval="", recover="none")
    with pytest.raises(ZeroDivisionError):
        run_ebft(config=EBFTConfig.of(**given), reporter=silent)
    text.write_text(" ".join(documents[1:20]))
    with pytest.raises(EBFTError, match="was begun with another text"):
        run_ebft(config=EBFTConfig.of(**given, resume=True), reporter=silent)


def test_a_plan_counts_the_whole_model(tiny):
    usual = {"model": str(tiny / "model"), "device": "cpu", "seqlen": 16, "samples": 4, "eval": ""}
    size = 4 * sum(p.numel() for p in load_model(usual["model"]).parameters())
    plan = make_plan(EBFTConfig.of(**usual, eval_tasks="local:builtin"))
    assert size < plan.stages["zero-shot, the whole model"] < size + 2**25
    assert "zero-shot, the whole model" not in make_plan(EBFTConfig.of(**usual)).stages


@pytest.mark.slow
def test_the_harness_scores_what_is_likely(trained, tmp_path, capsys):
    """Accuracies against log-likelihoods taken one by one in float64. Needs ``pip install ebft[tasks]``."""
    out = tmp_path / "out"
    flags = [
        "--model",
        trained,
        "--preset",
        "demo",
        "--recover",
        "none",
        "--sparsity",
        0.3,
        "--eval",
        "",
        "--samples",
        8,
    ]
    flags += ["--seqlen", 48, "--eval-tasks", "local:builtin", "--eval-limit", 25, "--device", "cpu", "--output", out]
    assert main([*map(str, flags)]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out).double(), AutoTokenizer.from_pretrained(out)
    right = []
    for question in cloze("local:builtin", builtin_documents("evaluation"))[:25]:
        likely = []
        for choice in question["choices"]:
            given = tokenizer(question["context"])["input_ids"]
            ids = torch.tensor(tokenizer(f"{question['context']} {choice}")["input_ids"])
            with torch.no_grad():
                logs = model(ids[None, :-1]).logits[0].log_softmax(dim=-1)
            likely.append(float(logs.gather(1, ids[1:, None])[len(given) - 1 :].sum()))
        by_length = [log / len(choice) for log, choice in zip(likely, question["choices"], strict=True)]
        right.append([values.index(max(values)) == question["answer"] for values in (likely, by_length)])
    found = json.loads((out / "ebft_summary.json").read_text())["zero_shot"]["local:builtin"]
    plain, normed = (sum(column) / 25 for column in zip(*right, strict=True))
    assert found["documents"] == 25
    assert (found["acc"], found["acc_norm"]) == pytest.approx((plain, normed), abs=1e-9)
    assert plain > 0.3  # the model has learned something
    flags[flags.index("local:builtin")] = "no_such_task"
    assert main([*map(str, flags), "--overwrite"]) == 2
    assert "names 'no_such_task'; expected tasks of lm-evaluation-harness, or local:TEXT" in capsys.readouterr().err
