"""What is attacked: a tiny model, the kinds of runs over it, and what each gives when nothing disturbs it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import ebft.compress
import ebft.run
from benchmarks.seven_b_run import small_tokenizer
from ebft.data.calibration import builtin_documents
from ebft.output.records import LINES, SUMMARY
from ebft_kernels._extension import native_reason
from tests.attack.victim import Fallen, finish
from tests.loop.conftest import random_model

# Runs of a second, that together use all that a run writes: streams on disk, shards, generated text, masks that change.
KINDS = {
    "wanda, ebft": "--target sparse-stream",
    "2:4, streams on disk": "--pattern 2:4 --streams disk",
    "dense inputs, halves, shards": "--input dense-stream --unit halves --streams disk --max-shard-size 60KB",
    "structured": "--structured --prune flap --sparsity 0.3 --streams disk",
    "schedule": "--schedule 0.4,0.6 --streams disk",
    "lora": "--recover ebft+lora --lm-epochs 1 --streams disk",
    "distill": "--recover ebft+distill --distill-epochs 2 --distill-blocks host --streams disk",
    "written text, layerwise": "--calibration self --recover layerwise+ebft --refine dsnot",
    "sparsegpt, full": "--prune sparsegpt --recover ebft+full --lm-epochs 1",
}
EARLIER = "--prune magnitude --sparsity 0.4"  # a run that is to be replaced
_TIMES = {"seconds", "stage_seconds", "tuning_seconds", "peak_memory", "peak_memory_bytes"}


@dataclass(frozen=True)
class Arena:
    """Where the good things lie.

    Attributes:
        folder: all of it; cases get folders of their own beside it.
        seconds: kind of run -> how long it takes undisturbed.
    """

    folder: Path
    seconds: dict[str, float]

    @property
    def model(self) -> Path:
        """A random Llama of three blocks, with its tokenizer."""
        return self.folder / "model"

    @property
    def text(self) -> Path:
        """To calibrate and measure on."""
        return self.folder / "text.txt"

    def whole(self, kind: str) -> Path:
        """The folder in which a run of ``kind`` has made its ``out``."""
        return self.folder / "whole" / _file_name(kind)

    @property
    def earlier(self) -> Path:
        """A finished output of other settings than any kind has."""
        return self.whole(EARLIER) / "out"

    @property
    def compressed(self) -> Path:
        """What ``ebft.compress`` makes of a finished output."""
        return self.folder / "compressed"

    def flags(self, kind: str) -> list[str]:
        """The command line of a run of ``kind`` to the folder ``out`` of where it works."""
        return self.flags_for(*KINDS.get(kind, kind).split())

    def flags_for(self, *more: str, model: Path | None = None) -> list[str]:
        """The command line of a run of a second; a flag in ``more`` beats the usual one."""
        places = ["--model", str(model or self.model), "--calibration", str(self.text), "--eval", str(self.text)]
        small = "--eval-seqlen 32 --samples 4 --seqlen 16 --batch-size 2 --epochs 1 --device cpu --output out"
        small += " --prompts none"
        return ["--preset", "demo", *places, *small.split(), "--overwrite", "--resume", *more]


def prepare(folder: Path, pool: Pool) -> Arena:
    """Make what is to be attacked."""
    arena = Arena(folder, {})
    pool.apply(_made, (partial(_make, arena), folder))
    kinds = [*KINDS, EARLIER]
    arena.seconds.update(zip(kinds, pool.map(partial(_undisturbed, arena), kinds), strict=True))
    compress = partial(ebft.compress.main, [str(arena.earlier), str(arena.compressed)])
    pool.apply(_made, (compress, folder))
    return arena


def _made(work: Callable[[], int], folder: Path) -> None:
    ended = finish(work, folder)
    if ended.code:
        raise Fallen(f"undisturbed, it ended with {ended}")


def _make(arena: Arena) -> int:
    if reason := native_reason():  # builds the library, where that has not been done
        print(reason)
    random_model("llama-gqa").save_pretrained(arena.model)
    small_tokenizer().save_pretrained(arena.model)
    arena.text.write_text(builtin_documents("evaluation")[0][:6000], encoding="utf-8")
    return 0


def _undisturbed(arena: Arena, kind: str) -> float:
    folder = arena.whole(kind)
    folder.mkdir(parents=True)
    began = time.monotonic()
    _made(command(arena.flags(kind)), folder)
    return time.monotonic() - began


def command(flags: list[str]) -> Callable[[], int]:
    """``python -m ebft.run`` with these flags."""
    return partial(ebft.run.main, flags)


def differences(one: Path, other: Path) -> list[str]:
    """Files of two working folders' outputs that are not the same bit for bit, but for what time and memory it took."""
    names = {
        str(file.relative_to(folder)) for folder in (one, other) for file in folder.glob("out*/**/*") if file.is_file()
    }
    return sorted(name for name in names if _content(one / name) != _content(other / name))


def _content(file: Path) -> Any:
    if not file.is_file():
        return None
    content: Any = file.read_bytes()
    if file.name == SUMMARY:
        content = _timeless(json.loads(content))
    elif file.name == LINES:
        content = [_timeless(json.loads(line)) for line in content.splitlines()]
    elif file.name == "report.html":
        for timed in (
            rb"<dt>time</dt><dd>[^<]*",
            rb"<section><h2>Time and memory</h2>.*?</section>",
            rb"<summary>All blocks in figures</summary>.*?</details>",
        ):
            content = re.sub(timed, b"", content, flags=re.DOTALL)
    return file.stat().st_mode, content


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(item) for name, item in value.items() if name not in _TIMES}
    return value


def _file_name(kind: str) -> str:
    return re.sub(r"\W+", "-", kind)
