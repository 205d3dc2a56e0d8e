"""README.md and docs/ show what is so: commands and Python run, and figures are those of result files."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import random_model
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments

from benchmarks import frontier
from ebft.cli.app import main, parse_args
from ebft.data.calibration import builtin_documents
from ebft_kernels import PackedMask

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ROWS = {  # of the table of results: what stands first in it -> method of benchmarks.quality
    "pruned by Wanda, not recovered": "none",
    "SparseGPT": "sparsegpt",
    "the published recipe, on these tokens": "paper-small",
    "1 epoch a block (the first `light`)": "light",
    "8 epochs a block (the first `best`)": "best",
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """The words of every command that starts ``ebft``, or a run by torchrun."""
    variable, found = [], []
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0].startswith("ebft="):
            variable = shlex.split(words[0].removeprefix("ebft="))
        elif words[:1] == ["$ebft"]:
            found.append([*variable, *words[1:]])
        elif words[:1] == ["ebft"]:
            found.append(words)
        elif "ebft.run" in words and "…" not in words:
            found.append(["ebft", "run", *words[words.index("ebft.run") + 1 :]])
    return found


@pytest.fixture
def place(tiny, tmp_path, monkeypatch) -> Path:
    """A working folder with everything that the commands name."""
    for name in ("my-model", "pruned"):
        shutil.copytree(tiny / "model", tmp_path / name)
    (tmp_path / "my-test.txt").write_text(builtin_documents("evaluation")[0][:6000])
    documents = builtin_documents("calibration")[:4]
    (tmp_path / "my-text.jsonl").write_text("".join(json.dumps({"text": text[:6000]}) + "\n" for text in documents))
    (tmp_path / "run.yaml").write_text("preset: light\n")
    save_file({"a": PackedMask.ones((2, 2)).dense()}, tmp_path / "masks.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_is_short_and_begins_with_its_commands():
    assert 120 <= README.count("\n") <= 150
    assert README.index("make demo") < README.index("make test") < README.index("## Results")


def test_its_links_lead_somewhere():
    targets = set(re.findall(r"\]\(([^)#\s]+)|(?:src|srcset)=\"([^\"]+)\"", README))
    for target in {target for pair in targets for target in pair if target}:
        assert target.startswith("https://arxiv.org") or (ROOT / target).is_file(), target


def test_every_command_of_the_docs_is_accepted(place):
    said = [words for page in PAGES for words in commands(page.read_text(encoding="utf-8"))]
    assert len(said) > 40
    for words in said:
        if words[1] == "run":
            parse_args(words[2:])
        elif words[1] == "plan":
            on = words.index("--on") if "--on" in words else len(words)
            parse_args([*words[2:on], *words[on + 2 :]])


def test_its_commands_run(place, capsys):
    small = {"--samples": "4", "--seqlen": "16", "--eval-seqlen": "32", "--batch-size": "2", "--epochs": "1"}
    small |= {"--calibration": "my-text.jsonl", "--eval": "my-test.txt", "--device": "cpu"}
    (section,) = re.findall(r"^## Your model$(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    done = []
    for words in commands(section):
        more = []
        if "--time" in words:  # as long as it says
            continue
        if words[1] in ("run", "plan"):
            more = [word for flag, value in small.items() if flag not in words for word in (flag, value)]
        if words[1] == "run":
            more += ["--overwrite", "--quiet"]
        elif words[1] == "eval":
            more = ["--eval", "my-test.txt", "--eval-seqlen", "32"]
        if "./pruned" in words:  # made by the runs before
            shutil.rmtree("pruned")
            shutil.copytree("ebft-output-2of4", "pruned")
        assert main([*words[1:], *more]) == 0, (words, capsys.readouterr().err)
        if "--pattern" in words:
            shutil.copytree("ebft-output", "ebft-output-2of4")
        done.append(words[1])
    assert set(done) == {"run", "plan", "audit", "eval", "sample", "compress"}


def test_its_python_runs(place, tokenizer, capsys):
    own, layers, trainer = blocks(README, "python")
    model = random_model("llama-gqa")
    settings = 'output="out", samples=4, seqlen=16, epochs=1, eval="my-test.txt", eval_seqlen=32, device="cpu"'
    given = {"model": model, "tokenizer": tokenizer, "my_documents": builtin_documents("calibration")[:2]}
    exec(compile(own.replace('output="out"', settings), "README.md", "exec"), given)
    assert "recovered" in capsys.readouterr().out

    model = random_model("llama-gqa")
    ids = tokenizer("some words of a text", return_tensors="pt")["input_ids"]
    exec(compile(layers, "README.md", "exec"), {"model": model, "ids": ids})
    assert Path("masks.safetensors").is_file()

    args = TrainingArguments("trained", use_cpu=True, report_to=[])
    given = {"model": random_model("llama-gqa"), "args": args, "rows": [{"input_ids": ids[0]}], "Trainer": Trainer}
    exec(compile(trainer.replace("ebft-output", "out"), "README.md", "exec"), given)


def test_its_table_is_that_of_the_result_file():
    result = json.loads(frontier.SOURCE.read_text(encoding="utf-8"))
    cells = {(cell["method"], cell["target"]): cell for cell in result["table"]}
    lines = [[part.strip() for part in line.strip("|").split("|")] for line in README.splitlines() if line[:1] == "|"]
    rows = {line[0]: line[1:] for line in lines}
    assert rows.keys() >= ROWS.keys()
    for name, method in ROWS.items():
        of = [cells[method, target] for target in ("60%", "70%", "2:4")]
        figures = [" / ".join(f"{cell['perplexity'][text][0]:.1f}" for text in ("wikitext2", "c4")) for cell in of]
        assert rows[name] == [*figures, f"{of[0]['minutes']:.1f}"]


@pytest.mark.parametrize("scheme", frontier.INKS)
def test_the_picture_is_that_of_the_result_file(scheme, tmp_path):
    def words(file: Path) -> list[str]:
        return re.findall(r"<text[^>]*>([^<]*)", file.read_text(encoding="utf-8"))

    frontier.svg(scheme, tmp_path / "new.svg")
    committed = frontier.ASSETS / f"frontier-{scheme}.svg"
    assert words(committed) == words(tmp_path / "new.svg"), "run: python -m benchmarks.frontier"
    assert committed.stat().st_size < 20_000
