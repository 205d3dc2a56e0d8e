"""The settings of a run that belong to no method, by concern; each section checks itself.

A field's name within its section is what Python and a YAML section call it; its flat name (``flag`` where the two
differ) is what the command line, flat keyword arguments and flat YAML keys call it.

Long, because the text of every setting's help stands here, and nowhere else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebft.config.fields import Needs, check_fields, is_file, parse_bytes, parse_seconds, setting, typed
from ebft.config.pattern import Pattern
from ebft.errors import EBFTError

LOGGERS = ("tensorboard", "wandb")

# What a setting needs to have an effect: one that is given without it would be ignored in silence, and is refused.
_LOOKS = Needs("a --prune that looks at activations", ("prune",), lambda c: c.looks_at_activations)
_TEXT = Needs(f"a recovery, or {_LOOKS.said}", ("recover", "prune"), lambda c: c.uses_text)
_ANY = Needs("a recovery", ("recover",), lambda c: bool(c.recover.names))
_WINDOWS = Needs(
    "calibration text other than self",
    ("calibration", "recover", "prune"),
    lambda c: c.uses_text and [*c.data.parts] != ["self"],
)
_WALK = Needs(
    f"a recovery of blocks, or {_LOOKS.said}",
    ("recover", "prune"),
    lambda c: c.looks_at_activations or bool(c.block_recoveries),
)
_STREAMS = Needs(
    f"a recovery, {_LOOKS.said}, or --eval",
    ("recover", "prune", "eval"),
    lambda c: c.uses_text or bool(c.evaluate.texts),
)
_TEACHER = Needs(
    "a recovery of blocks, --eval, or --calibration self",
    ("recover", "eval", "calibration"),
    lambda c: bool(c.block_recoveries or c.evaluate.texts) or "self" in c.data.parts,
)
_CRITERION = Needs("a criterion", ("prune",), lambda c: c.by_criterion)
_SHARE = Needs(
    "a criterion, and neither --pattern nor --schedule",
    ("prune", "pattern", "schedule"),
    lambda c: (
        c.by_criterion and not c.prune.pattern and c.prune.sparsity in (c.prune.schedule or (c.prune.sparsity,))[-1:]
    ),
)
_STRUCTURED = Needs("--structured", ("structured",), lambda c: c.prune.structured)
_PATTERN = Needs("--pattern", ("pattern",), lambda c: c.prune.pattern is not None)
_MIX = Needs("--input mix", ("input",), lambda c: c.recover.input == "mix")
_EVAL = Needs("--eval", ("eval",), lambda c: bool(c.evaluate.texts))
_TASKS = Needs("--eval-tasks", ("eval_tasks",), lambda c: bool(c.evaluate.tasks))


@dataclass(frozen=True)
class Model:
    """Which model."""

    source: str | None = setting(
        None, "hub id, folder or .gguf file (default: the SmolLM2-135M-Instruct wheel)", flag="model", basic=True
    )
    teacher: str | None = setting(
        None, "dense model whose blocks are the targets (default: the model as loaded)", needs=_TEACHER
    )
    trust_remote_code: bool = setting(False, "allow transformers to run code shipped with the model")
    ignore_unused: bool = setting(False, "ignore tensors in the checkpoint that config.json has no place for")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Prune:
    """What is pruned, and by what."""

    criterion: str = setting(
        "wanda",
        "a criterion (see ebft methods), zeros (keep the zeros already there), or a masks.safetensors file",
        flag="prune",
        metavar="CRITERION|zeros|FILE",
        basic=True,
    )
    sparsity: float = setting(
        0.7,
        "share of each matrix's weights to prune, between 0 and 1",
        above=0,
        below=1,
        basic=True,
        needs=_SHARE,
    )
    pattern: str | None = setting(
        None, "keep N of every M consecutive inputs, in place of --sparsity", metavar="N:M", basic=True
    )
    transposable: bool = setting(False, "apply --pattern along outputs too, in M x M tiles", needs=_PATTERN)
    structured: bool = setting(
        False, "prune whole heads (KV groups) and MLP channels; --sparsity is then the share of the blocks' parameters"
    )
    uniform: bool = setting(
        False,
        "the same widths in every layer, and smaller matrices in the output (--structured by a criterion)",
        needs=_STRUCTURED,
    )
    schedule: tuple[float, ...] | None = setting(
        None,
        "prune gradually, such as 0.5,0.6,0.7: each step prunes and recovers the model from the step before, towards "
        "the original dense model; replaces --sparsity",
        metavar="SHARE,…",
    )
    allocation: str = setting(
        "uniform",
        "pruned share of each block: uniform, owl (blocks with outliers keep more), or a JSON file, name -> share",
        metavar="uniform|owl|FILE",
        needs=_CRITERION,
    )
    refine: str = setting("none", "how to refine the masks of --prune", metavar="NAME")
    statistics: str = setting(
        "target",
        "masks go by what flows into the dense block as it makes the targets, or by the block's own inputs (one more "
        "pass where --target is dense-stream)",
        choices=("target", "input"),
        needs=_LOOKS,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.schedule is not None:
            self._check_schedule()
        if self.uniform and not self.structured:
            raise EBFTError("--uniform is about the widths that --structured leaves; expected --structured with it")
        if self.structured and self.pattern:
            raise EBFTError(
                f"--structured prunes whole heads and channels, and --pattern is {self.pattern}; expected one"
            )
        if self.transposable and not self.pattern:
            raise EBFTError("--transposable is of N:M masks; expected --pattern with it")
        if self.transposable and self.refine != "none":
            raise EBFTError(
                f"--transposable holds along the outputs too, which --refine {self.refine} would not keep so; expected "
                "one of both"
            )
        if self.refine != "none" and (self.criterion == "zeros" or self.structured):
            other = "--structured, which takes whole heads and channels" if self.structured else "--prune zeros"
            raise EBFTError(f"--refine {self.refine} swaps single weights for pruned ones, and cannot with {other}")
        self._check_allocation()
        self.mask_pattern  # noqa: B018  (parses it, so that a wrong one is said now)

    @property
    def mask_pattern(self) -> Pattern:
        """What is pruned of a matrix: a share of its weights, or M - N of every M."""
        if self.pattern:
            return Pattern.parse(self.pattern, transposable=self.transposable)
        return Pattern(sparsity=self.sparsity)

    def _check_schedule(self) -> None:
        rising_shares(self.schedule)
        if self.pattern:
            raise EBFTError(
                f"--schedule is of shares, and --pattern {self.pattern} is none; expected --sparsity in its place"
            )
        if self.structured:
            raise EBFTError("--schedule prunes single weights, and --structured whole heads and channels; expected one")
        if self.criterion == "zeros" or is_file(self.criterion):
            raise EBFTError(f"--schedule needs a criterion that prunes any share, and --prune is {self.criterion}")

    def _check_allocation(self) -> None:
        if self.allocation == "uniform":
            return
        if self.pattern or self.structured:
            other = f"--pattern {self.pattern} is the same for all" if self.pattern else "--structured compares blocks"
            raise EBFTError(
                f"--allocation {self.allocation} gives blocks shares of their own, and {other}; expected one"
            )
        if self.schedule and self.allocation != "owl":
            raise EBFTError(f"--allocation {self.allocation} fixes shares, and --schedule raises them; expected one")


@dataclass(frozen=True)
class Recover:
    """How quality is won back: what every recovery goes by. What one alone goes by are settings of its own."""

    method: str = setting(
        "ebft",
        "how to recover after pruning: none, or methods in order, such as layerwise+ebft (see ebft methods)",
        flag="recover",
        metavar="NAME[+NAME…]",
        basic=True,
    )
    target: str = setting(
        "sparse-stream",
        "targets: the dense block applied to the block's input, or the dense model's own hidden states",
        choices=("sparse-stream", "dense-stream"),
        needs=_WALK,
    )
    input: str = setting(
        "sparse-stream",
        "inputs: hidden states of the tuned sparse blocks before, or of the dense model, or of each for some samples",
        choices=("sparse-stream", "dense-stream", "mix"),
        needs=_WALK,
    )
    mix: float = setting(
        0.5,
        "share of the samples that --input mix takes from the dense model, others block by block",
        at_least=0,
        at_most=1,
        needs=_MIX,
    )
    batch_size: int = setting(8, "sequences per step", at_least=1, needs=_TEXT)
    micro_batch: int | None = setting(
        None,
        "sequences per forward pass; gradients are accumulated over a step (default: the batch size)",
        at_least=1,
        needs=_ANY,
    )
    holdout: float = setting(
        0.0,
        "validation split: share of the sequences held out from tuning; the weights that do best on it are kept",
        at_least=0,
        below=1,
        needs=_ANY,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.input == "mix" and self.target != "dense-stream":
            raise EBFTError(
                "--input mix aims at one target from the inputs of both streams, and --target is sparse-stream, where "
                "every input has its own; expected --target dense-stream"
            )
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            raise EBFTError(f"--micro-batch is {self.micro_batch}; expected 1 to {self.batch_size}, the --batch-size")

    @property
    def names(self) -> tuple[str, ...]:
        """The recoveries that ``method`` sums up, in order; none of them for ``none``."""
        return tuple(name for name in self.method.split("+") if name != "none")

    @property
    def at_once(self) -> int:
        """Sequences that go through a block together."""
        return self.micro_batch or self.batch_size


@dataclass(frozen=True)
class Data:
    """The calibration text."""

    calibration: str = setting(  # a list in Python and YAML, too
        "c4",
        "c4, wikitext2, builtin, self (text that the dense model writes), a .txt/.jsonl/.parquet file, or several of "
        "them with their shares of the sequences, such as c4:0.75,self:0.25, or of equal ones",
        metavar="NAME_OR_FILE[:SHARE],…",
        basic=True,
        needs=_TEXT,
    )
    windows: str = setting(
        "random-window",
        "one random window of each random document, or documents packed end to end (self is whole sequences)",
        choices=("random-window", "packed"),
        needs=_WINDOWS,
    )
    samples: int = setting(256, "calibration sequences", at_least=1, basic=True, needs=_TEXT)
    seqlen: int = setting(1024, "tokens per calibration sequence", at_least=2, basic=True, needs=_TEXT)

    def __post_init__(self) -> None:
        given: Any = self.calibration
        if isinstance(given, list | tuple):
            object.__setattr__(self, "calibration", ",".join(map(str, given)))
        check_fields(self)
        self.parts  # noqa: B018  (parses names and shares, so that a wrong one is said now)

    @property
    def parts(self) -> dict[str, int]:
        """The names or files of ``calibration``, in order, and how many of the ``samples`` are of each."""
        shares = _names_and_shares(self.calibration)
        fault = f"--calibration is {self.calibration!r}; expected "
        if not all(name for name, _ in shares) or len(dict(shares)) < len(shares):
            raise EBFTError(f"{fault}names or files, each once, joined by commas")
        if len({share is None for _, share in shares}) > 1:
            raise EBFTError(f"{fault}a share for each of the texts, as in c4:0.75,self:0.25, or for none")
        weights = [1.0 if share is None else share for _, share in shares]
        if not all(0 < weight < float("inf") for weight in weights):
            raise EBFTError(f"{fault}shares above 0")
        counts = apportion(self.samples, weights)
        for (name, _), count in zip(shares, counts, strict=True):
            if not count:
                raise EBFTError(f"--samples is {self.samples}, of which none is left for {name}; expected more")
        return {name: count for (name, _), count in zip(shares, counts, strict=True)}


@dataclass(frozen=True)
class Evaluate:
    """What the models are measured on."""

    texts: tuple[str, ...] = setting(
        ("wikitext2",),
        "texts to measure perplexity on: names or files, or none",
        flag="eval",
        metavar="NAME_OR_FILE,…",
        basic=True,
    )
    seqlen: int = setting(2048, "tokens per evaluation window", flag="eval_seqlen", at_least=2, needs=_EVAL)
    tokens: int | None = setting(
        None,
        "most tokens to measure of each text (default: all)",
        flag="eval_tokens",
        at_least=2,
        needs=_EVAL,
    )
    tasks: tuple[str, ...] = setting(
        (),
        "zero-shot tasks of lm-evaluation-harness, or local:TEXT for one made from a text",
        flag="eval_tasks",
        metavar="NAME,…",
    )
    limit: int | None = setting(
        None,
        "most questions to ask of each task (default: all)",
        flag="eval_limit",
        at_least=1,
        needs=_TASKS,
    )
    prompts: str = setting(
        "builtin",
        "prompts for the report's text samples by the dense, pruned and recovered model: builtin, none, or a text file "
        "with one per line",
        metavar="builtin|none|FILE",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.texts == ("none",):
            object.__setattr__(self, "texts", ())


@dataclass(frozen=True)
class Runtime:
    """Where and how the work is done."""

    device: str = setting("auto", "cpu, cuda, cuda:1 …; auto takes the GPU where there is one", basic=True)
    dtype: str = setting("auto", "dtype of the matrix products", choices=("auto", "float32", "bfloat16", "float16"))
    seed: int = setting(
        0, "seed of the calibration sample and the batch order", at_least=0, at_most=2**63 - 1, needs=_TEXT
    )
    time: str | None = setting(
        None,
        "time limit for the whole run, such as 10m or 1h: recovery uses what loading, measuring and saving leave",
        metavar="TIME",
        basic=True,
        needs=Needs("a recovery that goes by time", ("recover",), lambda c: c.goes_by_time),
    )
    fused: bool = setting(False, "require fused kernels for mask and optimizer; fail if there are none", basic=True)
    gpu_memory: str | None = setting(
        None,
        "GPU memory limit, such as 16GiB: settings are chosen to fit",
        metavar="SIZE",
        basic=True,
    )
    host_memory: str | None = setting(
        None, "host memory limit, such as 8GiB: settings are chosen to fit", metavar="SIZE"
    )
    streams: str = setting(
        "auto",
        "where to keep hidden states; auto: the host, or wherever the memory limits allow",
        choices=("auto", "device", "host", "disk"),
        needs=_STREAMS,
    )
    stream_dtype: str = setting(
        "float32", "dtype of stored hidden states", choices=("float32", "bfloat16"), needs=_TEXT
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for size, said in ((self.gpu_memory, "--gpu-memory"), (self.host_memory, "--host-memory")):
            if size is not None:
                parse_bytes(size, said)
        if self.time is not None:
            parse_seconds(self.time, "--time")

    @property
    def seconds(self) -> float | None:
        """``time`` in seconds."""
        return None if self.time is None else parse_seconds(self.time, "--time")


@dataclass(frozen=True)
class Output:
    """The folder that a run leaves."""

    folder: str = setting("ebft-output", "folder for the recovered model and its report", flag="output", basic=True)
    overwrite: bool = setting(False, "replace the output of an earlier run, once this one has finished", basic=True)
    resume: bool = setting(
        False, "continue the interrupted run in OUTPUT.partial, or start if there is none", basic=True
    )
    log: tuple[str, ...] = setting((), "where to log steps and blocks: tensorboard, wandb, or both", metavar="NAME,…")
    max_shard_size: str = setting("50GB", "maximum size of a file of the saved model", metavar="SIZE")

    def __post_init__(self) -> None:
        check_fields(self)
        if not Path(self.folder).name:
            raise EBFTError(f"--output is {self.folder!r}; expected the path of a folder that has a name")
        parse_bytes(self.max_shard_size, "--max-shard-size")
        for name in self.log:
            if name not in LOGGERS:
                raise EBFTError(f"--log is {name!r}; expected {' or '.join(LOGGERS)}")


SECTIONS = {
    "model": Model,
    "prune": Prune,
    "recover": Recover,
    "data": Data,
    "evaluate": Evaluate,
    "runtime": Runtime,
    "output": Output,
}


def rising_shares(schedule: Any) -> tuple[float, ...]:
    """The shares of ``--schedule``, which may be text; ``EBFTError`` if they do not rise, or not between 0 and 1."""
    shares: tuple[float, ...] = typed("--schedule", schedule, tuple[float, ...])
    if not shares or not shares[0] > 0 or not shares[-1] < 1 or sorted(set(shares)) != list(shares):
        raise EBFTError(
            f"--schedule is {','.join(f'{share:g}' for share in shares)}; expected rising shares between 0 and 1, both "
            "excluded, such as 0.5,0.6,0.7"
        )
    return shares


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """``total`` things in whole parts, as nearly as they can be in proportion to ``shares`` (largest remainders)."""
    quotas = [total * share / sum(shares) for share in shares]
    parts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda place: parts[place] - quotas[place])
    for place in by_remainder[: total - sum(parts)]:
        parts[place] += 1
    return parts


def _names_and_shares(mixture: str) -> list[tuple[str, float | None]]:
    """``a:0.5,b:0.5`` as names and shares; a file that is there wins, whatever commas and colons its name has."""
    pieces, found = mixture.split(","), []
    while pieces:
        heads = [(count, _name_and_share(",".join(pieces[:count]))) for count in range(len(pieces), 0, -1)]
        count, part = next((head for head in heads if is_file(head[1][0])), heads[-1])
        found.append(part)
        pieces = pieces[count:]
    return found


def _name_and_share(part: str) -> tuple[str, float | None]:
    part = part.strip()
    name, colon, share = part.rpartition(":")
    if colon and not is_file(part):
        with contextlib.suppress(ValueError):
            return name.strip(), float(share)
    return part, None
