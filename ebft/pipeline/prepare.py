"""What a run works with, loaded and checked before any work is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ebft.config import EBFTConfig
from ebft.data.calibration import Tokens, calibration_tokens, check_vocabulary, evaluation_tokens, mixture
from ebft.data.generation import Generated, generate
from ebft.data.streams import Store
from ebft.data.texts import SELF, check_hub, check_texts
from ebft.distributed import Ranks
from ebft.errors import EBFTError
from ebft.evaluation.continuations import read_prompts
from ebft.evaluation.zero_shot import ZeroShot
from ebft.model.agreement import check_agreement
from ebft.model.checkpoint import Source, load_config, load_model, load_tokenizer, open_model
from ebft.model.decoder import Decoder
from ebft.model.device import choose_device
from ebft.model.fused import liger_missing
from ebft.model.lengths import check_lengths
from ebft.model.provenance import provenance
from ebft.model.tensors import ModelWeights, ShardedWeights, check_floats
from ebft.output.folder import OutputFolder, check_settings_save
from ebft.output.terminal import Reporter
from ebft.pipeline.checks import check_ends, check_masks, check_teacher
from ebft.pipeline.context import Clock, RunContext, are_independent, name_of
from ebft.pipeline.summary import FUSED_OPS, fingerprint, settings_of, summarise
from ebft.pruning.masker import Function, make_masker
from ebft.pruning.protocol import Criterion
from ebft.pruning.structured.biases import consumers, with_biases
from ebft.recovery.protocol import Place
from ebft.recovery.samples import Split
from ebft.recovery.task import make_recoveries
from ebft.registry import criteria
from ebft_kernels import Choice, explain


def prepare_run(
    config: EBFTConfig,
    model: str | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher: PreTrainedModel | None,
    criterion: Criterion | Function | None,
    text: Iterable[str] | None,
    output: OutputFolder,
    reporter: Reporter,
    ranks: Ranks,
    clock: Clock,
) -> RunContext:
    """Load and check everything, so that what is wrong is said before any work is done."""
    source = config.model.source if model is None else model
    device, compute = choose_device(config.runtime.device, config.runtime.dtype)
    kernels = _kernels(config, device)
    prompts = read_prompts(config.evaluate.prompts)
    masker = make_masker(config, criterion)
    recovery, whole_model = make_recoveries(config)
    _check_before_loading(config, source, text)
    decoder, dense = _decoders(config, source, teacher, reporter, device, compute)
    check_masks(config, masker, decoder, dense)

    read_text = config.recover.method != "none" or bool(masker.needs) or masker.surveyor is not None
    if tokenizer is None and not isinstance(source, PreTrainedModel):
        tokenizer = load_tokenizer(source, trust_remote_code=config.model.trust_remote_code)
    if tokenizer is None and (config.evaluate.texts or config.evaluate.tasks or read_text):
        raise EBFTError("a model in memory was given without its tokenizer, which turns text into tokens")
    ranks.first(partial(check_settings_save, f"model {name_of(source)}", decoder.model, tokenizer))
    zero_shot = None
    if config.evaluate.tasks:
        zero_shot = ranks.first(partial(ZeroShot.prepare, list(config.evaluate.tasks), config.evaluate.limit))
    sharing = Ranks() if are_independent(config) else ranks
    context = RunContext(
        config=config,
        name=name_of(source),
        source={} if isinstance(source, PreTrainedModel) else provenance(source),
        decoder=decoder,
        teacher=dense,
        tokenizer=tokenizer,
        masker=masker,
        recovery=recovery,
        whole_model=whole_model,
        calibration=None,
        generated=None,
        eval_tokens=_evaluation(config, tokenizer),
        zero_shot=zero_shot,
        prompts=prompts if tokenizer else [],
        store=_choose_store(config, device, output, ranks),
        output=output,
        reporter=reporter,
        clock=clock,
        ranks=ranks,
        sharing=sharing,
    )
    if read_text:
        _read_calibration(context, source, text)
    _check_tokens(context)
    for method in (recovery, *whole_model.values()):
        if method is not None:
            method.prepare(Place(device, compute, sharing))
    for whole in whole_model.values():
        whole.check_room(decoder)
    _say_how(context, kernels)
    output.fingerprint = ranks.first(partial(_fingerprint, context))
    output.about = ranks.first(partial(summarise, context))
    clock.lap("load")
    return context


def _kernels(config: EBFTConfig, device: torch.device) -> list[Choice]:
    """What would run the fused ops; ``EBFTError`` where ``--fused`` cannot be had."""
    choices = [explain(op, device) for op in FUSED_OPS]
    for choice in choices:
        if config.runtime.fused and not choice.fused:
            raise EBFTError(f"--fused cannot be had: {choice}")
    return choices


def _check_before_loading(config: EBFTConfig, source: str | PreTrainedModel | None, text: Iterable[str] | None) -> None:
    """``EBFTError`` for what can be known to be wrong without reading weights."""
    if text is None:
        check_texts(config)
        check_hub(config)
    if isinstance(source, str) and not source.lower().endswith(".gguf"):  # whose header takes seconds to read
        check_lengths(config, load_config(source, trust_remote_code=config.model.trust_remote_code))


def _fingerprint(context: RunContext) -> dict[str, dict[str, Any]]:
    """What the run depends on. All bytes of the weights are read for it, which is shown: there may be many."""
    for weights in dict.fromkeys((context.decoder.weights, context.teacher.weights)):
        if isinstance(weights, ShardedWeights):
            with context.reporter.progress("checksum of the weights", 1, None) as weights.on_part_read:
                assert weights.fingerprint
    return fingerprint(context)


def _decoders(
    config: EBFTConfig,
    source: str | PreTrainedModel | None,
    teacher: PreTrainedModel | None,
    reporter: Reporter,
    device: torch.device,
    compute: torch.dtype,
) -> tuple[Decoder, Decoder]:
    """The model that is pruned, and the dense one whose blocks are the targets: the same where no other is given."""
    reporter.say(f"loading {name_of(source)}")
    student = _open(config, source, reporter)
    check_lengths(config, student.model.config)
    fuse = config.runtime.fused and device.type == "cuda" and liger_missing() is None
    decoder = Decoder(student.model, device, compute, fuse, student.weights)
    check_ends(decoder, f"model {name_of(source)}")
    check_agreement(decoder, f"model {name_of(source)}")
    if teacher is None and config.model.teacher is None:
        return decoder, decoder
    opened = _with_biases_of(student.model, _open(config, teacher or config.model.teacher, reporter))
    dense = Decoder(opened.model, device, compute, fuse, opened.weights)
    check_teacher(decoder, dense)
    check_ends(dense, "--teacher")
    check_agreement(dense, "--teacher")
    return decoder, dense


def _evaluation(config: EBFTConfig, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Tokens]:
    """The windows of every evaluation text."""
    if tokenizer is None:
        return {}
    settings = config.evaluate
    read = partial(evaluation_tokens, tokenizer=tokenizer, seqlen=settings.seqlen, most=settings.tokens)
    return {text: read(text) for text in settings.texts}


def _read_calibration(context: RunContext, source: str | PreTrainedModel | None, text: Iterable[str] | None) -> None:
    """Read the calibration sequences, or have the dense model write them."""
    config, dense, tokenizer = context.config, context.teacher, context.tokenizer
    assert tokenizer is not None
    if text is None and SELF in config.data.parts:
        context.clock.lap("load")
        whole = None if dense.weights.on_disk else dense.model
        named = config.model.teacher or (source if isinstance(source, str) else None)
        trust, ignore = config.model.trust_remote_code, config.model.ignore_unused

        def load() -> PreTrainedModel:
            return whole or load_model(named, trust_remote_code=trust, ignore_unused=ignore)

        write = partial(_write_text, config, dense, load, tokenizer, context.output, context.reporter)
        context.generated = context.ranks.first(write)
        context.clock.lap("generation")
    context.calibration = _calibrate(config, tokenizer, text, context.generated)
    context.reporter.say(f"calibration: {context.calibration.use}")


def _check_tokens(context: RunContext) -> None:
    """``EBFTError`` for tokens that a model has no embedding for, and for fewer sequences than ranks."""
    calibration = context.calibration
    for tokens in (*context.eval_tokens.values(), *([calibration] if calibration else [])):
        for decoder in (context.decoder, context.teacher):
            assert context.tokenizer is not None
            check_vocabulary(tokens, context.tokenizer, decoder.model.get_input_embeddings().weight.shape[0])
    if calibration and len(calibration.ids) < context.sharing.count:
        raise EBFTError(
            f"--samples is {len(calibration.ids)}, and {context.sharing.count} ranks share them; expected one for each "
            "at least"
        )


def _say_how(context: RunContext, kernels: Sequence[Choice]) -> None:
    """What does the work, and where hidden states are."""
    device, compute, say = context.decoder.device, context.decoder.compute, context.reporter.say
    if context.config.runtime.fused and device.type == "cuda":
        say(f"norms, rotary embedding and SwiGLU: {liger_missing() or 'in liger-kernel where the family is known'}")
    say(f"{kernels[0]}; products in {str(compute).removeprefix('torch.')}")
    say(f"hidden states: {context.store.kind}")


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
    depends_on = [teacher.weights.fingerprint, settings_of(teacher.model), samples, seqlen, seed]
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


def _choose_store(config: EBFTConfig, device: torch.device, output: OutputFolder, ranks: Ranks) -> Store:
    """What ``--streams`` means here; where a budget was given the plan has chosen already."""
    runtime = config.runtime
    on_host = runtime.streams == "auto" or (runtime.streams == "device" and device.type == "cpu")
    store = Store(device, "host" if on_host else runtime.streams, getattr(torch, runtime.stream_dtype), output)
    store.owner = f".rank-{ranks.rank}" if ranks.count > 1 else ""
    return store
