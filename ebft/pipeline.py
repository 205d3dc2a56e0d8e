"""The walk over the blocks: prune one, reconstruct it, keep it, go on; then save the model and measure it."""

from __future__ import annotations

import contextlib
import math
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from ebft_kernels import PackedMask, explain, save_masks
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ebft.calibration import Tokens, calibration_tokens, evaluation_tokens
from ebft.checkpoint import DEFAULT_MODEL, SUMMARY, OutputFolder, load_model, load_saved, load_tokenizer
from ebft.config import EBFTConfig
from ebft.decoder import Decoder
from ebft.errors import EBFTError
from ebft.evaluate import perplexities
from ebft.pruning import CRITERIA, BlockMasks, Criterion, InputObserver, Masker, Statistics, make_masker
from ebft.reconstruct import BlockReconstructor, BlockResult
from ebft.report import Reporter, append_line, model_card
from ebft.report_page import report_page
from ebft.stream import Stream

FUSED_OPS = ("masked_adamw_step",)  # what --fused is about in this loop: the products run on zeroed weights, unmasked


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        output: the folder with the recovered model.
        summary: what ``ebft_summary.json`` holds.
        blocks: what ``blocks.jsonl`` holds, a dict a block.
        masks: full parameter name -> mask.
        model: the model with the recovered weights, on the host.
    """

    output: Path
    summary: dict[str, Any]
    blocks: list[dict[str, Any]]
    masks: dict[str, PackedMask]
    model: PreTrainedModel


def run_ebft(
    model: str | PreTrainedModel | None = None,
    config: EBFTConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher: PreTrainedModel | None = None,
    criterion: Criterion | None = None,
    text: Iterable[str] | None = None,
    reporter: Reporter | None = None,
) -> RunResult:
    """Prune a model, recover it block by block (arXiv 2402.12419), save it and measure it.

    Args:
        model: what to prune: a hub id, a folder, a GGUF file, or a model in memory, whose blocks then hold the
            recovered weights at the end; by default ``config.model``.
        config: the settings (default: ``EBFTConfig()``, the published recipe).
        tokenizer: for a model in memory; otherwise the model's own is loaded.
        teacher: a dense model in memory whose blocks are the targets; otherwise ``config.teacher``.
        criterion: a function (weight, inputs, pattern) -> bool mask, in place of ``config.prune``.
        text: documents to calibrate on, in place of ``config.calibration``.
        reporter: where progress goes (default: the terminal).

    Raises:
        EBFTError: something given cannot be used, or activations are no longer finite; the blocks that were finished
            are kept in ``OUTPUT.partial``.
    """
    config, reporter = config or EBFTConfig(), reporter or Reporter()
    with OutputFolder(config.output, overwrite=config.overwrite) as output:
        return _run(_prepare(config, model, tokenizer, teacher, criterion, text, output, reporter))


def _run(job: _Job) -> RunResult:
    clock, decoder, out = job.clock, job.decoder, job.output

    dense = _measure(job, "dense perplexity", job.teacher)
    clock.lap("dense_perplexity")
    blocks, masks = _walk(job)
    clock.lap("blocks")

    def pruned_block(index: int) -> nn.Module:
        block = decoder.working_block(index)
        apply_masks(block, masks[index].masks)
        return block

    pruned = _measure(job, "pruned perplexity", decoder, pruned_block)
    clock.lap("pruned_perplexity")

    for index in range(len(decoder)):
        decoder.store_block(index, out.read_block(index))
    out.save_model(decoder.model, job.tokenizer)
    all_masks = {
        f"{decoder.names[index]}.{name}": mask for index, of in enumerate(masks) for name, mask in of.masks.items()
    }
    save_masks(all_masks, out.path / "masks.safetensors")
    clock.lap("save")
    recovered = {}
    if job.eval_tokens:
        saved = load_saved(type(decoder.model), out.path)
        recovered = _measure(job, "recovered perplexity", Decoder(saved, decoder.device, decoder.compute))
    clock.lap("recovered_perplexity")

    summary = _summary(job, all_masks, {"dense": dense, "pruned": pruned, "recovered": recovered})
    out.write_json(SUMMARY, summary)
    (out.path / "README.md").write_text(model_card(summary), encoding="utf-8")
    (out.path / "report.html").write_text(report_page(summary, blocks), encoding="utf-8")
    out.commit()
    job.reporter.table(summary)
    return RunResult(out.final, summary, blocks, all_masks, decoder.model)


def apply_masks(block: nn.Module, masks: dict[str, PackedMask]) -> bool:
    """Set pruned weights to zero; True if any was not zero already."""
    changed = torch.zeros((), dtype=torch.bool)
    with torch.no_grad():
        for name, mask in masks.items():
            weight = block.get_parameter(name)
            pruned = ~mask.to(weight.device).dense()
            changed |= weight[pruned].any().cpu()
            weight.masked_fill_(pruned, 0.0)
    return bool(changed)


# --- the walk -----------------------------------------------------------------------------------------------------


def _walk(job: _Job) -> tuple[list[dict[str, Any]], list[BlockMasks]]:
    """Prune and recover every block in turn; gives the report's lines and the masks."""
    config, decoder = job.config, job.decoder
    dense_input = config.input == "dense-stream"
    inputs = dense_stream = spare = None
    if job.calibration is not None:
        ids = job.calibration.ids
        inputs = Stream.entering(job.teacher if dense_input else decoder, ids, config.batch_size)
        if config.target == "dense-stream" and not dense_input:
            dense_stream = Stream.entering(job.teacher, ids, config.batch_size)

    lines: list[dict[str, Any]] = []
    all_masks: list[BlockMasks] = []
    with job.reporter.progress("block", len(decoder)) as advance:
        for index, name in enumerate(decoder.names):
            began = time.perf_counter()
            block = decoder.working_block(index)
            statistics: Statistics = {}
            if inputs is not None:
                source, into = (dense_stream, dense_stream) if dense_stream is not None else (inputs, spare)
                targets, statistics = _dense_pass(job, index, block, source, into)
                _check_finite(job, index, targets, "the dense block's outputs")

            masks = job.masker(name, block, decoder.matrices[index], statistics)
            changed = apply_masks(block, masks.masks)
            result, tuning = None, 0.0
            if job.reconstructor is not None and inputs is not None:
                if index == 0 and not changed and job.teacher is decoder:
                    raise EBFTError(
                        f"{name} already has zeros wherever the masks prune, so there is nothing to recover towards; "
                        "give the dense model with --teacher"
                    )
                tuning_began = time.perf_counter()
                result = job.reconstructor.fit(
                    block,
                    inputs.states,
                    targets.states,
                    masks=masks.masks,
                    index=index,
                    forward=lambda block, hidden, index=index: decoder.run_block(index, block, hidden),
                    on_step=lambda done, steps, index=index: advance(index + done / steps),
                )
                tuning = time.perf_counter() - tuning_began
                _check_losses(job, index, result)

            weights = decoder.round_as_stored(index, block)  # the stream goes through the block as it is saved
            if inputs is not None:
                if dense_input:
                    inputs, spare = targets, inputs
                else:
                    spare = None if dense_stream is not None else targets
                    inputs.through(lambda hidden, i=index, b=block: decoder.run_block(i, b, hidden), out=inputs)
                    _check_finite(job, index, inputs, "the recovered block's outputs")
            job.output.write_block(index, weights)
            all_masks.append(masks)
            lines.append(_block_line(job, index, masks, result, tuning, time.perf_counter() - began))
            append_line(job.output.path / "blocks.jsonl", lines[-1])
            advance(index + 1, _block_note(lines[-1]))
    return lines, all_masks


