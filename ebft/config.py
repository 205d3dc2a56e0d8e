"""One dataclass holds every setting of a run, with the presets; ``ebft/command_line.py`` makes its flags from it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebft.errors import EBFTError
from ebft.pruning.allocation import LAMBDA
from ebft.pruning.pattern import Pattern

LARGEST = 2**31 - 1  # of whole numbers, but the seed
RECOVERIES = ("none", "layerwise", "ebft", "lora", "full")  # in the order in which they can follow one another


@dataclass(frozen=True)
class Needs:
    """What a setting needs of others to have an effect.

    Attributes:
        said: it, in words.
        of: the settings that decide.
        met: whether a run has it.
    """

    said: str
    of: tuple[str, ...]
    met: Callable[[EBFTConfig], bool]


def _recovery(*names: str) -> Needs:
    said = f"{', '.join(names[:-1])} or {names[-1]}" if names[1:] else names[0]
    return Needs(f"{said} in --recover", ("recover",), lambda config: not {*names}.isdisjoint(config.recoveries))


# What the fields below name: a setting that is given without it would be ignored in silence, and is refused.
_EBFT, _LAYERWISE, _LORA, _ANY = *map(_recovery, ("ebft", "layerwise", "lora")), _recovery(*RECOVERIES[1:])
_TUNED, _ADAMW, _WHOLE = _recovery("ebft", "lora", "full"), _recovery("ebft", "full"), _recovery("lora", "full")
_LOOKS = Needs("a --prune that looks at activations", ("prune",), lambda config: config.looks_at_activations)
_TEXT = Needs(f"a recovery, or {_LOOKS.said}", ("recover", "prune"), lambda config: config.uses_text)
_WINDOWS = Needs(
    "calibration text other than self",
    ("calibration", "recover", "prune"),
    lambda config: config.uses_text and [*config.calibration_parts] != ["self"],
)
_WALK = Needs(
    f"a recovery of blocks, or {_LOOKS.said}",
    ("recover", "prune"),
    lambda config: config.looks_at_activations or bool(config.block_recoveries),
)
_STREAMS = Needs(
    f"a recovery, {_LOOKS.said}, or --eval",
    ("recover", "prune", "eval"),
    lambda config: config.uses_text or bool(config.eval_texts),
)
_TEACHER = Needs(
    "a recovery of blocks, --eval, or --calibration self",
    ("recover", "eval", "calibration"),
    lambda config: bool(config.block_recoveries or config.eval_texts) or "self" in config.calibration_parts,
)
_CRITERION = Needs("a criterion", ("prune",), lambda config: config.by_criterion)
_SHARE = Needs(
    "a criterion, and neither --pattern nor --schedule",
    ("prune", "pattern", "schedule"),
    lambda config: (
        config.by_criterion
        and not config.pattern
        and config.sparsity in (config.schedule_shares or [config.sparsity])[-1:]
    ),
)
_SPARSEGPT = Needs("--prune sparsegpt", ("prune",), lambda config: config.prune == "sparsegpt")
_DSNOT = Needs("--refine dsnot", ("refine",), lambda config: config.refine == "dsnot")
_STRUCTURED = Needs("--structured", ("structured",), lambda config: config.structured)
_PATTERN = Needs("--pattern", ("pattern",), lambda config: config.pattern is not None)
_REFRESH = Needs("ebft and --refresh-every", ("recover", "refresh_every"), lambda config: config.refreshes)
_PATIENCE = Needs(
    "ebft and --holdout", ("recover", "holdout"), lambda config: "ebft" in config.recoveries and config.holdout > 0
)
_MIX = Needs("--input mix", ("input",), lambda config: config.input == "mix")
_EVAL = Needs("--eval", ("eval",), lambda config: bool(config.eval_texts))
_TASKS = Needs("--eval-tasks", ("eval_tasks",), lambda config: bool(config.eval_task_names))


def _setting(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    needs: Needs | None = None,
) -> Any:
    """A dataclass field that also knows how it is said on the command line, and what it needs to have an effect."""
    return field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar, "needs": needs})


@dataclass(frozen=True)
class EBFTConfig:
    """Every setting of one run; ``EBFTConfig.preset("paper", lr=1e-3)`` starts from a preset.

    The meanings of the flags are those of the README's table. A field's name is its flag (``batch_size`` is
    ``--batch-size``) and its key in a YAML file. Values are checked when the object is made (``EBFTError``).
    """

    model: str | None = _setting(None, "hub id, folder or .gguf file (default: the SmolLM2-135M-Instruct wheel)")
    teacher: str | None = _setting(
        None,
        "dense model whose blocks are the targets (default: the model as loaded)",
        needs=_TEACHER,
    )
    output: str = _setting("ebft-output", "folder for the recovered model and its report")
    overwrite: bool = _setting(False, "replace OUTPUT if an earlier run made it, once this run has committed")
    prune: str = _setting(
        "wanda",
        "magnitude, wanda, ria, sparsegpt, flap (--structured), zeros (already there), or a masks.safetensors file",
    )
    sparsegpt_damping: float = _setting(
        0.01,
        "what SparseGPT adds to its Hessian's diagonal, as a share of the mean (--prune sparsegpt)",
        needs=_SPARSEGPT,
    )
    act_order: bool = _setting(
        False,
        "SparseGPT prunes inputs of large activations first (--prune sparsegpt, without --pattern)",
        needs=_SPARSEGPT,
    )
    allocation: str = _setting(
        "uniform",
        "pruned share of each block: uniform, owl (blocks with outliers keep more), or a JSON file, name -> share",
        metavar="uniform|owl|FILE",
        needs=_CRITERION,
    )
    refine: str = _setting(
        "none",
        "what is done to the masks of --prune: nothing, or DSnoT's swaps of kept and pruned weights",
        choices=("none", "dsnot"),
    )
    dsnot_threshold: float = _setting(
        0.1, "mean error of an output at which its row is done, in the output's unit (--refine dsnot)", needs=_DSNOT
    )
    dsnot_cycles: int = _setting(50, "swaps in a row at most (--refine dsnot)", needs=_DSNOT)
    sparsity: float = _setting(0.7, "share of each matrix's weights that is pruned, between 0 and 1", needs=_SHARE)
    structured: bool = _setting(
        False, "prune whole heads (KV groups) and MLP channels; --sparsity is then the share of the blocks' parameters"
    )
    uniform: bool = _setting(
        False,
        "the same widths in every layer, and smaller matrices in the output (--structured by a criterion)",
        needs=_STRUCTURED,
    )
    pattern: str | None = _setting(None, "keep N of every M consecutive inputs, in place of --sparsity", metavar="N:M")
    transposable: bool = _setting(
        False,
        "--pattern holds along the outputs too, within M x M tiles",
        needs=_PATTERN,
    )
    schedule: str | None = _setting(
        None,
        "prune gradually, such as 0.5,0.6,0.7: every share a run of its own from what the last one recovered, towards "
        "the first dense model; in place of --sparsity",
        metavar="SHARE,…",
    )
    recover: str = _setting(
        "ebft",
        "recoveries after pruning: none, or a sum in order such as layerwise+ebft (lora, full: the model is in memory)",
    )
    cg_iterations: int = _setting(
        20, "iterations of conjugate gradients in each layer (--recover layerwise)", needs=_LAYERWISE
    )
    cg_damping: float = _setting(
        0.01, "what holds weights where they were, as a share of the inputs' mean square", needs=_LAYERWISE
    )
    cg_inputs: str = _setting(
        "sparse",
        "what a layer is solved on: its inputs in the dense block, or those that the layers solved before it give",
        choices=("dense", "sparse"),
        needs=_LAYERWISE,
    )
    lm_lr: float = _setting(
        3e-4,
        "AdamW learning rate of whole-model recoveries (lora, full), decayed linearly to 0 over their time",
        needs=_WHOLE,
    )
    lm_epochs: int = _setting(
        2, "their passes over the calibration sequences, with the language-model loss", needs=_WHOLE
    )
    lm_seconds: float | None = _setting(
        None,
        "they end after so many seconds if that comes first, and the learning rate falls by time",
        metavar="S",
        needs=_WHOLE,
    )
    lora_rank: int = _setting(8, "rank of the adapters (--recover lora)", needs=_LORA)
    lora_alpha: float = _setting(16.0, "what adapters are scaled by, times their rank (--recover lora)", needs=_LORA)
    lora_dropout: float = _setting(
        0.0, "share of the adapters' inputs that is dropped (needs --no-lora-masked)", needs=_LORA
    )
    lora_masked: bool = _setting(
        True, "adapters work under the mask while they are tuned, so that the masked merge loses nothing", needs=_LORA
    )
    calibration: str = _setting(
        "c4",
        "c4, wikitext2, builtin, self (text that the dense model writes), a .txt/.jsonl/.parquet file, or several of "
        "them with their shares of the sequences, such as c4:0.75,self:0.25, or of equal ones",
        metavar="NAME_OR_FILE[:SHARE],…",
        needs=_TEXT,
    )
    windows: str = _setting(
        "random-window",
        "one random window of each random document, or documents packed end to end (self is whole sequences)",
        choices=("random-window", "packed"),
        needs=_WINDOWS,
    )
    samples: int = _setting(256, "calibration sequences", needs=_TEXT)
    seqlen: int = _setting(1024, "tokens in a calibration sequence", needs=_TEXT)
    epochs: int = _setting(10, "passes over the calibration sequences in each block", needs=_EBFT)
    batch_size: int = _setting(8, "sequences in a step", needs=_TEXT)
    micro_batch: int | None = _setting(
        None,
        "sequences that go through the block at once; a step sums their gradients (default: the batch size)",
        needs=_ANY,
    )
    recompute: str = _setting(
        "none",
        "activations that are made again in the backward pass: those of the block, or of its attention and MLP in turn "
        "(of --unit pair its two blocks)",
        choices=("none", "block", "halves"),
        needs=_TUNED,
    )
    weights: str = _setting(
        "fp32",
        "matrices while they are tuned: float32, bfloat16 with a float32 master, or bfloat16 rounded stochastically",
        choices=("fp32", "master", "stochastic"),
        needs=_EBFT,
    )
    moments: str = _setting(
        "fp32", "AdamW's moments: float32, bfloat16 or 8 bits", choices=("fp32", "bf16", "int8"), needs=_TUNED
    )
    compact: bool = _setting(False, "keep the optimizer's states of kept weights alone", needs=_ADAMW)
    update_in_backward: bool = _setting(
        False, "update a matrix as soon as its gradient is made, which is never kept (needs --clip 0)", needs=_EBFT
    )
    compile: bool = _setting(False, "run the block through torch.compile while it is tuned", needs=_EBFT)
    unit: str = _setting(
        "block",
        "what ebft tunes at once: a block; its attention and then its MLP, each towards the dense one's output; or a "
        "block with the next one, towards the dense states after both, of which the first is kept",
        choices=("block", "halves", "pair"),
        needs=_EBFT,
    )
    optimizer: str = _setting(
        "adamw",
        "AdamW; Lion (the sign of a momentum); or Muon, with AdamW for norms and biases",
        choices=("adamw", "sign", "muon"),
        needs=_EBFT,
    )
    lr: float = _setting(2e-4, "learning rate, which --lr-decay lowers in each block", needs=_EBFT)
    lr_scale: str = _setting(
        "absolute",
        "what --lr is: a learning rate, or a share of the root mean square of each matrix's kept weights",
        choices=("absolute", "rms"),
        needs=_EBFT,
    )
    lr_decay: str = _setting(
        "linear", "how the learning rate falls in each block", choices=("linear", "cosine", "constant"), needs=_EBFT
    )
    warmup: float = _setting(0.0, "share of each block's steps in which the learning rate rises to --lr", needs=_EBFT)
    betas: tuple[float, float] = _setting(
        (0.9, 0.95), "betas of AdamW and Lion; Muon's momentum is the first", needs=_TUNED
    )
    weight_decay: float = _setting(
        0.1, "decoupled weight decay of the pruned matrices (norms and biases: 0)", needs=_ADAMW
    )
    clip: float = _setting(
        1.0, "clip the gradient norm over kept weights, after unscaling; 0 turns it off", needs=_TUNED
    )
    loss: str = _setting(
        "mse",
        "what ebft minimises: the mean squared error, one with every channel by its own energy, or plus 1 - cosine",
        choices=("mse", "channel", "cosine"),
        needs=_EBFT,
    )
    token_weights: str = _setting(
        "none",
        "what a token counts in it: all the same, or by 1 / ||Y - X||^2, for tokens of enormous hidden states",
        choices=("none", "norm"),
        needs=_EBFT,
    )
    refresh_every: int = _setting(
        0,
        "steps of ebft after which a part of each mask is chosen anew, in the first three quarters of them; 0: never",
        needs=_EBFT,
    )
    refresh_share: float = _setting(
        0.05, "share of each row's kept weights that --refresh-every chooses anew", needs=_REFRESH
    )
    refresh_grow: str = _setting(
        "gradient",
        "what pruned weights come back by: the size of the mean gradient of a few batches, or the mean of its square",
        choices=("gradient", "gradient2"),
        needs=_REFRESH,
    )
    holdout: float = _setting(
        0.0, "share of the sequences that no block is tuned on: the weights that do best on them are kept", needs=_ANY
    )
    patience: int = _setting(
        2,
        "epochs without a lower error on the held-out sequences before a block is done",
        needs=_PATIENCE,
    )
    epochs_where: str = _setting(
        "all",
        "what becomes of the epochs that a block saves by ending early: nothing, or later blocks that pruning has "
        "harmed more than the mean of those before take them, up to twice --epochs",
        choices=("all", "error"),
        needs=_EBFT,
    )
    target: str = _setting(
        "sparse-stream",
        "targets: the dense block applied to the block's input, or the dense model's own hidden states",
        choices=("sparse-stream", "dense-stream"),
        needs=_WALK,
    )
    input: str = _setting(
        "sparse-stream",
        "inputs: hidden states of the tuned sparse blocks before, or of the dense model, or of each for some samples",
        choices=("sparse-stream", "dense-stream", "mix"),
        needs=_WALK,
    )
    statistics: str = _setting(
        "target",
        "masks go by what flows into the dense block as it makes the targets, or by the block's own inputs (one more "
        "pass where --target is dense-stream)",
        choices=("target", "input"),
        needs=_LOOKS,
    )
    mix: float = _setting(
        0.5,
        "share of the samples that --input mix takes from the dense model, others block by block",
        needs=_MIX,
    )
    eval: str = _setting("wikitext2", "texts for perplexity, comma-separated; empty for none", metavar="NAME_OR_FILE,…")
    eval_seqlen: int = _setting(2048, "tokens in an evaluation window", needs=_EVAL)
    eval_tasks: str = _setting(
        "",
        "zero-shot tasks of lm-evaluation-harness, or local:TEXT for one made from a text, comma-separated",
        metavar="NAME,…",
    )
    eval_limit: int | None = _setting(
        None,
        "questions of each of --eval-tasks that are asked (default: all)",
        needs=_TASKS,
    )
    device: str = _setting("auto", "cpu, cuda, cuda:1 …; auto takes the GPU where there is one")
    dtype: str = _setting(
        "auto",
        "compute type of the matrix products",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    seed: int = _setting(0, "seed of the calibration sample and the batch order", needs=_TEXT)
    resume: bool = _setting(False, "go on with the interrupted run in OUTPUT.partial; start where there is none")
    streams: str = _setting(
        "auto",
        "where hidden states are kept; auto: host, or as --gpu-memory and --host-memory make it",
        choices=("auto", "device", "host", "disk"),
        needs=_STREAMS,
    )
    stream_dtype: str = _setting(
        "float32",
        "type in which hidden states are kept for calibration",
        choices=("float32", "bfloat16"),
        needs=_WALK,
    )
    gpu_memory: str | None = _setting(
        None, "GPU memory that the run may take, such as 16GiB: settings that fit are chosen", metavar="SIZE"
    )
    host_memory: str | None = _setting(
        None, "host memory that the run may take, such as 8GiB: settings that fit are chosen", metavar="SIZE"
    )
    max_shard_size: str = _setting("50GB", "largest file of the saved model", metavar="SIZE")
    fused: bool = _setting(False, "demand fused kernels for mask and optimizer; fail where there are none")
    trust_remote_code: bool = _setting(False, "let transformers run code that comes with the model")
    ignore_unused: bool = _setting(
        False, "leave out tensors of the checkpoint that the model, as its config.json has it, does not take"
    )

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value, choices = getattr(self, setting.name), setting.metadata["choices"]
            object.__setattr__(self, setting.name, _typed(setting.name, value))
            if choices and value not in choices:
                raise EBFTError(f"{flag(setting.name)} is {value!r}; expected one of {', '.join(choices)}")
        if not Path(self.output).name:
            raise EBFTError(f"--output is {self.output!r}; expected the path of a folder that has a name")
        if not 0 < self.sparsity < 1:
            raise EBFTError(f"--sparsity is {self.sparsity:g}; expected a number between 0 and 1, both excluded")
        self._check_schedule()
        self._check_recover()
        for name in ("samples", "epochs", "batch_size", "cg_iterations", "patience", "lm_epochs", "lora_rank"):
            if getattr(self, name) < 1:
                raise EBFTError(f"{flag(name)} is {getattr(self, name)}; expected a whole number of at least 1")
        for name in ("seqlen", "eval_seqlen"):
            if getattr(self, name) < 2:
                raise EBFTError(f"{flag(name)} is {getattr(self, name)}; expected a whole number of at least 2")
        self.calibration_parts  # noqa: B018  (parses names and shares, so that a wrong one is said now)
        self._check_names()
        for name in ("warmup", "holdout", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise EBFTError(
                    f"{flag(name)} is {getattr(self, name):g}; expected a share from 0 up to, not including, 1"
                )
        if not 0 <= self.mix <= 1:
            raise EBFTError(f"--mix is {self.mix:g}; expected a share from 0 to 1")
        if self.input == "mix" and self.target != "dense-stream":
            raise EBFTError(
                "--input mix aims at one target from the inputs of both streams, and --target is sparse-stream, where "
                "every input has its own; expected --target dense-stream"
            )
        if self.holdout and self.samples < 2:
            raise EBFTError(f"--holdout is {self.holdout:g} of 1 sequence; expected --samples 2 or more")
        for name in ("lr", "weight_decay", "clip", "cg_damping", "lm_lr", "lora_alpha", "sparsegpt_damping"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise EBFTError(f"{flag(name)} is {getattr(self, name)}; expected a finite number of at least 0")
        if self.lm_seconds is not None and not 0 < self.lm_seconds < float("inf"):
            raise EBFTError(f"--lm-seconds is {self.lm_seconds:g}; expected a finite number above 0")
        if self.eval_limit is not None and self.eval_limit < 1:
            raise EBFTError(f"--eval-limit is {self.eval_limit}; expected a whole number of at least 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise EBFTError(f"--betas is {self.betas}; expected two numbers from 0 up to, not including, 1")
        if not 0 <= self.seed < 2**63:
            raise EBFTError(f"--seed is {self.seed}; expected a whole number from 0 to 2^63 - 1")
        self._check_effects({name for name, usual in _usual().items() if getattr(self, name) not in usual})
        if self.lora_dropout and self.lora_masked:
            raise EBFTError(
                f"--lora-dropout is {self.lora_dropout:g}, and with --lora-masked adapters are a part of the weight, "
                "where no input can be dropped for them alone; expected --no-lora-masked or --lora-dropout 0"
            )
        if self.structured and self.pattern:
            raise EBFTError(
                f"--structured prunes whole heads and channels, and --pattern is {self.pattern}; expected one"
            )
        if self.prune == "flap" and not self.structured:
            raise EBFTError("--prune flap scores whole heads and channels; expected --structured with it")
        if self.transposable and (self.refine != "none" or self.refresh_every):
            other = "--refine dsnot" if self.refine != "none" else f"--refresh-every {self.refresh_every}"
            raise EBFTError(
                f"--transposable holds along the outputs too, which {other} would not keep so; expected one of both"
            )
        if self.schedule:
            object.__setattr__(self, "sparsity", self.schedule_shares[-1])
        self._check_allocation()
        if self.refine != "none" and (self.prune == "zeros" or self.structured):
            other = "--structured, which takes whole heads and channels" if self.structured else "--prune zeros"
            raise EBFTError(f"--refine {self.refine} swaps single weights for pruned ones, and cannot with {other}")
        if not 0 <= self.dsnot_threshold < float("inf") or self.dsnot_cycles < 1:
            raise EBFTError(
                f"--dsnot-threshold is {self.dsnot_threshold:g} and --dsnot-cycles {self.dsnot_cycles}; expected a "
                "finite number of at least 0 and a whole number of at least 1"
            )
        if self.mask_pattern.group and self.act_order:
            raise EBFTError(
                f"--act-order takes inputs out of the order that the groups of --pattern {self.pattern} have; "
                "expected one of the two"
            )
        for name in ("gpu_memory", "host_memory", "max_shard_size"):
            if getattr(self, name) is not None:
                parse_bytes(getattr(self, name), flag(name))
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.batch_size:
            raise EBFTError(f"--micro-batch is {self.micro_batch}; expected 1 to {self.batch_size}, the --batch-size")
        for name, other in (("recompute", "none or block"), ("unit", "block")):
            if self.compile and getattr(self, name) == "halves":
                raise EBFTError(
                    f"--{name} halves does not go with --compile, which would compile the halves of every block anew; "
                    f"expected --{name} {other}"
                )
        if self.unit == self.recompute == "halves":
            raise EBFTError("--recompute halves of --unit halves would be quarters; expected --recompute none or block")
        self._check_pair()
        if self.epochs_where == "error":
            self._check_epochs_where()
        self._check_optimizer()
        if self.update_in_backward:
            self._check_update_in_backward()
        self._check_refresh()

    def _check_effects(self, given: Iterable[str]) -> None:
        """``EBFTError`` if one of the settings ``given`` changes nothing, because others leave it nothing to change."""
        among = {*given}
        idle = [name for name in _fields() if name in among and not self.has_effect(name)]
        if not idle:
            return
        needs: Needs = _fields()[idle[0]].metadata["needs"]
        alike = [name for name in idle if _fields()[name].metadata["needs"] is needs]
        has, they_need = ("has", "it needs") if len(alike) == 1 else ("have", "they need")
        raise EBFTError(
            f"{' '.join(map(self._said, alike))} {has} no effect with {' '.join(map(self._said, needs.of))}: "
            f"{they_need} {needs.said}"
        )

    def _said(self, name: str) -> str:
        """A setting as it is said on the command line."""
        value = getattr(self, name)
        if isinstance(value, bool):
            return flag(name) if value else flag(f"no_{name}")
        if value in (None, ""):
            return f"no {flag(name)}"
        return f"{flag(name)} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"

    def _check_names(self) -> None:
        """Files can have the names that are looked for."""
        named: dict[str, list[str | None]] = {"model": [self.model], "teacher": [self.teacher], "prune": [self.prune]}
        named |= {"allocation": [self.allocation], "eval": [*self.eval_texts], "calibration": [*self.calibration_parts]}
        for setting, names in named.items():
            for name in names:
                try:
                    Path(name or "").expanduser().exists()
                except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, no home of such a user
                    reason = getattr(error, "strerror", None) or error
                    shown = repr(name if len(str(name)) < 60 else f"{str(name)[:50]}…")
                    raise EBFTError(
                        f"{flag(setting)} is {shown}; expected a name that a file can have: {reason}"
                    ) from None

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
        if self.allocation == "owl" and not LAMBDA < self.sparsity < 1 - LAMBDA:
            raise EBFTError(
                f"--allocation owl prunes up to {LAMBDA:g} less and more than --sparsity, which is {self.sparsity:g}; "
                f"expected {LAMBDA:g} to {1 - LAMBDA:g}, both excluded"
            )

    def _check_schedule(self) -> None:
        if self.schedule is None:
            return
        shares = self.schedule_shares
        if not shares or not shares[0] > 0 or not shares[-1] < 1 or sorted(set(shares)) != shares:
            raise EBFTError(
                f"--schedule is {self.schedule!r}; expected rising shares between 0 and 1, both excluded, such as "
                "0.5,0.6,0.7"
            )
        if self.pattern:
            raise EBFTError(
                f"--schedule is of shares, and --pattern {self.pattern} is none; expected --sparsity in its place"
            )
        if self.structured:
            raise EBFTError("--schedule prunes single weights, and --structured whole heads and channels; expected one")
        if self.prune == "zeros" or is_file(self.prune):
            raise EBFTError(f"--schedule needs a criterion that prunes any share, and --prune is {self.prune}")

    def _check_recover(self) -> None:
        names = self.recover.split("+")
        known = [name for name in RECOVERIES if name in names]
        if names != known or ("none" in names and len(names) > 1):
            raise EBFTError(
                f"--recover is {self.recover!r}; expected none, or one or more of {', '.join(RECOVERIES[1:])} in this "
                "order, joined by +"
            )

    def _check_pair(self) -> None:
        if self.unit != "pair":
            return
        others = {
            "--input dense-stream, which makes blocks independent": self.input == "dense-stream",
            "--epochs-where error, which goes by errors of single blocks": self.epochs_where == "error",
            "--refresh-every, whose masks of the second block would be thrown away": self.refresh_every > 0,
            "--compile, which would compile every two blocks anew": self.compile,
        }
        for other, given in others.items():
            if given:
                raise EBFTError(f"--unit pair tunes two blocks together, and does not go with {other}; expected one")

    def _check_epochs_where(self) -> None:
        if not self.holdout:
            raise EBFTError(
                "--epochs-where error spends what blocks save by ending early, which none does without --holdout; "
                "expected --holdout above 0"
            )
        if self.input == "dense-stream":
            raise EBFTError(
                "--epochs-where error looks at the blocks before, of which blocks with --input dense-stream are "
                "independent; expected --input sparse-stream or mix"
            )
        if self.unit == "halves":
            raise EBFTError("--epochs-where error counts epochs of whole blocks; expected --unit block")

    def _check_optimizer(self) -> None:
        """Layouts of weights and states, which only AdamW has."""
        for name, usual in (
            ("weights", "fp32"),
            ("moments", "fp32"),
            ("compact", False),
            ("update_in_backward", False),
        ):
            given = getattr(self, name)
            if self.optimizer != "adamw" and given != usual:
                said = flag(name) if given is True else f"{flag(name)} {given}"
                raise EBFTError(
                    f"{said} is a layout of AdamW, and --optimizer is {self.optimizer}; expected "
                    f"{f'no {said}' if given is True else f'{flag(name)} {usual}'} or --optimizer adamw"
                )

    def _check_refresh(self) -> None:
        if self.refresh_every < 0:
            raise EBFTError(f"--refresh-every is {self.refresh_every}; expected a whole number of at least 0")
        if not 0 < self.refresh_share <= 1:
            raise EBFTError(f"--refresh-share is {self.refresh_share:g}; expected a share above 0 and up to 1")
        if not self.refresh_every:
            return
        if self.update_in_backward:
            raise EBFTError("--refresh-every needs gradients of pruned weights, which --update-in-backward never makes")
        if self.optimizer != "adamw":
            raise EBFTError(
                f"--refresh-every weighs weights by AdamW's second moment, and --optimizer is {self.optimizer}; "
                "expected --optimizer adamw"
            )
        if self.structured:
            raise EBFTError("--refresh-every brings single weights back, which --structured does not have")

    def _check_update_in_backward(self) -> None:
        """What cannot be had where a gradient is used before the others are known."""
        if self.clip:
            raise EBFTError(
                f"--update-in-backward uses gradients before the norm of all is known, and --clip is {self.clip:g}; "
                "expected --clip 0"
            )
        if self.micro_batch not in (None, self.batch_size):
            raise EBFTError(
                f"--update-in-backward uses gradients before they are summed, and --micro-batch is {self.micro_batch}; "
                f"expected {self.batch_size}, the --batch-size"
            )
        if self.compile:
            raise EBFTError("--update-in-backward does not go with --compile, which makes all gradients first")

    def has_effect(self, name: str) -> bool:
        """Whether the results, or what a run asks of the machine, can depend on this setting, as the others are."""
        needs: Needs | None = _fields()[name].metadata["needs"]
        return needs is None or needs.met(self)

    @property
    def mask_pattern(self) -> Pattern:
        """What is pruned of a matrix: a share of its weights, or M - N of every M."""
        return (
            Pattern.parse(self.pattern, transposable=self.transposable)
            if self.pattern
            else Pattern(sparsity=self.sparsity)
        )

    @property
    def asked_sparsity(self) -> float | None:
        """The share of all weights that is to be pruned; None where masks or a file of shares say it."""
        says = self.by_criterion and self.allocation in ("uniform", "owl")
        return self.mask_pattern.sparsity if says else None

    @property
    def steps(self) -> tuple[EBFTConfig, ...]:
        """The runs of ``--schedule``, in order; each begins with the ``output`` of the one before."""
        shares = self.schedule.split(",") if self.schedule else [""]
        folder = Path(self.output).with_name(Path(self.output).name + ".schedule")
        outputs = [str(folder / share.strip()) for share in shares[:-1]]
        between = [
            dataclasses.replace(
                self,
                schedule=",".join(shares[: place + 1]),
                sparsity=float(share),
                output=output,
                overwrite=self.overwrite or not self.resume,  # an interrupted run's, which starts over
            )
            for place, (share, output) in enumerate(zip(shares, outputs, strict=False))
        ]
        return (*between, self)

    @property
    def schedule_shares(self) -> list[float]:
        """Of ``--schedule``, in order; none without it, or where it holds no numbers."""
        try:
            return [float(share) for share in self.schedule.split(",")] if self.schedule else []
        except ValueError:
            return []

    @property
    def by_criterion(self) -> bool:
        """Whether pruning chooses, and takes neither zeros nor masks that are there already."""
        return self.prune != "zeros" and not Path(self.prune).is_file()

    @property
    def looks_at_activations(self) -> bool:
        """Whether pruning wants statistics of what flows through the model."""
        surveys = self.allocation == "owl" or (self.structured and not self.uniform)
        return self.refine != "none" or (self.by_criterion and (self.prune != "magnitude" or surveys))

    @property
    def uses_text(self) -> bool:
        """Whether anything is done with the calibration text."""
        return self.looks_at_activations or bool(self.recoveries)

    @property
    def recoveries(self) -> tuple[str, ...]:
        """The names that ``--recover`` sums up, in order; none of them for ``none``."""
        return tuple(name for name in self.recover.split("+") if name != "none")

    @property
    def whole_model_recoveries(self) -> tuple[str, ...]:
        """Those of them that follow the walk, and hold the whole model in memory."""
        return tuple(name for name in self.recoveries if name in ("lora", "full"))

    @property
    def block_recoveries(self) -> tuple[str, ...]:
        """Those of them that are a part of the walk."""
        return tuple(name for name in self.recoveries if name not in self.whole_model_recoveries)

    @property
    def fills_biases(self) -> bool:
        """Whether pruning puts something into biases, so that layers without any get some."""
        return self.structured and self.prune == "flap"

    @property
    def uses_dense_inputs(self) -> bool:
        """Whether a recovery looks at what the dense block is given, beside what it gives."""
        solves_on_inputs = "layerwise" in self.recoveries and (self.cg_inputs == "sparse" or self.holdout > 0)
        return solves_on_inputs or self.by_halves

    @property
    def refreshes(self) -> bool:
        """Whether masks change while blocks are tuned."""
        return self.refresh_every > 0 and "ebft" in self.recoveries

    @property
    def by_halves(self) -> bool:
        """Whether attention and MLP of a block are tuned in turn."""
        return self.unit == "halves" and "ebft" in self.recoveries

    @property
    def by_pairs(self) -> bool:
        """Whether a block is tuned together with the next one."""
        return self.unit == "pair"

    @property
    def blocks_at_once(self) -> int:
        """How many blocks are tuned together."""
        return 2 if self.by_pairs else 1

    @property
    def calibration_parts(self) -> dict[str, int]:
        """The names or files of ``--calibration``, in order, and how many of the ``samples`` are of each."""
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

    @property
    def eval_texts(self) -> list[str]:
        """The names or files of ``--eval``, in order, each once."""
        return _listed(self.eval)

    @property
    def eval_task_names(self) -> list[str]:
        """The tasks of ``--eval-tasks``, in order, each once."""
        return _listed(self.eval_tasks)

    @classmethod
    def preset(cls, name: str, /, **settings: Any) -> EBFTConfig:
        """The preset's settings, with ``settings`` put over them."""
        if not isinstance(name, str) or name not in PRESETS:
            raise EBFTError(f"--preset is {name!r}; expected one of {', '.join(PRESETS)}")
        unknown = sorted(set(settings) - _names())
        if unknown:
            raise EBFTError(f"there is no setting {unknown[0]!r}; expected one of {', '.join(sorted(_names()))}")
        preset = {**PRESETS[name], **(IF_UNIFORM.get(name, {}) if settings.get("uniform") else {})}
        made = cls(**{**preset, **settings})
        if settings.keys() < _names():  # of all of them at once nobody says which are meant
            usual = {name: preset.get(name, setting.default) for name, setting in _fields().items()}
            made._check_effects(name for name in settings if getattr(made, name) != usual[name])
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, YAML and the model card."""
        return {**dataclasses.asdict(self), "betas": list(self.betas)}


# Where things are and how the work is organised: the same results whatever these are.
ORGANISATION = frozenset(
    {"output", "overwrite", "resume", "streams", "gpu_memory", "host_memory", "max_shard_size", "trust_remote_code"}
)

# The published recipe (arXiv 2402.12419; the class defaults, clipping after unscaling); one for a quarter of its time
# on a CPU (a third on a GPU) and one for about its time, both with targets from the dense stream, smaller batches, and
# a learning rate that is a share of the weights' own size (docs/quality.md has the evidence); and one that ends in
# minutes on two CPU cores. IF_UNIFORM: what is otherwise with --uniform.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "light": {
        "epochs": 1,
        "batch_size": 2,
        "lr": 0.01,
        "lr_scale": "rms",
        "weight_decay": 0.0,
        "target": "dense-stream",
    },
    "best": {
        "epochs": 8,
        "batch_size": 4,
        "lr": 0.007,
        "lr_scale": "rms",
        "lr_decay": "cosine",
        "warmup": 0.05,
        "weight_decay": 0.0,
        "target": "dense-stream",
    },
    "demo": {
        "sparsity": 0.6,
        "calibration": "builtin",
        "windows": "packed",
        "samples": 96,
        "seqlen": 128,
        "epochs": 2,
        "batch_size": 4,
        "lr": 3e-3,
        "weight_decay": 0.0,
        "target": "dense-stream",
        "eval": "builtin",
        "eval_seqlen": 256,
    },
}
IF_UNIFORM: dict[str, dict[str, Any]] = {"light": {"target": "sparse-stream"}}


def parse_bytes(text: str, what: str) -> int:
    """``"8GiB"``, ``"500MB"`` … as a number of bytes; ``EBFTError`` about ``what`` for anything else."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(?:([KMGT])(i?)B?|B)?", text.strip(), re.IGNORECASE)
    size = 0 if not match else float(match[1])
    if match and match[2]:
        size *= (1024 if match[3] else 1000) ** ("KMGT".index(match[2].upper()) + 1)
    if int(size) < 1:
        raise EBFTError(f"{what} is {text!r}; expected a size such as 8GiB or 500MB")
    return int(size)


