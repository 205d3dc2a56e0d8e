"""What a run works with, loaded and checked before any work is done; and what it says of itself at the end."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ebft.config import ORGANISATION, EBFTConfig
from ebft.data.calibration import Tokens, calibration_tokens, check_vocabulary, evaluation_tokens, mixture
from ebft.data.generation import Generated, generate
from ebft.data.streams import Store
from ebft.data.texts import SELF, check_texts
from ebft.distributed import Ranks
from ebft.errors import EBFTError
from ebft.evaluation.zero_shot import ZeroShot
from ebft.files import checksum
from ebft.model.checkpoint import DEFAULT_MODEL, Source, load_config, load_model, load_tokenizer, open_model
from ebft.model.decoder import Decoder
from ebft.model.device import choose_device
from ebft.model.fused import liger_missing
from ebft.model.lengths import check_lengths
from ebft.model.weights import ModelWeights, check_floats
from ebft.output.folder import OutputFolder
from ebft.output.terminal import Reporter
from ebft.pipeline.checks import check_ends, check_masks, check_teacher
from ebft.pruning.masker import Function, Masker, make_masker
from ebft.pruning.protocol import Criterion
from ebft.pruning.structured.biases import consumers, with_biases
from ebft.recovery.protocol import Place, WholeModelRecovery
from ebft.recovery.samples import Split
from ebft.recovery.task import Chain, make_recoveries
from ebft.registry import criteria
from ebft.version import __version__, code_digest
from ebft_kernels import explain

FUSED_OPS = ("masked_adamw_step", "masked_grad_norm")  # the products run on zeroed weights, without masks


@dataclass
class Clock:
    """Seconds of each stage."""

    began: float = field(default_factory=time.perf_counter)
    laps: dict[str, float] = field(default_factory=dict)

    def lap(self, name: str) -> None:
        """The stage ``name`` ends now; it began where the one before ended."""
        self.laps[name] = self.laps.get(name, 0.0) + self.total() - sum(self.laps.values())

    def read(self) -> dict[str, Any]:
        """All of it, for ``go_on_from``."""
        return {"total": self.total(), "laps": dict(self.laps)}

    def go_on_from(self, read: dict[str, Any]) -> None:
        """It is as late as it was in an interrupted run; what passed since, here or there, is lost."""
        self.began, self.laps = time.perf_counter() - read["total"], dict(read["laps"])

    def total(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self.began


@dataclass
class Job:
    """Everything a run works with, checked.

    Attributes:
        generated: what of the calibration text the dense model has written.
        ranks: all processes of the run.
        sharing: of these, those that share the calibration sequences: all, or in a block-parallel run this one alone.
    """

    config: EBFTConfig
    name: str
    decoder: Decoder
    teacher: Decoder
    tokenizer: PreTrainedTokenizerBase | None
    masker: Masker
    recovery: Chain | None
    whole_model: dict[str, WholeModelRecovery]
    calibration: Tokens | None
    generated: Generated | None
    eval_tokens: dict[str, Tokens]
    zero_shot: ZeroShot | None
    store: Store
    output: OutputFolder
    reporter: Reporter
    clock: Clock
    ranks: Ranks
    sharing: Ranks


def prepare_job(
    config: EBFTConfig,
    model: str | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher: PreTrainedModel | None,
    criterion: Criterion | Function | None,
    text: Iterable[str] | None,
    output: OutputFolder,
    reporter: Reporter,
    ranks: Ranks,
) -> Job:
    """Load and check everything, so that what is wrong is said before any work is done."""
    clock = Clock()
    device, compute = choose_device(config.runtime.device, config.runtime.dtype)
    choices = [explain(op, device) for op in FUSED_OPS]
    for choice in choices:
        if config.runtime.fused and not choice.fused:
            raise EBFTError(f"--fused cannot be had: {choice}")
    masker = make_masker(config, criterion)
    recovery, whole_model = make_recoveries(config)
    recovers = config.recover.method != "none"

    if text is None:
        check_texts(config)
    source = config.model.source if model is None else model
    if isinstance(source, str) and not source.lower().endswith(".gguf"):  # whose header takes seconds to read
        check_lengths(config, load_config(source, trust_remote_code=config.model.trust_remote_code))
    reporter.say(f"loading {name_of(source)}")
    student = _open(config, source, reporter)
    check_lengths(config, student.model.config)
    fuse = config.runtime.fused and device.type == "cuda" and liger_missing() is None
    decoder = Decoder(student.model, device, compute, fuse, student.weights)
    check_ends(decoder, f"model {name_of(source)}")
    dense = decoder
    if teacher is not None or config.model.teacher is not None:
        opened = _with_biases_of(student.model, _open(config, teacher or config.model.teacher, reporter))
        dense = Decoder(opened.model, device, compute, fuse, opened.weights)
        check_teacher(decoder, dense)
        check_ends(dense, "--teacher")
    check_masks(config, masker, decoder, dense)

    needs_calibration = recovers or bool(masker.needs) or masker.surveyor is not None
    if tokenizer is None and not isinstance(source, PreTrainedModel):
        tokenizer = load_tokenizer(source, trust_remote_code=config.model.trust_remote_code)
    if tokenizer is None and (config.evaluate.texts or config.evaluate.tasks or needs_calibration):
        raise EBFTError("a model in memory was given without its tokenizer, which turns text into tokens")
    zero_shot = None
    if config.evaluate.tasks:
        zero_shot = ranks.first(partial(ZeroShot.prepare, list(config.evaluate.tasks), config.evaluate.limit))
    evaluation, calibration, generated = {}, None, None
    if tokenizer is not None:
        evaluation = {
            t: evaluation_tokens(t, tokenizer, seqlen=config.evaluate.seqlen, most=config.evaluate.tokens)
            for t in config.evaluate.texts
        }
        if needs_calibration:
            if text is None and SELF in config.data.parts:
                clock.lap("load")
                whole = None if dense.weights.on_disk else dense.model
                named = config.model.teacher or (source if isinstance(source, str) else None)

                def load() -> PreTrainedModel:
                    return whole or load_model(
                        named,
                        trust_remote_code=config.model.trust_remote_code,
                        ignore_unused=config.model.ignore_unused,
                    )

                generated = ranks.first(partial(_write_text, config, dense, load, tokenizer, output, reporter))
                clock.lap("generation")
            calibration = _calibrate(config, tokenizer, text, generated)
            reporter.say(f"calibration: {calibration.use}")
        for tokens in (*evaluation.values(), *([calibration] if calibration else [])):
            for model_of in (decoder, dense):
                check_vocabulary(tokens, tokenizer, model_of.model.get_input_embeddings().weight.shape[0])
    if config.runtime.fused and device.type == "cuda":
        reporter.say(
            f"norms, rotary embedding and SwiGLU: {liger_missing() or 'in liger-kernel where the family is known'}"
        )
    reporter.say(f"{choices[0]}; products in {str(compute).removeprefix('torch.')}")
    sharing = Ranks() if blocks_are_independent(config) else ranks
    if calibration and len(calibration.ids) < sharing.count:
        raise EBFTError(
            f"--samples is {len(calibration.ids)}, and {sharing.count} ranks share them; expected one for each at least"
        )
    for method in (recovery, *whole_model.values()):
        if method is not None:
            method.prepare(Place(device, compute, sharing))
    store = _choose_store(config, device, output)
    store.owner = f".rank-{ranks.rank}" if ranks.count > 1 else ""
    reporter.say(f"hidden states: {store.kind}")
    output.fingerprint = ranks.first(
        partial(_fingerprint, config, decoder, dense, masker, calibration, evaluation, zero_shot)
    )
    clock.lap("load")
    return Job(
        config=config,
        name=name_of(source),
        decoder=decoder,
        teacher=dense,
        tokenizer=tokenizer,
        masker=masker,
        recovery=recovery,
        whole_model=whole_model,
        calibration=calibration,
        generated=generated,
        eval_tokens=evaluation,
        zero_shot=zero_shot,
        store=store,
        output=output,
        reporter=reporter,
        clock=clock,
        ranks=ranks,
        sharing=sharing,
    )


def blocks_are_independent(config: EBFTConfig) -> bool:
    """No block needs what another is tuned to: all are given the dense model's states, and aim at them."""
    return config.recover.input == "dense-stream"


