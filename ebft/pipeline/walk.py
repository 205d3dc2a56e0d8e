"""The walk over the blocks: prune one, recover it, keep it, go on.

Just over the guide line, because what one block goes through stands on one page.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ebft.data.streams import Run, Stream, Streams
from ebft.errors import EBFTError
from ebft.model.decoder import Decoder
from ebft.output.loggers import tell_block
from ebft.output.records import LINES
from ebft.pipeline.context import RunContext
from ebft.pipeline.memory import begin_peak_memory, peak_memory
from ebft.pipeline.pace import Pace
from ebft.pipeline.summary import implementations
from ebft.pruning.masker import BlockMasks
from ebft.pruning.statistics import InputObserver, Statistics, sum_over_ranks_
from ebft.recovery.task import BlockResult, BlockTask, Following
from ebft_kernels import PackedMask


def walk(context: RunContext, pace: Pace) -> list[dict[str, Any]]:
    """Prune and recover every block in turn, in the time that ``pace`` gives it; gives the report's lines."""
    decoder, out, sharing = context.decoder, context.output, context.sharing
    finished = context.ranks.first(partial(_finished_blocks, context))
    say_notes(context)
    lines = {index: part["line"] for index, part in finished.items()}
    for part in finished.values():
        context.clock.go_on_from(part["clock"])
    if lines:
        context.reporter.say(f"{len(lines)} of {len(decoder)} blocks are finished already")
    left = [index for index in range(len(decoder)) if index not in lines]
    mine = left[context.ranks.rank :: context.ranks.count] if context.blocks_are_independent else left
    if mine:
        position = finished[mine[0] - 1]["streams"] if mine[0] - 1 in finished else None
        walks_with_text = context.calibration and (context.recovery or context.masker.needs)
        streams = _streams(context, mine[0], position) if walks_with_text else None
    with context.reporter.progress("block", len(decoder), f"{len(decoder)} blocks") as advance:
        for index in range(mine[0], mine[-1] + 1) if mine else ():
            if index not in mine:
                if streams:
                    _pass_by(context, streams, index)
                continue
            began = time.perf_counter()
            begin_peak_memory(decoder.device)
            block = decoder.working_block(index)
            masks, statistics = _prune(context, streams, index, block)
            kept_apart = masks.changed or (
                context.recovery is not None and context.recovery.changes_masks
            )  # the pruned block is not the dense one under its masks
            pruned = decoder.round_as_stored(index, block) if kept_apart else None
            result = None
            if streams and context.recovery:
                seconds = pace.of_block(lines.values(), len(decoder))
                result = _recover(context, streams, index, block, masks, statistics, lines, advance, seconds)

            weights = decoder.round_as_stored(index, block)  # the stream goes through the block as it is saved
            check_weights(context, index, weights)
            if streams:
                streams.sparse_pass(partial(decoder.run_block, index, block))
                _check_finite(context, index, streams.inputs, "the next block's inputs")
            lines[index] = _block_line(context, index, masks, result, time.perf_counter() - began)
            context.clock.lap("blocks")
            sharing.first(partial(_commit_block, context, index, weights, pruned, masks, streams, lines[index]))
            tell_block(context.loggers, lines[index])
            advance(index + 1, _block_note(lines[index]))
    lines = {index: line for of_rank in context.ranks.gathered(lines) for index, line in of_rank.items()}
    for index in sorted(set(left) - set(mine)) if context.loggers else ():  # those of other ranks
        tell_block(context.loggers, lines[index])
    in_order = [lines[index] for index in range(len(decoder))]
    context.ranks.first(partial(out.write_lines, LINES, in_order))
    return in_order


def _prune(context: RunContext, streams: Streams | None, index: int, block: nn.Module) -> tuple[BlockMasks, Statistics]:
    """Prune ``block`` by what flows into it; gives what the recovery needs of the dense one's statistics, if any."""
    own, dense = _dense_pass(context, streams, index, block) if streams else ({}, {})
    masks = context.masker(context.decoder.names[index], block, context.decoder.matrices[index], own)
    apply_masks(block, masks.masks)
    return masks, dense if context.recovery and context.recovery.needs else {}


def _finished_blocks(context: RunContext) -> dict[int, dict[str, Any]]:
    """What an interrupted run has committed: blocks from the first on, or any where they are independent."""
    found: dict[int, dict[str, Any]] = {}
    for index in range(len(context.decoder)):
        part = context.output.part(_part_of(index), alone=context.blocks_are_independent)
        if part is not None:
            found[index] = part
        elif not context.blocks_are_independent:
            break
    if len(found) < len(context.decoder):
        context.output.forget_others()
    context.output.write_lines(LINES, [part["line"] for part in found.values()])
    return found