def _dense_pass(
    job: _Job, index: int, block: nn.Module, source: Stream, into: Stream | None
) -> tuple[Stream, Statistics]:
    """The dense block on ``source``: its outputs are the targets, its inputs the criterion's statistics.

    Where the teacher is another model, the statistics are those of the block that is pruned, from a pass of its own.
    """
    decoder, teacher = job.decoder, job.teacher
    observer = InputObserver(block, decoder.matrices[index])
    own = teacher is decoder or job.reconstructor is None
    watching = observer.watching() if job.masker.needs_inputs else contextlib.nullcontext()
    if own:
        with watching:
            return source.through(lambda hidden: decoder.run_block(index, block, hidden), out=into), observer.statistics
    if job.masker.needs_inputs:
        with watching, torch.no_grad():
            for hidden in source.batches():
                decoder.run_block(index, block, hidden)
    dense = teacher.working_block(index)
    return source.through(lambda hidden: teacher.run_block(index, dense, hidden), out=into), observer.statistics


def _check_finite(job: _Job, index: int, stream: Stream, what: str) -> None:
    if not stream.is_finite():
        raise _not_finite(job, index, f"{what} hold NaN or infinity")


def _check_losses(job: _Job, index: int, result: BlockResult) -> None:
    if not all(math.isfinite(loss) for loss in (*result.losses, result.error_after)):
        raise _not_finite(job, index, "the loss became NaN or infinity while tuning")