def name_of(source: str | PreTrainedModel | None) -> str:
    """What a model is called in the report."""
    return source if isinstance(source, str) else DEFAULT_MODEL if source is None else type(source).__name__


def _open(config: EBFTConfig, source: str | PreTrainedModel | None, reporter: Reporter) -> Source:
    if isinstance(source, PreTrainedModel):
        check_floats(dict(source.named_parameters()))
        opened = Source(source, ModelWeights(source))
    else:
        opened = open_model(
            source,
            trust_remote_code=config.model.trust_remote_code,
            ignore_unused=config.model.ignore_unused,
            say=reporter.say,
        )
    return with_biases(opened, consumers(opened.model), reporter.say) if _fills_biases(config) else opened


def _fills_biases(config: EBFTConfig) -> bool:
    """Whether pruning puts something into biases, so that layers without any get some."""
    name = config.prune.criterion
    return config.prune.structured and name in criteria and criteria[name].fills_biases


def _with_biases_of(model: PreTrainedModel, teacher: Source) -> Source:
    """The teacher with biases of 0 where structured pruning has given the model some that it has not got."""
    own, theirs = (
        {name.removesuffix(".bias") for name, _ in of.named_parameters() if name.endswith(".bias")}
        for of in (model, teacher.model)
    )
    return with_biases(teacher, sorted(own - theirs), say=lambda sentence: None) if own - theirs else teacher


