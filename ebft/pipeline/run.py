"""A run from its beginning to its end: measure, walk over the blocks, recover the whole, save, measure again.

Long, because it is the one page on which the order of a run stands.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ebft.config import ORGANISATION, EBFTConfig
from ebft.config.fields import parse_bytes
from ebft.data.streams import Store
from ebft.distributed import joined
from ebft.errors import EBFTError, MemoryRanOut, on_one_line
from ebft.evaluation.perplexity import perplexities
from ebft.files import ordinary, parse_json, read_json
from ebft.model.checkpoint import load_model, open_saved
from ebft.model.decoder import Decoder
from ebft.model.in_memory import given_model
from ebft.model.libraries import quiet
from ebft.model.tensors import ShardedWeights
from ebft.output.card import model_card
from ebft.output.checkpoint import Checkpoint
from ebft.output.figures import held_out
from ebft.output.folder import MASKS, OutputFolder
from ebft.output.loggers import Logger, make_loggers, tell_steps
from ebft.output.page import report_page
from ebft.output.records import LINES, SUMMARY
from ebft.output.terminal import Reporter
from ebft.pipeline.context import Clock, RunContext, name_of
from ebft.pipeline.continuations import of_dense, of_pruned, of_saved
from ebft.pipeline.memory import HostMemory, begin_peak_memory, peak_memory
from ebft.pipeline.pace import Pace
from ebft.pipeline.prepare import prepare_run
from ebft.pipeline.summary import summarise
from ebft.pipeline.survey import survey
from ebft.pipeline.walk import apply_masks, check_weights, say_notes, walk
from ebft.pruning.masker import Function
from ebft.pruning.protocol import Criterion
from ebft.pruning.structured.narrow import as_saved
from ebft.recovery.whole_model import WholeTask
from ebft_kernels import PackedMask, load_masks


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        output: the folder with the recovered model.
        summary: what ``ebft_summary.json`` holds.
        blocks: what ``blocks.jsonl`` holds, a dict a block.
        masks: full parameter name -> mask; read from ``output`` when first asked for.
        model: the model with the recovered weights, on the host: the one in memory that was given, or else the one
            saved in ``output``, loaded whole when first asked for.
    """

    output: Path
    summary: dict[str, Any]
    blocks: list[dict[str, Any]]
    _given: PreTrainedModel | None = field(default=None, repr=False)
    _trust_remote_code: bool = field(default=False, repr=False)

    @classmethod
    def read(cls, output: Path, *, trust_remote_code: bool = False) -> RunResult:
        """What an earlier run left in ``output``; ``trust_remote_code``: ``model`` may run code that lies there."""
        try:
            summary = read_json(output / SUMMARY, SUMMARY)
            lines = ordinary(output / LINES, LINES).read_text(encoding="utf-8").splitlines()
            blocks = [parse_json(line) for line in lines]
        except (OSError, ValueError) as error:
            raise EBFTError(f"{output} is not what a run leaves: {on_one_line(error)}") from None
        if not isinstance(summary, dict) or not isinstance(summary.get("config"), dict):
            raise EBFTError(f"{output / SUMMARY} is not what a run writes: it holds no settings")
        return cls(output, summary, blocks, _trust_remote_code=trust_remote_code)

    @cached_property
    def masks(self) -> dict[str, PackedMask]:
        """See above."""
        return load_masks(self.output / MASKS)

    @cached_property
    def model(self) -> PreTrainedModel:
        """See above."""
        return self._given or load_model(str(self.output.absolute()), trust_remote_code=self._trust_remote_code)