def _not_finite(job: _Job, index: int, what: str) -> EBFTError:
    kept = f"; the {index} finished blocks are kept in {job.output.path}" if index else ""
    return EBFTError(f"block {index} ({job.decoder.names[index]}): {what}{kept}")


def _block_line(
    job: _Job, index: int, masks: BlockMasks, result: BlockResult | None, tuning: float, seconds: float
) -> dict[str, Any]:
    """One line of ``blocks.jsonl``."""
    line: dict[str, Any] = {
        "block": index,
        "name": job.decoder.names[index],
        "sparsity": masks.sparsity(),
        "matrices": {name: 1 - mask.density() for name, mask in masks.masks.items()},
        "loss_before": None,
        "loss_after": None,
        "relative_error_before": None,
        "relative_error_after": None,
        "losses": [],
        "gradient_norms": [],
        "seconds": seconds,
        "tuning_seconds": tuning,
        "peak_memory_bytes": _peak_memory(job.decoder.device),
        "implementations": {op: explain(op, job.decoder.device).impl for op in FUSED_OPS},
        "notes": masks.notes,
    }
    if result is not None:
        energy = result.branch_energy or math.inf
        line |= {
            "loss_before": result.error_before,
            "loss_after": result.error_after,
            "relative_error_before": result.error_before / energy,
            "relative_error_after": result.error_after / energy,
            "losses": result.losses,
            "gradient_norms": result.gradient_norms,
        }
    return line


def _block_note(line: dict[str, Any]) -> str:
    pruned = f"{line['sparsity']:.1%} sparse"
    if line["loss_before"] is None:
        return pruned
    return f"{pruned}, relative error {line['relative_error_before']:.3g} -> {line['relative_error_after']:.3g}"


def _peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's peak resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- before and after ---------------------------------------------------------------------------------------------


@dataclass
class _Clock:
    """Seconds of each stage."""

    began: float = field(default_factory=time.perf_counter)
    laps: dict[str, float] = field(default_factory=dict)

    def lap(self, name: str) -> None:
        self.laps[name] = self.total() - sum(self.laps.values())

    def total(self) -> float:
        return time.perf_counter() - self.began


@dataclass
class _Job:
    """Everything a run works with, checked."""

    config: EBFTConfig
    name: str
    decoder: Decoder
    teacher: Decoder
    tokenizer: PreTrainedTokenizerBase | None
    masker: Masker
    reconstructor: BlockReconstructor | None
    calibration: Tokens | None
    eval_tokens: dict[str, Tokens]
    output: OutputFolder
    reporter: Reporter
    clock: _Clock


def _prepare(
    config: EBFTConfig,
    model: str | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher: PreTrainedModel | None,
    criterion: Criterion | None,
    text: Iterable[str] | None,
    output: OutputFolder,
    reporter: Reporter,
) -> _Job:
    """Load and check everything, so that what is wrong is said before any work is done."""
    clock = _Clock()
    device, compute = choose_device(config.device, config.dtype)
    choice = explain(FUSED_OPS[0], device)
    if config.fused and not choice.fused:
        raise EBFTError(f"--fused cannot be had: {choice}")
    masker = make_masker(config.prune, config.mask_pattern, criterion)
    recovers = config.recover != "none"
    if config.prune == "zeros" and criterion is None and recovers and teacher is None and config.teacher is None:
        raise EBFTError("--prune zeros with a recovery needs --teacher: against itself the loss is 0")

    source = config.model if model is None else model
    if isinstance(source, PreTrainedModel):
        loaded = source
    else:
        reporter.say(f"loading {source or DEFAULT_MODEL}")
        loaded = load_model(source, trust_remote_code=config.trust_remote_code)
        tokenizer = tokenizer or load_tokenizer(source, trust_remote_code=config.trust_remote_code)
    for flag, length in (("--seqlen", config.seqlen), ("--eval-seqlen", config.eval_seqlen if config.eval_texts else 0)):
        longest = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
        if longest and length > longest:
            raise EBFTError(f"{flag} is {length}; expected at most {longest}, the model's max_position_embeddings")
    decoder = Decoder(loaded, device, compute)
    dense = decoder
    if teacher is not None or config.teacher is not None:
        given = teacher or load_model(config.teacher, trust_remote_code=config.trust_remote_code)
        dense = Decoder(given, device, compute)
        _check_teacher(decoder, dense)
    for index, name in enumerate(decoder.names):
        masker.check(name, decoder.stored_block(index), decoder.matrices[index])

    eval_tokens = {}
    calibration = None
    if config.eval_texts or recovers or masker.needs_inputs:
        if tokenizer is None:
            raise EBFTError("a model in memory was given without its tokenizer, which turns text into tokens")
        eval_tokens = {t: evaluation_tokens(t, tokenizer, seqlen=config.eval_seqlen) for t in config.eval_texts}
    if (recovers or masker.needs_inputs) and tokenizer is not None:
        calibration = calibration_tokens(
            config.calibration if text is None else text,
            tokenizer,
            samples=config.samples,
            seqlen=config.seqlen,
            windows=config.windows,
            seed=config.seed,
        )
        use = calibration.use
        reporter.say(f"calibration: {use.tokens} tokens of {use.source} ({use.windows}, {use.documents} documents)")
    reporter.say(f"{choice}; products in {str(compute).removeprefix('torch.')}")
    clock.lap("load")
    return _Job(
        config=config,
        name=source if isinstance(source, str) else DEFAULT_MODEL if source is None else type(loaded).__name__,
        decoder=decoder,
        teacher=dense,
        tokenizer=tokenizer,
        masker=masker,
        reconstructor=BlockReconstructor(config, device, compute) if recovers else None,
        calibration=calibration,
        eval_tokens=eval_tokens,
        output=output,
        reporter=reporter,
        clock=clock,
    )