def _calibrate(
    config: EBFTConfig, tokenizer: PreTrainedTokenizerBase, text: Iterable[str] | None, generated: Generated | None
) -> Tokens:
    """The calibration sequences; of a mixture, held-out and other ones are of all its texts in proportion."""

    def read(text: str | Iterable[str], samples: int) -> Tokens:
        return calibration_tokens(
            text,
            tokenizer,
            samples=samples,
            seqlen=config.data.seqlen,
            windows=config.data.windows,
            seed=config.runtime.seed,
        )

    if text is not None:
        return read(text, config.data.samples)
    parts = [
        generated.tokens if generated and name == SELF else read(name, samples)
        for name, samples in config.data.parts.items()
    ]
    split = Split.of(config.data.samples, config.recover.holdout, Ranks())
    return parts[0] if len(parts) == 1 else mixture(parts, [split.held_out, split.tuned])


def _write_text(
    config: EBFTConfig,
    teacher: Decoder,
    load: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    output: OutputFolder,
    reporter: Reporter,
) -> Generated:
    """Text by the dense model, or what an interrupted run has kept of the same; ``load`` gives the model whole."""
    samples, seqlen, seed = config.data.parts[SELF], config.data.seqlen, config.runtime.seed
    depends_on = [teacher.weights.fingerprint, _settings_of(teacher.model), samples, seqlen, seed]
    made_from = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
    ids = output.generated(made_from)
    if ids is None:
        with reporter.progress("sequences by the dense model", samples) as advance:
            ids = generate(
                load(),
                tokenizer,
                samples=samples,
                seqlen=config.data.seqlen,
                seed=config.runtime.seed,
                device=teacher.device,
                on_batch=advance,
            )
    return Generated.of(ids, made_from, tokenizer)


def _choose_store(config: EBFTConfig, device: torch.device, output: OutputFolder) -> Store:
    """What ``--streams`` means here; where a budget was given the plan has chosen already."""
    on_host = config.runtime.streams == "auto" or (config.runtime.streams == "device" and device.type == "cpu")
    return Store(
        device, "host" if on_host else config.runtime.streams, getattr(torch, config.runtime.stream_dtype), output
    )


def _fingerprint(
    config: EBFTConfig,
    decoder: Decoder,
    teacher: Decoder,
    masker: Masker,
    calibration: Tokens | None,
    evaluation: dict[str, Tokens],
    zero_shot: ZeroShot | None,
) -> dict[str, dict[str, Any]]:
    """Everything that the results depend on, by heading and name; not where things are."""
    named = ORGANISATION | {"model", "teacher", "calibration", "device"}  # what these name is looked at itself
    return {
        "model": {"weights": decoder.weights.fingerprint, "configuration": _settings_of(decoder.model)},
        "teacher": {"weights": teacher.weights.fingerprint, "configuration": _settings_of(teacher.model)},
        "text": {
            "calibration": calibration.use.sha256 if calibration else None,
            **{name: tokens.use.sha256 for name, tokens in evaluation.items()},
            **(zero_shot.fingerprint() if zero_shot else {}),
        },
        "criterion": {
            "name": masker.name,
            "file": checksum(Path(config.prune.criterion)) if Path(config.prune.criterion).is_file() else None,
            "allocation": checksum(Path(config.prune.allocation)) if Path(config.prune.allocation).is_file() else None,
        },
        "setting": {name: value for name, value in config.flat().items() if name not in named},
        "version": {**_versions(decoder), "products": str(decoder.compute), **implementations(decoder)},
    }


def _settings_of(model: PreTrainedModel) -> str:
    settings = {name: value for name, value in model.config.to_diff_dict().items() if name != "_name_or_path"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


# --- the summary --------------------------------------------------------------------------------------------------


def summarise(
    job: Job,
    sparsity: float,
    stages: dict[str, dict[str, float]],
    whole_model: dict[str, dict[str, Any]],
    zero_shot: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """What ``ebft_summary.json`` holds; ``whole_model``: what recoveries of the whole model came to, by name."""
    config = job.config
    recovery = "no recovery" if config.recover.method == "none" else f"recovered by {config.recover.method}"
    return {
        "model": job.name,
        "recipe": f"{job.masker.name}, {recovery}",
        "output": str(job.output.final),
        "perplexity": {text: {stage: values[text] for stage, values in stages.items()} for text in job.eval_tokens},
        "zero_shot": zero_shot,
        "seconds": job.clock.total(),
        "stage_seconds": job.clock.laps,
        "sparsity": sparsity,
        "asked_sparsity": config.asked_sparsity,
        "whole_model": whole_model,
        "calibration": job.calibration.use.to_dict() if job.calibration else None,
        "evaluation": {name: tokens.use.to_dict() for name, tokens in job.eval_tokens.items()},
        "implementations": implementations(job.decoder),
        "config": config.flat(),
        "versions": {"python": platform.python_version(), **_versions(job.decoder)},
    }


def implementations(decoder: Decoder) -> dict[str, str]:
    """Which kernels do the fused ops."""
    return {op: explain(op, decoder.device).impl for op in FUSED_OPS}


def _versions(decoder: Decoder) -> dict[str, Any]:
    return {
        "ebft": __version__,
        "code": code_digest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": _device_name(decoder.device),
        "threads": torch.get_num_threads(),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