def run_ebft(
    model: str | PreTrainedModel | None = None,
    config: EBFTConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher: PreTrainedModel | None = None,
    criterion: Criterion | Function | None = None,
    text: Iterable[str] | None = None,
    reporter: Reporter | None = None,
    loggers: Sequence[Logger] = (),
    since: float | None = None,
) -> RunResult:
    """Prune a model, recover it block by block (arXiv 2402.12419), save it and measure it.

    Args:
        model: what to prune: a hub id, a folder, a GGUF file, or a model in memory (that inside of torch.compile,
            DataParallel or DDP), whose blocks then hold the recovered weights at the end, and whose ``MaskedLinear``
            layers their masks; by default ``config.model.source``.
        config: the settings (default: ``EBFTConfig()``, the published recipe). With ``resume``, an interrupted run is
            gone on with if everything that it depends on is the same (of a criterion of one's own: its name).
        tokenizer: for a model in memory; otherwise the model's own is loaded.
        teacher: a dense model in memory whose blocks are the targets; otherwise ``config.model.teacher``.
        criterion: a function (weight, inputs, pattern) -> bool mask, in place of ``config.prune.criterion``.
        text: documents to calibrate on, in place of ``config.data.calibration``.
        reporter: where progress goes (default: the terminal).
        loggers: told of every step, block and the end, beside those of ``config.output.log``.
        since: what ``time.perf_counter()`` gave when the work began, if imports are to count as a stage (default: now).

    Raises:
        EBFTError: something given cannot be used, activations are no longer finite, or memory ran out; the blocks that
            were finished are kept in ``OUTPUT.partial`` (of a schedule's earlier shares in ``OUTPUT.schedule``).
    """
    config, reporter, clock = config or EBFTConfig(), reporter or Reporter(), Clock()
    if since is not None:
        clock.began = since
        clock.lap("import")
    source = given_model(config.model.source if model is None else model)
    teacher = None if teacher is None else given_model(teacher)
    if len(config.steps) == 1:
        return _run_once(source, config, tokenizer, teacher, criterion, text, reporter, clock, loggers)
    name, dense = name_of(source), None
    with joined() as ranks:  # of all of the runs
        ranks.after_first(
            partial(OutputFolder, config.output.folder, overwrite=config.output.overwrite, resume=config.output.resume)
        )
        if teacher is None and config.model.teacher is None:  # then it is the first model, as it is now
            in_memory = isinstance(source, PreTrainedModel)
            dense = copy.deepcopy(source) if in_memory else source or load_model(None)
        text = None if text is None else list(text)
        said = ",".join(f"{share:g}" for share in config.prune.schedule or ())
        for step in config.steps:
            reporter.say(f"--schedule {said}: {step.prune.sparsity:g}")
            if isinstance(source, str):
                step = step.replace(model=source)
            if isinstance(dense, str) and source != dense and step.has_effect("teacher"):
                step = step.replace(teacher=dense)
            result = _run_once(source, step, tokenizer, teacher, criterion, text, reporter, clock, loggers, name)
            clock = Clock()
            source = result.model if isinstance(source, PreTrainedModel) else str(result.output)
            teacher = dense if isinstance(dense, PreTrainedModel) else teacher
    return result


def _run_once(
    source: str | PreTrainedModel | None,
    config: EBFTConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher: PreTrainedModel | None,
    criterion: Criterion | Function | None,
    text: Iterable[str] | None,
    reporter: Reporter,
    clock: Clock,
    loggers: Sequence[Logger],
    name: str | None = None,
) -> RunResult:
    """``run_ebft`` for one share; ``name``: of the model, where that is not the source's."""
    with joined() as ranks:
        if ranks.rank:
            reporter = Reporter(Console(file=io.StringIO()))  # the first speaks for all
        output = ranks.after_first(
            partial(OutputFolder, config.output.folder, overwrite=config.output.overwrite, resume=config.output.resume)
        )
        if config.runtime.gpu_memory or config.runtime.host_memory:
            from ebft.plan.planner import fit_to_budget  # here, not above: torch's trackers take a while to import

            config = fit_to_budget(config, source, reporter.say)
            clock.lap("plan")
        if output.finished and (result := _finished(config, output, reporter)):
            return result
        with _running_out_said(output), HostMemory() as memory, contextlib.ExitStack() as inside:
            context = prepare_run(config, source, tokenizer, teacher, criterion, text, output, reporter, ranks, clock)
            context.name = name or context.name
            if not ranks.rank:
                made = make_loggers(config.output.log, config.output.folder, config.flat())
                context.loggers = [*loggers, *made]
            ranks.first(lambda: inside.enter_context(output) and None)
            return _run(context, source if isinstance(source, PreTrainedModel) else None, memory)


