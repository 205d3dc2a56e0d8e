"""Five small runs come out as ever: the same bits on the machine that recorded them, the same figures on any.

``python tests/loop/test_golden.py`` records them anew, after a change that is meant to change numbers.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers

from ebft.run import main

GOLDEN = Path(__file__).with_name("golden.json")
RUNS = {
    "2:4": ["--pattern", "2:4"],
    "structured": [
        "--structured",
        "--uniform",
        "--prune",
        "flap",
        "--sparsity",
        "0.3",
        *("--lr", "0.01", "--lr-scale", "rms", "--weight-decay", "0"),  # what the preset light was
        "--target",
        "dense-stream",
    ],
    "schedule": ["--schedule", "0.4,0.6"],
    "lora": ["--recover", "ebft+lora", "--lm-epochs", "1"],
    "resume": ["--prune", "sparsegpt", "--recover", "layerwise+ebft"],
}


def machine() -> dict[str, str]:
    """What the bits of a product depend on."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def come_to(name: str, model: Path, text: Path, folder: Path) -> dict[str, object]:
    """What the run ``name`` comes to: digests of its files, errors of its blocks."""
    flags = ["--model", str(model), "--calibration", str(text), "--eval", str(text), "--eval-seqlen", "32"]
    flags += [
        "--device",
        "cpu",
        "--windows",
        "packed",
        "--samples",
        "4",
        "--seqlen",
        "16",
        "--batch-size",
        "2",
        "--epochs",
        "1",
    ]
    flags += ["--output", str(folder / "out"), *RUNS[name]]
    if name == "resume":
        interrupted_in_the_second_block(flags)
        flags.append("--resume")
    assert main(flags) == 0
    files = {
        file: hashlib.sha256((folder / "out" / file).read_bytes()).hexdigest()
        for file in ("model.safetensors", "masks.safetensors")
    }
    lines = [json.loads(line) for line in (folder / "out" / "blocks.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "out" / "ebft_summary.json").read_text())
    (perplexity,) = summary["perplexity"].values()
    return {"sha256": files, "errors": [line["loss_after"] for line in lines], "perplexity": perplexity}


def interrupted_in_the_second_block(flags: list[str]) -> None:
    """The same run, ended by Ctrl-C where the second block has been committed."""
    from ebft.output.folder import OutputFolder

    commit = OutputFolder.commit_part

    def commit_part(self, name, content, files=()):
        commit(self, name, content, files)
        if name == "block-00001":
            raise KeyboardInterrupt

    with mock.patch.object(OutputFolder, "commit_part", commit_part):
        assert main(flags) == 130


@pytest.mark.parametrize("name", RUNS)
def test_a_run_comes_out_as_it_always_has(name, tiny, tmp_path):
    recorded = json.loads(GOLDEN.read_text())
    with one_thread():
        found = come_to(name, tiny / "model", tiny / "text.txt", tmp_path)
    before = recorded["runs"][name]
    assert found["errors"] == pytest.approx(before["errors"], rel=0.02)
    assert found["perplexity"] == pytest.approx(before["perplexity"], rel=0.02)
    if recorded["machine"] == machine():
        assert found["sha256"] == before["sha256"]


class one_thread:
    """Products on one thread while inside: their sums have an order then."""

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


if __name__ == "__main__":
    from conftest import random_model, small_tokenizer

    from ebft.data.calibration import builtin_documents

    recorded: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as made, one_thread():
        home = Path(made)
        random_model("llama-gqa").save_pretrained(home / "model")
        small_tokenizer().save_pretrained(home / "model")
        (home / "text.txt").write_text(builtin_documents("evaluation")[0][:6000])
        for run in RUNS:
            recorded[run] = come_to(run, home / "model", home / "text.txt", home / run.replace(":", ""))
    GOLDEN.write_text(json.dumps({"machine": machine(), "runs": recorded}, indent=1) + "\n")
    sys.exit(0)