def _commit_block(
    context: RunContext,
    index: int,
    weights: dict[str, Tensor],
    pruned: dict[str, Tensor] | None,
    masks: BlockMasks,
    streams: Streams | None,
    line: dict[str, Any],
) -> None:
    """Write a finished block, and commit it."""
    out, name = context.output, context.decoder.names[index]
    full_masks = {f"{name}.{matrix}": mask for matrix, mask in masks.masks.items()}
    stored = context.decoder.weights.as_stored
    files = out.write_block(index, stored(weights), full_masks, stored(pruned) if pruned else None)
    with out.writing():
        position = streams.position() if streams and context.ranks.count == 1 else None
    out.commit_part(_part_of(index), {"line": line, "streams": position, "clock": context.clock.read()}, files)
    if context.sharing == context.ranks:  # otherwise others write too
        out.append_line(LINES, line)


def _part_of(index: int) -> str:
    return f"block-{index:05d}"


def _streams(context: RunContext, done: int, position: dict[str, Any] | None) -> Streams:
    """The streams before block ``done``: an interrupted run's from its files, or made again through finished blocks."""
    assert context.calibration is not None
    decoder, share = context.decoder, context.sharing.share(len(context.calibration.ids))
    make = partial(
        Streams,
        context.config,
        decoder,
        context.teacher,
        context.calibration.ids[share],
        context.store,
        share=share,
        keep_dense_inputs=context.recovery is not None and context.recovery.needs_dense_inputs,
    )
    if position and context.store.kind == "disk" and context.ranks.count == 1:
        if context.output.are_whole(position["files"]):
            return make(position=position)
        context.reporter.say("the streams on disk are broken, or further than the last whole commit: made again")
    streams = make()
    if done:
        with context.reporter.progress("streams through finished blocks", done) as advance:
            for index in range(done):
                _pass_by(context, streams, index)
                advance(index + 1)
    return streams


def _pass_by(context: RunContext, streams: Streams, index: int) -> None:
    """Move the streams past a block that is finished, or another rank's."""
    decoder = context.decoder
    if streams.follow_the_dense:
        _dense_pass(context, streams, index, decoder.working_block(index))
    if context.blocks_are_independent:
        streams.sparse_pass(None)
    else:
        saved = decoder.working_block(index, context.output.block(index))
        streams.sparse_pass(partial(decoder.run_block, index, saved))


def _dense_pass(context: RunContext, streams: Streams, index: int, block: nn.Module) -> tuple[Statistics, Statistics]:
    """The dense block on its stream: its outputs become the targets, inputs give statistics (see ``_observe``)."""
    of_dense = context.recovery.needs if context.recovery else frozenset[str]()
    source = streams.inputs if context.config.prune.statistics == "input" else streams.dense_source
    statistics = _observe(context, index, block, of_dense, source, streams.dense_pass, source is streams.dense_source)
    _check_finite(context, index, streams.targets, "the dense block's outputs")
    return statistics


def _observe(
    context: RunContext,
    index: int,
    block: nn.Module,
    of_dense: frozenset[str],
    source: Stream,
    move: Callable[[Run], object],
    moved: bool,
) -> tuple[Statistics, Statistics]:
    """What ``block``, not yet pruned, is given on ``source``, and the dense one as ``move`` takes a stream through it.

    Args:
        moved: that stream is ``source``.

    Returns:
        what the masker needs to know of ``block``, and ``of_dense`` of the dense one: the same unless the streams are
        two or the teacher is another model, where each has a pass of its own.
    """
    decoder, teacher, of_masker = context.decoder, context.teacher, context.masker.needs
    if teacher is decoder and moved:
        both = _watched(context, decoder, index, block, of_masker | of_dense, move)
        return both, both

    def run_only(run: Run) -> None:
        with torch.no_grad():
            for hidden in source.batches():
                run(hidden)

    own = _watched(context, decoder, index, block, of_masker, run_only) if of_masker else {}
    dense = block if teacher is decoder else teacher.working_block(index)
    return own, _watched(context, teacher, index, dense, of_dense, move)


def _watched(
    context: RunContext,
    model: Decoder,
    index: int,
    block: nn.Module,
    needs: frozenset[str],
    move: Callable[[Run], object],
) -> Statistics:
    """What flows into the matrices of ``block`` while ``move`` takes a stream through it."""
    observer = InputObserver(block, model.matrices[index], needs)
    with observer.watching() if needs else contextlib.nullcontext():
        move(partial(model.run_block, index, block))
    sum_over_ranks_(observer.statistics, context.sharing)
    return observer.statistics


def _recover(
    context: RunContext,
    streams: Streams,
    index: int,
    block: nn.Module,
    masks: BlockMasks,
    statistics: Statistics,
    lines: Mapping[int, dict[str, Any]],
    advance: Callable[..., None],
    seconds: float | None,
) -> BlockResult:
    """Recover ``block`` in place, in so many seconds if there is a limit; ``lines``: those of finished blocks."""
    assert context.recovery is not None
    dense_inputs = streams.dense_inputs
    task = BlockTask(
        index=index,
        block=block,
        matrices=context.decoder.matrices[index],
        masks=masks.masks,
        inputs=streams.inputs.states,
        targets=streams.targets.states,
        forward=partial(context.decoder.run_block, index),
        dense_block=partial(context.teacher.working_block, index),
        dense_forward=partial(context.teacher.run_block, index),
        dense_inputs=None if dense_inputs is None else dense_inputs.states,
        statistics=statistics,
        on_step=lambda done, steps: advance(index + done / steps),
        scratch=streams.scratch,
        following=partial(_following, context, streams, index) if _has_following(context, index) else None,
        finished=[lines[before] for before in range(index) if before in lines],
        blocks=len(context.decoder),
        seconds=seconds,
    )
    result = context.recovery.recover(task)
    if not math.isfinite(result.error_after):
        raise _not_finite(context, index, "its outputs are NaN or infinity, or too large for a mean square")
    masks.masks.update(result.masks)
    return result