@contextlib.contextmanager
def _running_out_said(output: OutputFolder) -> Iterator[None]:
    """Say in one sentence that memory ran out, and what is left."""
    try:
        yield
    except (MemoryError, RuntimeError, MemoryRanOut) as error:
        ours = isinstance(error, MemoryRanOut)
        ran_out = ours or isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not ran_out and "can't allocate memory" not in str(error):
            raise
        kept = f"; what was finished is kept in {output.path}: --resume goes on from there" if output.kept() else ""
        raise EBFTError(f"{error if ours else 'memory ran out'}{kept}") from error


def _finished(config: EBFTConfig, output: OutputFolder, reporter: Reporter) -> RunResult | None:
    """``--resume`` after the end: the finished run, if it is this one; None if it is another that may be replaced."""
    result = RunResult.read(output.final, trust_remote_code=config.model.trust_remote_code)
    before, now = (
        {name: value for name, value in settings.items() if name not in ORGANISATION}
        for settings in (result.summary["config"], config.flat())
    )
    if before == now:
        reporter.say(f"{output.final} is finished: there is nothing left to do")
        return result
    if not config.output.overwrite:
        raise EBFTError(
            f"--resume: there is nothing to resume, and {output.final} holds a run with other settings; give "
            "--overwrite to replace it"
        )
    return None


def _run(context: RunContext, given: PreTrainedModel | None, memory: HostMemory) -> RunResult:
    decoder, out = context.decoder, context.output
    if context.config.output.resume and not out.resumed:
        context.reporter.say("there is nothing to resume: the run begins")

    if text := context.generated:
        _stage(context, "generated", lambda: None, partial(out.write_generated, text.tokens.ids, text.made_from))
    dense = _stage(context, "dense_perplexity", partial(_measure_dense, context))
    texts = _continued(context, "dense", partial(of_dense, context))
    pace = Pace(context)
    if surveyor := context.masker.surveyor:
        surveyor.take(_stage(context, "survey", partial(survey, context, surveyor)))
    pace.begin_walk(sum(context.clock.laps.get(f"dense_{of}", 0.0) for of in ("perplexity", "samples")))
    lines = walk(context, pace)
    stages = {"dense": dense}
    recovers = context.recovery is not None or bool(context.whole_model)
    if recovers:
        pruned = partial(_measure, context, "pruned perplexity", decoder, _pruned(context))
        stages["pruned"] = _stage(context, "pruned_perplexity", pruned)
        texts |= _continued(context, "pruned", partial(of_pruned, context))
    whole_model = {
        name: _recover_whole(context, name, pace.of_whole(len(context.whole_model) - place))
        for place, name in enumerate(context.whole_model)
    }
    if not isinstance(decoder.weights, ShardedWeights):  # a model in memory takes the recovered weights
        for index in range(len(decoder)):
            decoder.store_block(index, out.block(index), out.block_masks(index))
    _stage(context, "save", lambda: None, partial(_save, context))
    last = "recovered" if recovers else "pruned"  # nothing has come between: the saved files are the pruned model
    stages[last] = _stage(context, f"{last}_perplexity", partial(_measure_saved, context, f"{last} perplexity"))
    texts |= _continued(context, last, lambda: of_saved(context, _saved(context)))
    zero_shot = (
        _stage(context, "zero_shot", lambda: context.ranks.first(partial(_ask, context))) if context.zero_shot else {}
    )

    kept = sum(line["kept_weights"] for line in lines)
    sparsity = 1 - kept / sum(line["prunable_weights"] for line in lines)
    summary = summarise(context, sparsity, stages, whole_model, zero_shot, texts, memory.peak())

    def commit() -> list[str]:
        out.write_text("README.md", model_card(summary))
        out.write_text("report.html", report_page(summary, lines))
        context.clock.lap("report")
        summary.update(seconds=context.clock.total(), stage_seconds=context.clock.laps)
        out.write_json(SUMMARY, summary)
        return out.commit()

    summary["files"] = context.ranks.first(commit)
    for logger in context.loggers:
        logger.on_end(summary)
    context.reporter.table(summary)
    return RunResult(out.final, summary, lines, given, context.config.model.trust_remote_code)