def is_file(name: str) -> bool:
    """Whether there is a file of that name, which may be too long, or hold what no name can."""
    try:
        return Path(name).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home of such a user
        return False


def _listed(names: str) -> list[str]:
    """Names joined by commas, in order, each once."""
    return list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))


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


def flag(name: str) -> str:
    """The command line's name of a setting."""
    return "--" + name.replace("_", "-")


def _fields() -> dict[str, dataclasses.Field[Any]]:
    return {setting.name: setting for setting in dataclasses.fields(EBFTConfig)}


def _names() -> set[str]:
    return {*_fields()}


def _usual() -> dict[str, list[Any]]:
    """The values of each setting that nobody need have given: the class's and the presets'."""
    presets = [*PRESETS.values(), *IF_UNIFORM.values()]
    return {
        name: [setting.default, *(preset[name] for preset in presets if name in preset)]
        for name, setting in _fields().items()
    }


@functools.cache
def _types() -> dict[str, Any]:
    """What each field declares."""
    return typing.get_type_hints(EBFTConfig)


def _typed(name: str, value: Any) -> Any:
    """``value`` (from Python, YAML or a flag's text) in the type that the field declares."""
    wanted = _types()[name]
    kinds = (
        [k for k in typing.get_args(wanted) if k is not types.NoneType] if isinstance(wanted, types.UnionType) else []
    )
    if kinds and value is None:
        return None
    kind = kinds[0] if kinds else wanted
    expected = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(kind, "two numbers")
    fault = EBFTError(f"{flag(name)} is {value!r}; expected {expected}")
    try:
        if kind is bool:
            if not isinstance(value, bool):
                raise fault
            return value
        if kind is str:
            if not isinstance(value, str | Path):
                raise fault
            return str(value)
        if isinstance(value, bool) or value is None:
            raise fault
        if kind is int:
            number = int(value) if isinstance(value, str) else value
            if int(number) != number:
                raise fault
            if name != "seed" and number > LARGEST:
                raise EBFTError(f"{flag(name)} is {value}; expected at most {LARGEST}")
            return int(number)
        if kind is float:
            return float(value)
        first, second = value
        return (float(first), float(second))
    except (TypeError, ValueError, OverflowError):
        raise fault from None