def choose_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """What ``--device`` and ``--dtype`` mean on this machine: the device, and the dtype of the matrix products."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise EBFTError(f"--device is {device!r}; expected cpu, cuda, or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise EBFTError(f"--device is {device!r}; expected cpu, cuda, or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise EBFTError(f"--device is {device}; this machine has {torch.cuda.device_count()} GPUs that torch can use")
    if dtype != "auto":
        return chosen, getattr(torch, dtype)
    if chosen.type == "cpu":
        return chosen, torch.float32
    has_bfloat16 = torch.cuda.get_device_capability(chosen)[0] >= 8
    return chosen, torch.bfloat16 if has_bfloat16 else torch.float16


def _check_teacher(decoder: Decoder, teacher: Decoder) -> None:
    if len(teacher) != len(decoder):
        raise EBFTError(f"--teacher has {len(teacher)} blocks; expected {len(decoder)}, as the model has")
    for index, name in enumerate(decoder.names):
        shapes = {n: tuple(p.shape) for n, p in decoder.stored_block(index).named_parameters()}
        theirs = {n: tuple(p.shape) for n, p in teacher.stored_block(index).named_parameters()}
        for parameter in sorted(shapes.keys() | theirs.keys()):
            if shapes.get(parameter) != theirs.get(parameter):
                raise EBFTError(
                    f"--teacher has {theirs.get(parameter)} for {name}.{parameter}; "
                    f"expected {shapes.get(parameter)}, as the model has"
                )


def _measure(
    job: _Job, what: str, decoder: Decoder, block_at: Callable[[int], nn.Module] | None = None
) -> dict[str, float]:
    """Perplexity on every evaluation text."""
    if not job.eval_tokens:
        return {}
    windows = {name: tokens.ids for name, tokens in job.eval_tokens.items()}
    with job.reporter.progress(what, len(decoder)) as advance:
        return perplexities(decoder, windows, block_at, on_block=advance)


def _summary(job: _Job, masks: dict[str, PackedMask], stages: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What ``ebft_summary.json`` holds."""
    config = job.config
    how = config.prune if config.prune in ("zeros", *CRITERIA) else "given masks"
    pattern = f" {config.mask_pattern}" if config.prune in CRITERIA else ""
    total = sum(mask.numel() for mask in masks.values())
    return {
        "model": job.name,
        "recipe": f"{how}{pattern}, " + ("no recovery" if config.recover == "none" else f"recovered by {config.recover}"),
        "output": str(job.output.final),
        "perplexity": {text: {stage: values[text] for stage, values in stages.items()} for text in job.eval_tokens},
        "seconds": job.clock.total(),
        "stage_seconds": job.clock.laps,
        "sparsity": 1 - sum(mask.count() for mask in masks.values()) / total,
        "calibration": job.calibration.use.to_dict() if job.calibration else None,
        "evaluation": {name: tokens.use.to_dict() for name, tokens in job.eval_tokens.items()},
        "implementations": {op: str(explain(op, job.decoder.device)) for op in FUSED_OPS},
        "config": config.to_dict(),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("ebft", "torch", "transformers")},
            "device": _device_name(job.decoder.device),
            "threads": torch.get_num_threads(),
        },
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