def _stage(context: RunContext, name: str, make: Callable[[], Any], write: Callable[[], list[Path]] = list) -> Any:
    """What a stage of the run comes to, made now or by the run that is gone on with; ``write`` gives its files."""
    part = context.ranks.first(partial(context.output.part, name))
    say_notes(context)
    if part is None:
        result, files = make(), context.ranks.first(write)
        context.clock.lap(name)
        part = {"result": result, "clock": context.clock.read()}
        context.ranks.first(partial(context.output.commit_part, name, part, files))
    else:
        context.clock.go_on_from(part["clock"])
    return part["result"]


def _continued(context: RunContext, stage: str, sample: Callable[[], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the model of a stage writes, by the stage's name; nothing where there are no prompts."""
    return {stage: _stage(context, f"{stage}_samples", sample)} if context.prompts else {}


# --- after the walk -----------------------------------------------------------------------------------------------


def _pruned(context: RunContext) -> Callable[[int], nn.Module]:
    """The blocks pruned and not recovered."""

    def block_at(index: int) -> nn.Module:
        pruned = context.output.pruned_block(index)
        block = context.decoder.working_block(index, pruned)
        if pruned is None:
            prefix = f"{context.decoder.names[index]}."
            masks = context.output.block_masks(index)
            apply_masks(block, {name.removeprefix(prefix): mask for name, mask in masks.items()})
        return block

    return block_at


def _recover_whole(context: RunContext, name: str, seconds: float | None) -> dict[str, Any]:
    """Recover the whole model by ``name``, in so many seconds if there is a limit; gives its entry in the summary."""
    decoder, out, recovered = context.decoder, context.output, list[nn.Module]()
    checkpoint = Checkpoint(out, name, context.ranks)

    def make() -> dict[str, Any]:
        assert context.calibration is not None
        begin_peak_memory(decoder.device)
        with context.reporter.progress(name, 1) as advance:
            task = WholeTask(
                decoder=decoder,
                teacher=context.teacher,
                saved=out.block,
                masks={n: mask for index in range(len(decoder)) for n, mask in out.block_masks(index).items()},
                tokens=context.calibration.ids,
                store=context.store,
                ranks=context.ranks,
                on_step=advance,
                checkpoint=checkpoint,
                seconds=seconds,
            )
            result = context.whole_model[name].recover(task)
        recovered.extend(result.blocks)
        tell_steps(context.loggers, name, result.losses)
        context.clock.lap(name)
        entry: dict[str, Any] = {
            "losses": result.losses,
            "held_out_before": result.held_out_before,
            "held_out_after": result.held_out_after,
            "held_out_parts": {part: list(of) for part, of in result.held_out_parts.items()},
            "seconds": result.seconds,
            "peak_memory_bytes": peak_memory(decoder.device),
            "notes": result.notes,
        }
        if told := held_out(entry):
            context.reporter.say(f"{name}: {told}")
        if result.left_out:
            entry["plain_merge"] = _plain_merge(context, recovered, result.left_out)
            context.clock.lap("plain_merge_perplexity")
        return entry

    def write() -> list[Path]:
        files = []
        for index, block in enumerate(recovered):
            weights = decoder.round_as_stored(index, block)
            check_weights(context, index, weights, f" after --recover {name}")
            files.append(out.rewrite_block(index, decoder.weights.as_stored(weights), name))
        return files

    entry = _stage(context, name, make, write)
    checkpoint.drop()
    out.newest = name
    return entry


def _plain_merge(
    context: RunContext, blocks: Sequence[nn.Module], left_out: Mapping[str, Callable[[], Tensor]]
) -> dict[str, Any]:
    """Perplexity and sparsity of what would be saved without masks, a block of which is there at a time."""
    decoder = context.decoder

    def block_at(index: int) -> nn.Module:
        name = decoder.names[index]
        block = copy.deepcopy(blocks[index])
        for matrix in decoder.matrices[index]:
            if f"{name}.{matrix.name}" in left_out:
                block.get_parameter(matrix.name).add_(left_out[f"{name}.{matrix.name}"]())
        decoder.round_as_stored(index, block)
        return block

    zeros = weights = 0
    for index, matrices in enumerate(decoder.matrices):
        block = block_at(index)
        for weight in (block.get_parameter(matrix.name) for matrix in matrices):
            zeros, weights = zeros + int((weight == 0).sum()), weights + weight.numel()
    perplexity = _measure(context, "perplexity of the plain merge", decoder, block_at)
    return {"perplexity": perplexity, "sparsity": zeros / weights}


def _save(context: RunContext) -> list[Path]:
    """The recovered model as an ordinary folder; gives the files with weights and masks."""
    decoder, out, count = context.decoder, context.output, len(context.decoder)
    largest = parse_bytes(context.config.output.max_shard_size, "--max-shard-size")
    model, masks = as_saved(context.config, decoder, out)
    if isinstance(decoder.weights, ShardedWeights):
        files = out.save_shards(decoder.weights.tensors, count, largest, context.reporter.progress)
    else:
        files = out.save_model(model, largest)
    out.save_settings(model, context.tokenizer)
    return files + out.save_masks(masks)


def _measure_saved(context: RunContext, what: str) -> dict[str, float]:
    """Perplexity of the saved files."""
    if not context.eval_tokens:
        return {}
    recovered = _measure(context, what, _saved(context))
    for text, value in recovered.items():
        if math.isnan(value):
            raise EBFTError(
                f"the saved model's perplexity on {text} is nan; what was finished is in {context.output.path}"
            )
    return recovered


def _saved(context: RunContext) -> Decoder:
    """The saved files."""
    decoder = context.decoder
    saved = open_saved(type(decoder.model), context.output.path)
    return Decoder(saved.model, decoder.device, decoder.compute, weights=saved.weights)


def _ask(context: RunContext) -> dict[str, dict[str, float]]:
    """Zero-shot tasks, on the model that the saved files give."""
    assert context.zero_shot is not None
    assert context.tokenizer is not None
    context.reporter.say(f"zero-shot: {', '.join(context.config.evaluate.tasks)}")
    kind, folder = type(context.decoder.model), context.output.path
    with quiet():
        model = kind.from_pretrained(folder, dtype="auto").eval()
    return context.zero_shot.measure(model, context.tokenizer, context.decoder.device)


def _measure_dense(context: RunContext) -> dict[str, float]:
    """Perplexity of the dense model, which is a number, or the run is for nothing."""
    dense, teacher = _measure(context, "dense perplexity", context.teacher), context.teacher
    for text, value in dense.items():
        if not math.isfinite(value):
            named = next(filter(None, map(teacher.not_finite, range(len(teacher)))), None)
            because = f"{named} holds NaN or infinity" if named else "its weights are finite, and what it makes is not"
            raise EBFTError(f"the dense model's perplexity on {text} is {value}: {because}; expected a finite one")
    return dense


def _measure(
    context: RunContext, what: str, decoder: Decoder, block_at: Callable[[int], nn.Module] | None = None
) -> dict[str, float]:
    """Perplexity on every evaluation text."""
    if not context.eval_tokens:
        return {}
    windows = {name: tokens.ids for name, tokens in context.eval_tokens.items()}
    store = Store(decoder.device, context.store.kind, output=context.output, owner=context.store.owner)
    with context.reporter.progress(what, len(decoder)) as advance:
        return perplexities(decoder, windows, block_at, on_block=advance, store=store, ranks=context.ranks)
