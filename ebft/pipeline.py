"""The walk over the blocks: prune one, reconstruct it, keep it, go on; then save the model and measure it."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ebft.checkpoint import SUMMARY, OutputFolder, load_saved
from ebft.config import EBFTConfig
from ebft.decoder import Decoder
from ebft.errors import EBFTError
from ebft.evaluate import perplexities
from ebft.job import FUSED_OPS, Job, prepare_job, summarise
from ebft.plan import fit_to_budget
from ebft.pruning import BlockMasks, Criterion, InputObserver, Statistics
from ebft.reconstruct import BlockResult
from ebft.report import Reporter, model_card
from ebft.report_page import report_page
from ebft.stream import Stream, Streams
from ebft_kernels import PackedMask, explain


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
    output = OutputFolder(config.output, overwrite=config.overwrite)
    config = fit_to_budget(config, model, reporter.say)
    job = prepare_job(config, model, tokenizer, teacher, criterion, text, output, reporter)
    with output:
        return _run(job)


def _run(job: Job) -> RunResult:
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
    out.save_masks(all_masks)
    clock.lap("save")
    recovered = {}
    if job.eval_tokens:
        saved = load_saved(type(decoder.model), out.path)
        recovered = _measure(job, "recovered perplexity", Decoder(saved, decoder.device, decoder.compute))
    clock.lap("recovered_perplexity")

    summary = summarise(job, all_masks, {"dense": dense, "pruned": pruned, "recovered": recovered})
    out.write_json(SUMMARY, summary)
    out.write_text("README.md", model_card(summary))
    out.write_text("report.html", report_page(summary, blocks))
    out.commit()
    job.reporter.table(summary)
    return RunResult(out.final, summary, blocks, all_masks, decoder.model)


def apply_masks(block: nn.Module, masks: dict[str, PackedMask]) -> None:
    """Set pruned weights to zero."""
    for name, mask in masks.items():
        mask.zero_pruned_(block.get_parameter(name))


# --- the walk -----------------------------------------------------------------------------------------------------


def _walk(job: Job) -> tuple[list[dict[str, Any]], list[BlockMasks]]:
    """Prune and recover every block in turn; gives the report's lines and the masks."""
    decoder = job.decoder
    streams = Streams(job.config, decoder, job.teacher, job.calibration.ids) if job.calibration else None
    lines: list[dict[str, Any]] = []
    all_masks: list[BlockMasks] = []
    with job.reporter.progress("block", len(decoder)) as advance:
        for index, name in enumerate(decoder.names):
            began = time.perf_counter()
            if decoder.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(decoder.device)
            block = decoder.working_block(index)
            statistics = _dense_pass(job, streams, index, block) if streams else {}
            masks = job.masker(name, block, decoder.matrices[index], statistics)
            apply_masks(block, masks.masks)
            result = _recover(job, streams, index, block, masks, advance) if streams and job.reconstructor else None

            weights = decoder.round_as_stored(index, block)  # the stream goes through the block as it is saved
            if not all(torch.isfinite(weight).all() for weight in weights.values()):
                raise _not_finite(job, index, "its weights hold NaN or infinity")
            if streams:
                streams.sparse_pass(partial(decoder.run_block, index, block))
                _check_finite(job, index, streams.inputs, "the next block's inputs")
            job.output.write_block(index, weights)
            all_masks.append(masks.to("cpu"))
            lines.append(_block_line(job, index, masks, result, time.perf_counter() - began))
            job.output.append_line("blocks.jsonl", lines[-1])
            advance(index + 1, _block_note(lines[-1]))
    return lines, all_masks


def _dense_pass(job: Job, streams: Streams, index: int, block: nn.Module) -> Statistics:
    """The dense block on its stream: its outputs become the targets, its inputs the criterion's statistics.

    Where the teacher is another model, the statistics are those of the block that is pruned, from a pass of its own.
    """
    decoder, teacher = job.decoder, job.teacher
    observer = InputObserver(block, decoder.matrices[index])
    watching = observer.watching() if job.masker.needs_inputs else contextlib.nullcontext()
    run = partial(decoder.run_block, index, block)
    if teacher is decoder:
        with watching:
            streams.dense_pass(run)
    else:
        if job.masker.needs_inputs:
            with watching, torch.no_grad():
                for hidden in streams.dense_source.batches():
                    run(hidden)
        streams.dense_pass(partial(teacher.run_block, index, teacher.working_block(index)))
    _check_finite(job, index, streams.targets, "the dense block's outputs")
    return observer.statistics


def _recover(
    job: Job, streams: Streams, index: int, block: nn.Module, masks: BlockMasks, advance: Callable[..., None]
) -> BlockResult:
    """Tune ``block`` in place."""
    assert job.reconstructor is not None
    result = job.reconstructor.fit(
        block,
        streams.inputs.states,
        streams.targets.states,
        masks=masks.masks,
        index=index,
        forward=partial(job.decoder.run_block, index),
        on_step=lambda done, steps: advance(index + done / steps),
    )
    if not math.isfinite(result.error_after):
        raise _not_finite(job, index, "its outputs are NaN or infinity, or too large for a mean square")
    return result


def _check_finite(job: Job, index: int, stream: Stream, what: str) -> None:
    if not stream.is_finite():
        raise _not_finite(job, index, f"{what} hold NaN or infinity")


def _not_finite(job: Job, index: int, what: str) -> EBFTError:
    kept = f"; the {index} finished blocks are kept in {job.output.path}" if index else ""
    return EBFTError(f"block {index} ({job.decoder.names[index]}): {what}{kept}")


def _block_line(job: Job, index: int, masks: BlockMasks, result: BlockResult | None, seconds: float) -> dict[str, Any]:
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
        "tuning_seconds": 0.0,
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
            "tuning_seconds": result.seconds,
            "losses": result.losses,
            "gradient_norms": result.gradient_norms,
            "notes": masks.notes + result.notes,
        }
    return line


def _block_note(line: dict[str, Any]) -> str:
    said = f"{line['sparsity']:.1%} sparse"
    if line["loss_before"] is not None:
        said += f", relative error {line['relative_error_before']:.3g} -> {line['relative_error_after']:.3g}"
    return "; ".join([said, *line["notes"]])


def _peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak within the block on a GPU; on a CPU, the process's peak resident memory so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _measure(
    job: Job, what: str, decoder: Decoder, block_at: Callable[[int], nn.Module] | None = None
) -> dict[str, float]:
    """Perplexity on every evaluation text."""
    if not job.eval_tokens:
        return {}
    windows = {name: tokens.ids for name, tokens in job.eval_tokens.items()}
    with job.reporter.progress(what, len(decoder)) as advance:
        return perplexities(decoder, windows, block_at, on_block=advance)
