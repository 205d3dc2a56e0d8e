"""What a run will need, from config.json alone, before anything is loaded; and the settings that fit a budget.

The memory and work of passes are those of the real code, run on fake tensors (no storage, no arithmetic) under torch's
own memory tracker and FLOP counter. What a method needs it says itself (``Footprint``); here that is added up.
docs/plans.md says what is assumed.

Long, because the sums and the search over settings use the same parts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ebft.config import EBFTConfig, parse_bytes
from ebft.data.calibration import builtin_documents
from ebft.data.generation import WRITTEN_AT_ONCE
from ebft.data.texts import SELF
from ebft.errors import EBFTError
from ebft.evaluation.perplexity import TOKENS_AT_ONCE
from ebft.evaluation.zero_shot import BATCH
from ebft.model.blocks import autocast
from ebft.model.checkpoint import load_config
from ebft.model.device import choose_device
from ebft.model.lengths import check_lengths
from ebft.model.locate import DEFAULT_MODEL
from ebft.model.stand_ins import Tracker, shapes_only
from ebft.output.figures import duration
from ebft.plan.data_sheets import DEVICES, HERE, SHARE
from ebft.plan.plan import Plan, flags, gib
from ebft.plan.shapes import Observed, Shapes
from ebft.pruning.masker import make_masker
from ebft.pruning.transposable import ENTRIES_AT_ONCE
from ebft.recovery.protocol import Footprint, Recovery, Traffic
from ebft.recovery.task import make_recoveries
from ebft.registry import recoveries

_MIB = 2**20

# What no tensor shows (docs/plans.md has the sources).
CONTEXT = 512 * _MIB  # of a process on a GPU, outside the allocator: driver, kernels as they are loaded
WORKSPACES = 64 * _MIB  # cuBLAS: 32 MiB on Hopper, 8 MiB before; as much again for kernels' own
FRAGMENTS = 0.05  # of what is allocated: the caching allocator's rounding and holes
AHEAD = 2  # batches that travel to a GPU while one is worked on
HOST = 1536 * _MIB  # Python, torch, transformers and CUDA's part on the host
DRAWN = 4  # tensors of logits in float64 while a token is drawn
BUS = 25e9  # bytes a second each way between host and GPU: what PCIe 4.0 with 16 lanes reaches
TILE_BYTES = 8  # an entry of the largest tensor while transposable masks are made, beside MASK_BYTES
QUESTION = 512  # tokens of a zero-shot task's question and one of its answers
WIKITEXT2 = 350_000  # tokens of its test split, for vocabularies of 32 000; fewer with larger ones
BYTES_A_TOKEN = 3  # of other texts: few tokenizers make more of English


def make_plan(config: EBFTConfig, on: str = HERE, model_config: Any = None) -> Plan:
    """The plan for ``config``: reads the model's configuration, none of its weights.

    With ``gpu_memory`` or ``host_memory`` settings are chosen that fit, from those that cost least speed to those that
    save most; without, and on no named GPU, they are taken as they are.

    Args:
        on: ``here``, or the name of a GPU, whose memory then is the budget where ``gpu_memory`` gives none. With
            ``gpu_memory`` on a machine without a GPU the plan is for any that computes in bfloat16.
        model_config: of a model in memory.

    Raises:
        EBFTError: the model or the settings cannot be used.
    """
    if any(recoveries[name].holds_the_model for name in config.whole_model_recoveries):
        raise EBFTError(
            f"--recover {config.recover.method} holds the whole model in memory, which neither --plan nor a memory "
            "budget counts; expected recoveries of blocks, or distill"
        )
    return _Planner(config, on, model_config).fitting()


def fit_to_budget(config: EBFTConfig, model: str | PreTrainedModel | None, say: Callable[[str], object]) -> EBFTConfig:
    """``config`` with what ``gpu_memory`` and ``host_memory`` make of it; torch's allocator is held to the first.

    Raises:
        EBFTError: nothing fits, or there is no GPU for ``gpu_memory``.
    """
    budgets = {"--gpu-memory": config.runtime.gpu_memory, "--host-memory": config.runtime.host_memory}
    given = " ".join(f"{flag} {size}" for flag, size in budgets.items() if size)
    if not given:
        return config
    device, _ = choose_device(config.runtime.device, config.runtime.dtype)
    if config.runtime.gpu_memory and device.type != "cuda":
        raise EBFTError(
            f"--gpu-memory is {config.runtime.gpu_memory}, and the run is on a CPU; expected a GPU (--plan plans for "
            "one)"
        )
    known = model.config if isinstance(model, PreTrainedModel) else None
    named = config.replace(model=model) if isinstance(model, str) else config
    plan = make_plan(named, model_config=known)
    if plan.faults:
        raise EBFTError(plan.faults[0])
    if config.runtime.gpu_memory:
        budget, (_, total) = parse_bytes(config.runtime.gpu_memory, "--gpu-memory"), torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(budget - CONTEXT, _MIB) / total), device)
    say(f"{given}: {flags(plan.chosen) or 'the settings as given'}")
    return config.replace(**plan.chosen)


class _Planner:
    """One model on one device; plans for settings that differ in what a budget may change."""

    def __init__(self, config: EBFTConfig, on: str, model_config: Any) -> None:
        self.config, self.on = config, on
        self.gpu, self.compute = _where(config, on)
        if model_config is None:
            model_config = load_config(config.model.source, trust_remote_code=config.model.trust_remote_code)
        check_lengths(config, model_config)
        self.shapes = Shapes(config, model_config, self.gpu, self.compute)
        self.gpu_budget = parse_bytes(config.runtime.gpu_memory, "--gpu-memory") if config.runtime.gpu_memory else None
        if self.gpu_budget is None and on in DEVICES:
            self.gpu_budget = DEVICES[on].memory
        host = config.runtime.host_memory
        self.host_budget = parse_bytes(host, "--host-memory") if host else None
        self._footprints = cache(self._measured)

    # --- the search -------------------------------------------------------------------------------------------------

    def fitting(self) -> Plan:
        """The first plan on the ladder that fits; the leanest, with its faults, where none does."""
        rungs = list(self._ladder())
        if self.gpu_budget is None and self.host_budget is None:
            return self.plan(rungs[0])
        first, last = 0, len(rungs) - 1
        if not self._fits(rungs[last]):
            last_resort = self._last_resort(rungs[last])
            if last_resort is not None and self._fits(last_resort):
                return self.plan(last_resort)
            leanest = [rungs[last], *([last_resort] if last_resort is not None else [])]
            return self.plan(min(leanest, key=lambda rung: sum(self.device(rung).values())))
        while first < last:  # every rung needs less than those before it
            middle = (first + last) // 2
            first, last = (first, middle) if self._fits(rungs[middle]) else (middle + 1, last)
        return self.plan(rungs[first])

    def _ladder(self) -> Iterator[EBFTConfig]:
        """Settings that need less and less of the device, each with all that the ones before it save."""
        config = self.config
        for place in self._places():
            yield (config := config.replace(streams=place))
        for recovery in self._recoveries(config):
            for changes in recovery.leaner(self.shapes.with_settings(config)):
                yield (config := config.replace(**changes))

    def _last_resort(self, config: EBFTConfig) -> EBFTConfig | None:
        for recovery in self._recoveries(config):
            changes = recovery.last_resort(self.shapes.with_settings(config))
            if changes is not None:
                return config.replace(**changes)
        return None

    def _recoveries(self, config: EBFTConfig) -> list[Recovery]:
        """Those of the whole model first: to stream its blocks saves most, and costs no precision."""
        chain, of_whole = make_recoveries(config)
        return [*of_whole.values(), *(chain.links if chain else ())]

    def _places(self) -> list[str]:
        """Where streams may be, the fastest first."""
        if self.config.runtime.streams != "auto" or not self.config.has_effect("streams"):
            return [self.config.runtime.streams]
        if not self.gpu:
            return ["host", "disk"]
        on_host = sum(self.host(self.config.replace(streams="host")).values())
        off = "host" if self.host_budget is None or on_host <= self.host_budget else "disk"
        return ["device", off] if self.gpu_budget is not None else [off]

    def _fits(self, config: EBFTConfig) -> bool:
        return not self._faults(config)

    def _faults(self, config: EBFTConfig) -> list[str]:
        device = max(sum(self.device(config).values()), *self.stages(config).values())
        host = sum(self.host(config).values()) + (0 if self.gpu else device)
        budgets = (
            ("--gpu-memory", self.gpu_budget if self.gpu else None, device),
            ("--host-memory", self.host_budget, host),
        )
        return [
            f"it does not fit: {gib(needed).strip()} is needed with the leanest settings, and {flag} is "
            f"{gib(budget).strip()}"
            for flag, budget, needed in budgets
            if budget is not None and needed > budget
        ]

    def plan(self, config: EBFTConfig) -> Plan:
        """The whole plan for these settings."""
        asked, planned = self.config.flat(), config.flat()
        flops = self.flops(config)
        return Plan(
            model=self.config.model.source or DEFAULT_MODEL,
            config=config,
            chosen={name: value for name, value in planned.items() if value != asked.get(name)},
            device=self.device(config),
            stages=self.stages(config),
            host=self.host(config),
            disk=self.disk(config),
            flops=flops,
            seconds={name: flops / rate for name, rate in self._rates().items()},
            gpu=self.gpu,
            traffic=[line for of in self.footprints(config) if of.traffic for line in self._travelling(of.traffic)],
            faults=self._faults(config),
        )

    # --- rows -------------------------------------------------------------------------------------------------------

    def footprints(self, config: EBFTConfig) -> tuple[Footprint, ...]:
        """What each of the recoveries needs of its own."""
        return self._footprints(config.replace(streams="auto"))

    def _measured(self, config: EBFTConfig) -> tuple[Footprint, ...]:
        return tuple(each.footprint(self.shapes.with_settings(config)) for each in self._recoveries(config))

    def device(self, config: EBFTConfig) -> dict[str, int]:
        """Bytes on the device while a block is tuned."""
        rows = max((of.device for of in self.footprints(config)), key=lambda rows: sum(rows.values()), default={})
        return {**rows, **self._around(config, sum(rows.values()))}

    def stages(self, config: EBFTConfig) -> dict[str, int]:
        """Bytes on the device in each of the other stages, with all that is there beside."""
        passes = dict(self._passes)
        for of in self.footprints(config):
            passes |= of.stages
        if self._writes:
            passes["text by the dense model"] = self._writing()
        if config.evaluate.tasks:
            shapes = self.shapes
            logits = 2 * BATCH * QUESTION * shapes.vocabulary * shapes.stored.itemsize
            passes["zero-shot, the whole model"] = shapes.parameters * shapes.stored.itemsize + logits
        return {name: size + sum(self._around(config, size).values()) for name, size in passes.items()}

    @property
    def _writes(self) -> bool:
        return SELF in self.config.data.parts

    def _writing(self) -> int:
        """Bytes for the whole model, keys and values of all tokens that are written together, and a few logits."""
        text, stored, seqlen = self.shapes.model_config, self.shapes.stored.itemsize, self.config.data.seqlen
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        sequences = max(1, WRITTEN_AT_ONCE // seqlen)
        cached = 2 * len(self.shapes.decoder) * width * sequences * seqlen * stored
        return self.shapes.parameters * stored + cached + DRAWN * 8 * sequences * self.shapes.vocabulary

    def _around(self, config: EBFTConfig, tracked: int) -> dict[str, int]:
        """What lies on a GPU beside a stage's own tensors."""
        if not self.gpu:
            return {}
        a_sample = config.data.seqlen * self.shapes.width * getattr(torch, config.runtime.stream_dtype).itemsize
        streams = int(self._buffers(config) * config.data.samples * a_sample)
        travelling = AHEAD * 2 * min(config.recover.batch_size, config.data.samples) * a_sample
        on_device = config.runtime.streams == "device"
        rows = {"streams": streams} if on_device else {"batches on their way": travelling}
        allocated = tracked + sum(rows.values()) + WORKSPACES
        return rows | {
            "workspaces": WORKSPACES,
            "fragmentation": int(FRAGMENTS * allocated),
            "CUDA context": CONTEXT,
        }

    def host(self, config: EBFTConfig) -> dict[str, int]:
        """Bytes on the host."""
        shapes, stored = self.shapes, self.shapes.stored.itemsize
        rest = shapes.parameters - shapes.in_blocks
        embedding = rest if shapes.tied else rest - shapes.vocabulary * shapes.width
        rows = {
            "Python and libraries": HOST,
            "blocks: read ahead, at hand, finished": 3 * shapes.largest * stored,
            "embeddings, in float32 while they are used": embedding * 4,
        }
        source = config.model.source
        if source is None or Path(source).suffix.lower() == ".gguf":
            rows["the model, which is loaded whole"] = shapes.parameters * stored
        elif (self._writes or config.evaluate.tasks) and self.gpu:
            rows["the whole model, on its way to the GPU"] = shapes.parameters * stored
        for of in self.footprints(config):
            rows |= of.host
        if config.runtime.streams not in ("device", "disk"):
            rows["streams"] = self._streams(config)
        return rows

    def disk(self, config: EBFTConfig) -> dict[str, int]:
        """Bytes in the output's folder while it is made."""
        shapes, stored = self.shapes, self.shapes.stored.itemsize
        rows = {
            "model": shapes.parameters * stored,
            "masks": shapes.in_blocks // 8,
            "finished blocks, until the end": shapes.in_blocks * stored,
        }
        for of in self.footprints(config):
            rows |= of.disk
        return rows | ({"streams": self._streams(config)} if config.runtime.streams == "disk" else {})

    def _streams(self, config: EBFTConfig) -> int:
        """Hidden states of calibration, or of evaluation texts."""
        size = getattr(torch, config.runtime.stream_dtype).itemsize
        calibration = int(self._buffers(config) * config.data.samples * config.data.seqlen * size)
        return max(calibration, sum(map(_tokens_of, config.evaluate.texts)) * 4) * self.shapes.width

    def _buffers(self, config: EBFTConfig) -> float:
        """Streams of calibration: inputs and targets; dense inputs, mixed ones, and what recoveries keep."""
        kept = {"block": 0.0, "model": 0.0}
        for recovery, of in zip(self._recoveries(config), self.footprints(config), strict=True):
            kept[recovery.scope] = max(kept[recovery.scope], of.streams)
        dense_inputs = any(recovery.needs_dense_inputs for recovery in self._recoveries(config))
        walk = 2 + (dense_inputs and config.recover.target == "dense-stream") + (config.recover.input == "mix")
        return max(walk + kept["block"], kept["model"])

    # --- what the real code does with fake tensors ------------------------------------------------------------------

    @cached_property
    def _passes(self) -> dict[str, int]:
        """Peak bytes of the stages that every run may have."""
        config, shapes = self.config, self.shapes
        batch = min(config.recover.batch_size, config.data.samples)
        masker, links = make_masker(config), self._recoveries(config)
        needs = masker.needs.union(*(recovery.needs for recovery in links))
        grams = shapes.gram_bytes if "gram" in needs else 0
        working = max(map(masker.working_bytes, shapes.matrices.values()))
        if config.prune.transposable:
            working += TILE_BYTES * min(ENTRIES_AT_ONCE, config.prune.mask_pattern.group * shapes.largest)
        at_once = max((recovery.blocks_at_once for recovery in links), default=1)
        beside = 4 * shapes.largest * (at_once - 1)  # the block that is tuned, while the next one is made
        made = 4 * shapes.largest + sum(m.experts * m.outputs * m.inputs for m in shapes.matrices.values())
        found = {"masks of a block": beside + made + working + grams}
        walks = masker.needs or masker.surveyor is not None or config.recover.method != "none"
        sizes = {"dense pass, with statistics": (batch, config.data.seqlen)} if walks else {}
        if config.evaluate.texts:
            sizes["perplexity, a block"] = (max(1, TOKENS_AT_ONCE // config.evaluate.seqlen), config.evaluate.seqlen)
        for name, size in sizes.items():
            tracker = Tracker()
            with shapes.fakes(*size, flash=self.gpu) as (block, call):
                x = torch.empty(*size, shapes.width)
                tracker.track_external(block, x)
                with tracker, torch.no_grad(), Observed():
                    call(block, x, compute=self.compute)
            found[name] = tracker.peak() + (beside + grams if name.startswith("dense pass") else 0)
        return found | (self._head() if config.evaluate.texts else {})

    def _head(self) -> dict[str, int]:
        """Of the final norm and the head, while a perplexity is measured."""
        tracker, shapes = Tracker(), self.shapes
        with shapes_only():
            head = torch.empty(shapes.vocabulary, shapes.width)
            hidden, labels = torch.empty(TOKENS_AT_ONCE, shapes.width), torch.empty(TOKENS_AT_ONCE, dtype=torch.long)
            tracker.track_external(head, hidden, labels)
            with tracker, torch.no_grad():
                with autocast(torch.device("cpu"), self.compute):
                    logits = F.linear(hidden, head)
                F.cross_entropy(logits.float(), labels, reduction="sum")
        return {"perplexity, final norm and head": tracker.peak()}

    def flops(self, config: EBFTConfig) -> float:
        """FLOPs of the walk over the blocks, and of the recoveries in it."""
        masker, seqlen = make_masker(config), config.data.seqlen
        with self.shapes.fakes(1, seqlen, flash=False) as (block, call), FlopCounterMode(display=False) as counter:
            call(block, torch.empty(1, seqlen, self.shapes.width), compute=self.compute)
        watched = bool(masker.needs) and config.prune.statistics == "input" and config.recover.target == "dense-stream"
        passes = len(self.shapes.decoder) * (2 + (masker.surveyor is not None) + watched)
        of_recoveries = sum(of.flops for of in self.footprints(config))
        return config.data.samples * passes * counter.get_total_flops() + of_recoveries

    def _travelling(self, traffic: Traffic) -> Iterator[str]:
        """How long blocks are on their way to and from the device, and how large a batch takes as long."""
        seconds = traffic.a_step / BUS
        yield (
            f"blocks and states travel in each of {traffic.steps} steps: {gib(traffic.a_step).strip()} each way, "
            f"{duration(seconds)} at {BUS / 1e9:.0f} GB/s, {duration(seconds * traffic.steps)} in all"
        )
        for name, rate in self._rates().items():
            hidden = max(1, math.ceil(seconds * rate / traffic.flops))
            yield f"  on {name} work hides it from --batch-size {hidden} (it is {traffic.samples})"

    def _rates(self) -> dict[str, float]:
        """FLOP/s by name: of the device named, of the one that is here, or of all that are known."""
        if self.on in DEVICES:
            return {f"{self.on} at {SHARE:.0%} of its rate": DEVICES[self.on].rate * SHARE}
        if self.gpu and not torch.cuda.is_available():
            return {f"{name} at {SHARE:.0%}": known.rate * SHARE for name, known in DEVICES.items()}
        device, _ = choose_device(self.config.runtime.device, self.config.runtime.dtype)
        rate = _matmul_rate(device, self.compute)
        return {f"this machine at the {rate / 1e9:.0f} GFLOP/s that a product reaches now": rate}


def _where(config: EBFTConfig, on: str) -> tuple[bool, torch.dtype]:
    """Whether the plan is for a GPU, and the dtype of products there."""
    absent = (
        config.runtime.gpu_memory is not None
        and not torch.cuda.is_available()
        and config.runtime.device in ("auto", "cuda")
    )
    if on == HERE and not absent:
        device, compute = choose_device(config.runtime.device, config.runtime.dtype)
        return device.type == "cuda", compute
    dtype = (
        config.runtime.dtype if config.runtime.dtype != "auto" else DEVICES[on].dtype if on in DEVICES else "bfloat16"
    )
    return True, getattr(torch, dtype)


def _tokens_of(text: str) -> int:
    """About how many tokens an evaluation text has, without reading it."""
    file = Path(text).expanduser()
    if file.is_file():
        return file.stat().st_size // BYTES_A_TOKEN
    return sum(map(len, builtin_documents("evaluation"))) // BYTES_A_TOKEN if text == "builtin" else WIKITEXT2


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product on the device, now: the median of three."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(4):  # the first warms up
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / sorted(seconds[1:])[1]