def _has_following(context: RunContext, index: int) -> bool:
    return context.recovery is not None and context.recovery.blocks_at_once > 1 and index + 1 < len(context.decoder)


def _following(context: RunContext, streams: Streams, index: int) -> Following:
    """The block after ``index``, pruned by what flows into it where block ``index`` gives its targets."""
    decoder, after, ahead = context.decoder, index + 1, list[Stream]()
    block = decoder.working_block(after)
    statistics, _ = _observe(
        context,
        after,
        block,
        frozenset(),
        streams.targets,
        lambda run: ahead.append(streams.look_ahead(run)),
        moved=True,
    )
    _check_finite(context, index, ahead[0], "the outputs of the dense block after it")
    masks = context.masker(decoder.names[after], block, decoder.matrices[after], statistics).masks
    apply_masks(block, masks)
    return Following(block, decoder.matrices[after], masks, partial(decoder.run_block, after), ahead[0].states)


def _check_finite(context: RunContext, index: int, stream: Stream, what: str) -> None:
    if not context.sharing.all(stream.is_finite()):
        named = context.teacher.not_finite(index)
        raise _not_finite(context, index, f"{what} hold NaN or infinity{f', as {named} does' if named else ''}")


def check_weights(context: RunContext, index: int, weights: Mapping[str, Tensor], when: str = "") -> None:
    """``EBFTError`` if what would be saved of a block, by full names, holds NaN or infinity."""
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise _not_finite(context, index, f"{name} holds NaN or infinity{when}")


def _not_finite(context: RunContext, index: int, what: str) -> EBFTError:
    """The error that says so of ``what`` in a block, and what was kept."""
    kept = f"; the {index} finished blocks are kept in {context.output.path}" if index else ""
    return EBFTError(f"block {index} ({context.decoder.names[index]}): {what}{kept}")


def _block_line(
    context: RunContext, index: int, masks: BlockMasks, result: BlockResult | None, seconds: float
) -> dict[str, Any]:
    """One line of ``blocks.jsonl``."""
    line: dict[str, Any] = {
        "block": index,
        "name": context.decoder.names[index],
        "sparsity": masks.sparsity(),
        "matrices": {name: 1 - mask.density() for name, mask in masks.masks.items()},
        "kept_weights": sum(mask.count() for mask in masks.masks.values()),
        "prunable_weights": sum(mask.numel() for mask in masks.masks.values()),
        "loss_before": None,
        "loss_after": None,
        "relative_error_before": None,
        "relative_error_after": None,
        "relative_held_out_before": None,
        "relative_held_out_after": None,
        "losses": [],
        "gradient_norms": [],
        "seconds": seconds,
        "tuning_seconds": 0.0,
        "epochs": 0,
        "learning_rate": None,
        "trial_steps": 0.0,
        "peak_memory_bytes": peak_memory(context.decoder.device),
        "implementations": implementations(context.decoder),
        "notes": masks.notes,
    }
    if result is not None:
        energy = result.branch_energy or math.inf
        line |= {
            "loss_before": result.error_before,
            "loss_after": result.error_after,
            "relative_error_before": result.error_before / energy,
            "relative_error_after": result.error_after / energy,
            "relative_held_out_before": _over(result.held_out_before, energy),
            "relative_held_out_after": _over(result.held_out_after, energy),
            "tuning_seconds": result.seconds,
            "epochs": result.epochs,
            "learning_rate": result.learning_rate,
            "trial_steps": result.trial_steps,
            "losses": result.losses,
            "gradient_norms": result.gradient_norms,
            "notes": masks.notes + result.notes,
        }
    return line


def _over(error: float | None, energy: float) -> float | None:
    return None if error is None else error / energy


def _block_note(line: dict[str, Any]) -> str:
    said = f"{line['sparsity']:.1%} sparse"
    if line["loss_before"] is not None:
        said += f", relative error {line['relative_error_before']:.3g} -> {line['relative_error_after']:.3g}"
    if line["relative_held_out_before"] is not None:
        said += f", held out {line['relative_held_out_before']:.3g} -> {line['relative_held_out_after']:.3g}"
    return "; ".join([said, *line["notes"]])


def say_notes(context: RunContext) -> None:
    """Say what of an interrupted run was found broken."""
    for note in context.output.notes:
        context.reporter.say(note)
    context.output.notes.clear()


def apply_masks(block: nn.Module, masks: dict[str, PackedMask]) -> None:
    """Set pruned weights to zero."""
    for name, mask in masks.items():
        mask.zero_pruned_(block.get_parameter(name))
