"""What a run will need, from config.json alone, before anything is loaded; and the settings that fit a budget.

The step's memory and work are those of the real step, run on fake tensors (no storage, no arithmetic) under torch's own
memory tracker and FLOP counter; so are those of the passes before and after. docs/plans.md says what is assumed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from ebft.data.calibration import builtin_documents
from ebft.model.checkpoint import DEFAULT_MODEL, load_config
from ebft.pipeline.checks import check_lengths
from ebft.config.config import EBFTConfig, parse_bytes
from ebft.model.decoder import BlockCall, Decoder, autocast, find_blocks
from ebft.plan.devices import DEVICES, HERE, SHARE
from ebft.errors import EBFTError
from ebft.evaluation.perplexity import TOKENS_AT_ONCE
from ebft.data.generation import SELF, WRITTEN_AT_ONCE
from ebft.pipeline.prepare import choose_device, choose_masker
from ebft.pruning import InputStatistics
from ebft.pruning.statistics import PRODUCTS
from ebft.pruning.transposable import ENTRIES_AT_ONCE
from ebft.recovery.ebft.reconstruct import BlockReconstructor
from ebft.recovery import Forward
from ebft.recovery.ebft.halves import halves
from ebft.recovery.layerwise import ROWS_AT_ONCE
from ebft.recovery.ebft.losses import Loss
from ebft.recovery.ebft.pairs import in_turn_through
from ebft.recovery.ebft.refresh import BATCHES, UNTIL
from ebft.output.report import duration
from ebft.model.stand_ins import Tracker, shapes_only, without_values
from ebft.evaluation.zero_shot import BATCH
from ebft_kernels import PackedMask, reconstruction_loss

_GIB, _MIB = 2**30, 2**20
_TRACKED = {
    "Parameter": "weights",
    "Gradient": "gradients",
    "Optstate": "optimizer states",
    "Activation": "activations",
}
_OTHERS = "batch, temporaries and others"

# What no tensor shows (docs/plans.md has the sources).
CONTEXT = 512 * _MIB  # of a process on a GPU, outside the allocator: driver, kernels as they are loaded
WORKSPACES = 64 * _MIB  # cuBLAS: 32 MiB on Hopper, 8 MiB before; as much again for kernels' own
FRAGMENTS = 0.05  # of what is allocated: the caching allocator's rounding and holes
AHEAD = 2  # batches that travel to a GPU while one is worked on
HOST = 1536 * _MIB  # Python, torch, transformers and CUDA's part on the host
DRAWN = 4  # tensors of logits in float64 while a token is drawn
SOLVED = 9  # tensors of rows while the closed form of a layer is made
SWEPT_INPUTS = 5  # matrices inputs x inputs of SparseGPT, beside the Gram matrix: Hessian, damped, inverse, two factors
SWEPT_WEIGHTS = 14  # bytes a weight of it: the weights left, those given back, the scores of a block of columns
SWAPPED_WEIGHTS = 31  # bytes a weight of the matrix at hand, while DSnoT swaps
EXCHANGED_BYTES = 48  # a weight of the matrix at hand, while a part of its mask is chosen anew
TILE_BYTES = 8  # an entry of the largest tensor while transposable masks are made, beside MASK_BYTES
MASK_BYTES = 28  # a weight of the matrix at hand, while its mask is made in torch
QUESTION = 512  # tokens of a zero-shot task's question and one of its answers
WIKITEXT2 = 350_000  # tokens of its test split, for vocabularies of 32 000; fewer with larger ones
BYTES_A_TOKEN = 3  # of other texts: few tokenizers make more of English


@dataclass(frozen=True)
class Plan:
    """What a run needs, in bytes by row, and whether that can be had.

    Attributes:
        model: its name.
        config: the settings, those that were chosen among them.
        chosen: what was chosen: setting -> value.
        device: rows of the device's memory while a block is tuned.
        stages: the device's memory, in all, in the other stages.
        host: rows of the host's memory. Of a run on a CPU, the device's come on top.
        disk: rows of the output's file system.
        flops: of the walk over the blocks.
        seconds: name of a device -> what that takes there, for the matrix products alone.
        gpu: whether the device is one.
        faults: what cannot be had, a sentence each.
    """

    model: str
    config: EBFTConfig
    chosen: dict[str, Any]
    device: dict[str, int]
    stages: dict[str, int]
    host: dict[str, int]
    disk: dict[str, int]
    flops: float
    seconds: dict[str, float]
    gpu: bool
    faults: list[str]

    @property
    def device_peak(self) -> int:
        """Bytes on the device at most."""
        return max(sum(self.device.values()), *self.stages.values())

    @property
    def host_peak(self) -> int:
        """Bytes on the host at most, on a CPU with what is counted as the device's."""
        return sum(self.host.values()) + (0 if self.gpu else self.device_peak)

    def __str__(self) -> str:
        lines = [f"plan for {self.model}"]
        lines += [f"settings chosen: {flags(self.chosen)}"] if self.chosen else []
        lines.append(f"{'GPU' if self.gpu else 'CPU, for the work'}: {_gib(self.device_peak)} at most")
        lines += _table("while a block is tuned", self.device)
        lines += [f"  {name:<44} {_gib(size)}" for name, size in self.stages.items()]
        lines.append(f"host: {_gib(self.host_peak)}{'' if self.gpu else ', the work among it'}")
        lines += [f"    {name:<42} {_gib(size)}" for name, size in self.host.items()]
        lines.append(f"disk: {_gib(sum(self.disk.values()))}")
        lines += [f"    {name:<42} {_gib(size)}" for name, size in self.disk.items()]
        times = ", ".join(f"{duration(seconds)} on {name}" for name, seconds in self.seconds.items())
        lines.append(f"blocks: {self.flops / 1e12:.1f} TFLOP, {times}; loading and perplexities come on top")
        return "\n".join([*lines, *self.faults])


def flags(settings: dict[str, Any]) -> str:
    """Settings as they are said on the command line."""
    said = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        said.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}")
    return " ".join(said)


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
    if config.whole_model_recoveries:
        raise EBFTError(
            f"--recover {config.recover} holds the whole model in memory, which neither --plan nor a memory budget "
            f"counts; expected recoveries of blocks alone"
        )
    return _Planner(config, on, model_config).fitting()


def fit_to_budget(config: EBFTConfig, model: str | PreTrainedModel | None, say: Callable[[str], object]) -> EBFTConfig:
    """``config`` with what ``gpu_memory`` and ``host_memory`` make of it; torch's allocator is held to the first.

    Raises:
        EBFTError: nothing fits, or there is no GPU for ``gpu_memory``.
    """
    budgets = {"--gpu-memory": config.gpu_memory, "--host-memory": config.host_memory}
    given = " ".join(f"{flag} {size}" for flag, size in budgets.items() if size)
    if not given:
        return config
    device, _ = choose_device(config.device, config.dtype)
    if config.gpu_memory and device.type != "cuda":
        raise EBFTError(
            f"--gpu-memory is {config.gpu_memory}, and the run is on a CPU; expected a GPU (--plan plans for one)"
        )
    known = model.config if isinstance(model, PreTrainedModel) else None
    named = dataclasses.replace(config, model=model) if isinstance(model, str) else config
    plan = make_plan(named, model_config=known)
    if plan.faults:
        raise EBFTError(plan.faults[0])
    if config.gpu_memory:
        budget, (_, total) = parse_bytes(config.gpu_memory, "--gpu-memory"), torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(budget - CONTEXT, _MIB) / total), device)
    say(f"{given}: {flags(plan.chosen) or 'the settings as given'}")
    return dataclasses.replace(config, **plan.chosen)


class _Planner:
    """One model on one device; plans for settings that differ in what a budget may change."""

    def __init__(self, config: EBFTConfig, on: str, model_config: Any) -> None:
        self.config, self.on = config, on
        self.gpu, self.compute = _where(config, on)
        if model_config is None:
            model_config = load_config(config.model, trust_remote_code=config.trust_remote_code)
        check_lengths(config, model_config)
        self.stored = model_config.dtype or torch.float32
        self.model_config = model_config.get_text_config()
        self.vocabulary = self.model_config.vocab_size
        whole = _on_meta(config, model_config)
        self.parameters = sum(p.numel() for p in whole.parameters())  # tied ones once
        self.tied = whole.get_input_embeddings().weight is whole.get_output_embeddings().weight
        self.decoder = Decoder(_stand_in(config, model_config), torch.device("cpu"))
        sizes = [sum(p.numel() for p in self.decoder.stored_block(i).parameters()) for i in range(len(self.decoder))]
        self.index, self.largest, self.in_blocks = sizes.index(max(sizes)), max(sizes), sum(sizes)
        self.width = self.decoder.width()
        self.shapes = {
            m.name: self.decoder.stored_block(self.index).get_parameter(m.name).shape
            for m in self.decoder.matrices[self.index]
        }
        self.gpu_budget = parse_bytes(config.gpu_memory, "--gpu-memory") if config.gpu_memory else None
        if self.gpu_budget is None and on in DEVICES:
            self.gpu_budget = DEVICES[on].memory
        self.host_budget = parse_bytes(config.host_memory, "--host-memory") if config.host_memory else None
        self.tuning = cache(self._tuning)

    # --- the search -------------------------------------------------------------------------------------------------

    def fitting(self) -> Plan:
        """The first plan on the ladder that fits; the leanest, with its faults, where none does."""
        rungs = list(self._ladder())
        if self.gpu_budget is None and self.host_budget is None:
            return self.plan(rungs[0])
        first, last = 0, len(rungs) - 1
        if not self._fits(rungs[last]):
            leanest = [rung for rung in (self._in_backward(rungs[last]),) if rung is not None]
            return self.plan(next((rung for rung in leanest if self._fits(rung)), min(
                [rungs[last], *leanest], key=lambda rung: sum(self.device(rung).values())
            )))  # fmt: skip
        while first < last:  # every rung needs less than those before it
            middle = (first + last) // 2
            first, last = (first, middle) if self._fits(rungs[middle]) else (middle + 1, last)
        return self.plan(rungs[first])

    def _ladder(self) -> Iterator[EBFTConfig]:
        """Settings that need less and less of the device, each with all that the ones before it save."""
        config = self.config
        for place in self._places():
            yield (config := dataclasses.replace(config, streams=place))
        if "ebft" not in config.recoveries:
            return

        def leaner(**changes: Any) -> EBFTConfig:
            nonlocal config
            config = dataclasses.replace(config, **changes)
            return config

        layouts = config.optimizer == "adamw"
        if layouts and not config.compact:
            yield leaner(compact=True)
        if layouts and config.weights == "fp32" and self.compute == torch.bfloat16:
            yield leaner(weights="master")
        size = config.micro_batch or config.batch_size
        while size > 1 and not config.update_in_backward:
            size //= 2
            yield leaner(micro_batch=size)
        if config.by_halves:  # of which one is recomputed whole
            yield leaner(recompute="block")
        elif config.recompute != "halves" and self._has_halves and not config.compile:
            yield leaner(recompute="halves")
        if not layouts:
            return
        for moments in {"fp32": ("bf16", "int8"), "bf16": ("int8",), "int8": ()}[config.moments]:
            yield leaner(moments=moments)
        if config.weights == "master":
            yield leaner(weights="stochastic")

    def _in_backward(self, config: EBFTConfig) -> EBFTConfig | None:
        """The same without gradients, where a step needs neither their norm nor their sum."""
        another = config.optimizer != "adamw" or config.refreshes or "ebft" not in config.recoveries
        if config.clip or config.compile or another or self.compute == torch.float16:
            return None
        return dataclasses.replace(config, micro_batch=None, update_in_backward=True)

    def _places(self) -> list[str]:
        """Where streams may be, the fastest first."""
        if self.config.streams != "auto":
            return [self.config.streams]
        if not self.gpu:
            return ["host", "disk"]
        on_host = sum(self.host(dataclasses.replace(self.config, streams="host")).values())
        off = "host" if self.host_budget is None or on_host <= self.host_budget else "disk"
        return ["device", off] if self.gpu_budget is not None else [off]

    @cached_property
    def _has_halves(self) -> bool:
        masks = {name: PackedMask.ones((1, 1)) for name in self.shapes}
        try:
            return self.config.by_pairs or bool(halves(self.decoder.stored_block(self.index), masks))
        except EBFTError:
            return False

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
            f"it does not fit: {_gib(needed).strip()} is needed with the leanest settings, and {flag} is "
            f"{_gib(budget).strip()}"
            for flag, budget, needed in budgets
            if budget is not None and needed > budget
        ]

    def plan(self, config: EBFTConfig) -> Plan:
        """The whole plan for these settings."""
        asked, planned = self.config.to_dict(), config.to_dict()
        flops = self.flops(config)
        return Plan(
            model=self.config.model or DEFAULT_MODEL,
            config=config,
            chosen={name: value for name, value in planned.items() if value != asked[name]},
            device=self.device(config),
            stages=self.stages(config),
            host=self.host(config),
            disk=self.disk(config),
            flops=flops,
            seconds={name: flops / rate for name, rate in self._rates().items()},
            gpu=self.gpu,
            faults=self._faults(config),
        )

    # --- rows -------------------------------------------------------------------------------------------------------

    def device(self, config: EBFTConfig) -> dict[str, int]:
        """Bytes on the device while a block is tuned."""
        rows = dict(self.tuning(dataclasses.replace(config, streams="auto"))) if "ebft" in config.recoveries else {}
        return rows | self._around(config, sum(rows.values()))

    def stages(self, config: EBFTConfig) -> dict[str, int]:
        """Bytes on the device in each of the other stages, with all that is there beside."""
        passes = self._passes | ({"text by the dense model": self._writing()} if self._writes else {})
        if config.eval_task_names:
            logits = 2 * BATCH * QUESTION * self.vocabulary * self.stored.itemsize
            passes["zero-shot, the whole model"] = self.parameters * self.stored.itemsize + logits
        return {name: size + sum(self._around(config, size).values()) for name, size in passes.items()}

    @property
    def _writes(self) -> bool:
        return SELF in self.config.calibration_parts

    def _writing(self) -> int:
        """Bytes for the whole model, keys and values of all tokens that are written together, and a few logits."""
        text = self.model_config
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        sequences = max(1, WRITTEN_AT_ONCE // self.config.seqlen)
        cache = 2 * len(self.decoder) * width * sequences * self.config.seqlen * self.stored.itemsize
        return self.parameters * self.stored.itemsize + cache + DRAWN * 8 * sequences * self.vocabulary

    def _around(self, config: EBFTConfig, tracked: int) -> dict[str, int]:
        """What lies on a GPU beside a stage's own tensors."""
        if not self.gpu:
            return {}
        size = getattr(torch, config.stream_dtype).itemsize
        streams = _buffers(config) * config.samples * config.seqlen * self.width * size
        travelling = AHEAD * 2 * min(config.batch_size, config.samples) * config.seqlen * self.width * size
        rows = {"streams": streams} if config.streams == "device" else {"batches on their way": travelling}
        allocated = tracked + sum(rows.values()) + WORKSPACES
        return rows | {
            "workspaces": WORKSPACES,
            "fragmentation": int(FRAGMENTS * allocated),
            "CUDA context": CONTEXT,
        }

    def host(self, config: EBFTConfig) -> dict[str, int]:
        """Bytes on the host."""
        rest, stored = self.parameters - self.in_blocks, self.stored.itemsize
        embedding = rest if self.tied else rest - self.vocabulary * self.width
        rows = {
            "Python and libraries": HOST,
            "blocks: read ahead, at hand, finished": 3 * self.largest * stored,
            "embeddings, in float32 while they are used": embedding * 4,
        }
        if config.model is None or Path(config.model).suffix.lower() == ".gguf":
            rows["the model, which is loaded whole"] = self.parameters * stored
        elif (self._writes or config.eval_task_names) and self.gpu:
            rows["the whole model, on its way to the GPU"] = self.parameters * stored
        if "ebft" in config.recoveries:
            a_weight = 4 if config.weights == "fp32" else 2
            rows["the best weights of a block"] = config.blocks_at_once * self.largest * a_weight
        if config.streams not in ("device", "disk"):
            rows["streams"] = self._streams(config)
        return rows

    def disk(self, config: EBFTConfig) -> dict[str, int]:
        """Bytes in the output's folder while it is made."""
        stored = self.stored.itemsize
        rows = {
            "model": self.parameters * stored,
            "masks": self.in_blocks // 8,
            "finished blocks, until the end": self.in_blocks * stored,
        }
        if config.refreshes:
            rows["pruned blocks, until the end"] = self.in_blocks * stored
        return rows | ({"streams": self._streams(config)} if config.streams == "disk" else {})

    def _streams(self, config: EBFTConfig) -> int:
        """Hidden states of calibration, or of evaluation texts."""
        kept = _buffers(config)
        calibration = kept * config.samples * config.seqlen * getattr(torch, config.stream_dtype).itemsize
        return max(calibration, sum(map(_tokens_of, config.eval_texts)) * 4) * self.width

    # --- what the real code does with fake tensors ------------------------------------------------------------------

    @contextlib.contextmanager
    def _fakes(self, batch: int, seqlen: int, flash: bool) -> Iterator[tuple[nn.Module, BlockCall]]:
        """Where tensors are fake: the largest block in float32, and how it is called."""
        with self._blocks(1, batch, seqlen, flash) as ((block,), call):
            yield block, call

    @contextlib.contextmanager
    def _blocks(self, blocks: int, batch: int, seqlen: int, flash: bool) -> Iterator[tuple[list[nn.Module], BlockCall]]:
        """The same with so many of it."""
        copies = [self.decoder.copy_of_block(self.index).float() for _ in range(blocks)]
        call = self.decoder.call_for(self.index, batch, seqlen)
        with shapes_only(kept=1 - self.config.mask_pattern.sparsity, flash=flash):
            fakes = [block._apply(without_values).requires_grad_(False) for block in copies]
            yield fakes, call.map_tensors(without_values)

    def _tuned(self, blocks: Sequence[nn.Module], call: BlockCall) -> tuple[nn.Module, list[str], Forward]:
        """What is tuned together, a block or a pair; the names of its matrices, and its forward."""
        forward: Forward = partial(BlockCall.__call__, call, compute=self.compute)
        if len(blocks) == 1:
            return blocks[0], list(self.shapes), forward
        names = [f"{place}.{name}" for place in range(len(blocks)) for name in self.shapes]
        return nn.ModuleList(blocks), names, in_turn_through(*[forward] * len(blocks))

    def _tuning(self, config: EBFTConfig) -> dict[str, int]:
        """Peak bytes of two steps by row: the first makes the optimizer's states, the second has them."""
        batch = min(config.batch_size, config.samples)
        size = min(config.micro_batch or batch, batch)
        planned = min(batch, 2 * size)  # further parts of a batch are like the second
        config = dataclasses.replace(config, compile=False)
        tracker = Tracker()
        with self._blocks(config.blocks_at_once, size, config.seqlen, flash=self.gpu) as (blocks, call):
            block, names, through = self._tuned(blocks, call)
            x, y = (torch.empty(planned, config.seqlen, self.width) for _ in range(2))
            masks = {name: PackedMask.from_dense(block.get_parameter(name) != 0) for name in names}

            def forward(block: nn.Module, hidden: Tensor) -> Tensor:
                tracker.reset_mod_stats()  # or it takes a second part for a mistake
                return through(block, hidden)

            reconstructor = BlockReconstructor(config, torch.device("cpu"), self.compute)
            with reconstructor.prepared(block, masks, forward) as tuning:
                unscaled = torch.amp.GradScaler("cpu", enabled=False)  # a scale is a number, which fakes do not have
                tuning = dataclasses.replace(tuning, scaler=unscaled, loss=Loss.even(config, self.width))
                tensors = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
                tracker.track_external(block, tuning.optimizer, x, y, *tensors)
                with tracker:
                    for _ in range(2):
                        reconstructor.step(tuning, x, y)
        rows = dict.fromkeys((*_TRACKED.values(), _OTHERS), 0)
        for kind, size in next(iter(tracker.get_tracker_snapshot("peak").values())).items():
            name = str(getattr(kind, "value", kind))
            if name != "Total":
                rows[_TRACKED.get(name, _OTHERS)] += int(size)
        rows[_OTHERS] += 2 * (batch - planned) * config.seqlen * self.width * 4
        if config.refreshes:
            sizes = [shape.numel() for shape in self.shapes.values()]
            rows["masks chosen anew"] = 4 * sum(sizes) + EXCHANGED_BYTES * max(sizes)
        if config.update_in_backward:  # the op makes it inside, where no tracker looks
            largest = max(shape.numel() for shape in self.shapes.values() if len(shape) == 2)
            given = 4 if config.weights == "fp32" else 2
            rows[_OTHERS] += largest * (self.compute.itemsize + (given if given != self.compute.itemsize else 0))
        return rows

    @cached_property
    def _passes(self) -> dict[str, int]:
        """Peak bytes of the other stages."""
        config, cpu = self.config, torch.device("cpu")
        batch = min(config.batch_size, config.samples)
        masker, matrices = choose_masker(config), self.decoder.matrices[self.index]
        needs_inputs = bool(masker.needs) or masker.surveyor is not None or config.recover != "none"
        grams = 0
        solved = "layerwise" in config.recoveries
        if "gram" in masker.needs or (solved and config.cg_inputs == "dense"):
            with self._fakes(1, config.seqlen, flash=self.gpu) as (block, call), _Observed() as observed:
                call(block, torch.empty(1, config.seqlen, self.width), compute=self.compute)
            grams = 4 * (
                sum(n**2 for n in observed.widths) + sum(m.experts * m.inputs**2 for m in matrices if m.experts > 1)
            )
        a_weight = MASK_BYTES if config.refine == "none" else SWAPPED_WEIGHTS
        working = max(a_weight * m.outputs * m.inputs for m in matrices)
        if config.transposable:
            working += TILE_BYTES * min(ENTRIES_AT_ONCE, config.mask_pattern.group * self.largest)
        if grams:
            swept = (4 * SWEPT_INPUTS * m.inputs**2 + SWEPT_WEIGHTS * m.outputs * m.inputs for m in matrices)
            working = max(working, *swept)
        beside = 4 * self.largest * (config.blocks_at_once - 1)  # the block that is tuned, while the next one is made
        made = 4 * self.largest + sum(shape.numel() for shape in self.shapes.values())
        found = {"masks of a block": beside + made + working + grams}
        if solved:
            systems = [
                m.experts * 2 * m.inputs**2 * (config.cg_inputs == "sparse")
                + SOLVED * min(m.outputs * m.inputs, ROWS_AT_ONCE)
                for m in self.decoder.matrices[self.index]
            ]
            found["closed form, beside three blocks"] = 4 * (3 * self.largest + max(systems)) + grams
        shapes = {"dense pass, with statistics": (batch, config.seqlen)} if needs_inputs else {}
        if config.eval_texts:
            shapes["perplexity, a block"] = (max(1, TOKENS_AT_ONCE // config.eval_seqlen), config.eval_seqlen)
        for name, shape in shapes.items():
            tracker = Tracker()
            with self._fakes(*shape, flash=self.gpu) as (block, call):
                x = torch.empty(*shape, self.width)
                tracker.track_external(block, x)
                with tracker, torch.no_grad(), _Observed():
                    call(block, x, compute=self.compute)
            found[name] = tracker.peak() + (beside + grams if name.startswith("dense pass") else 0)
        if config.eval_texts:
            tracker = Tracker()
            with shapes_only():
                head = torch.empty(self.vocabulary, self.width)
                hidden, labels = torch.empty(TOKENS_AT_ONCE, self.width), torch.empty(TOKENS_AT_ONCE, dtype=torch.long)
                tracker.track_external(head, hidden, labels)
                with tracker, torch.no_grad():
                    with autocast(cpu, self.compute):
                        logits = F.linear(hidden, head)
                    F.cross_entropy(logits.float(), labels, reduction="sum")
            found["perplexity, final norm and head"] = tracker.peak()
        return found

    def flops(self, config: EBFTConfig) -> float:
        """FLOPs of all passes through all blocks, those of a recomputation among them."""
        one = dataclasses.replace(config, compile=False, update_in_backward=False, gpu_memory=None)
        counted = []
        with self._blocks(config.blocks_at_once, 1, config.seqlen, flash=False) as fakes:
            block, names, forward = self._tuned(*fakes)
            x, masks = (
                torch.empty(1, config.seqlen, self.width),
                {name: PackedMask.ones(block.get_parameter(name).shape) for name in names},
            )
            reconstructor = BlockReconstructor(one, torch.device("cpu"), self.compute)
            for grad in (False, True):
                counter = FlopCounterMode(display=False)
                with reconstructor.prepared(block, masks, forward) as tuning, counter, torch.set_grad_enabled(grad):
                    loss = reconstruction_loss(tuning.forward(x), x)
                    if grad:
                        loss.backward()
                counted.append(counter.get_total_flops())
        masker = choose_masker(config)
        watched = bool(masker.needs) and config.statistics == "input" and config.target == "dense-stream"
        of_one = [flops / config.blocks_at_once for flops in counted]
        blocks, probes = len(self.decoder), (self.config.epochs + 1) / 16  # on which errors are measured
        tuned = blocks + (blocks - 1) * (config.blocks_at_once - 1)
        passes = blocks * (2 + (masker.surveyor is not None) + watched) + tuned - blocks  # the latter: ahead, in pairs
        steps = float(config.epochs if "ebft" in config.recoveries else 0)
        if config.refreshes:
            steps *= 1 + UNTIL * BATCHES / config.refresh_every
        return config.samples * (tuned * (steps * of_one[1] + probes * of_one[0]) + passes * of_one[0])

    def _rates(self) -> dict[str, float]:
        """FLOP/s by name: of the device named, of the one that is here, or of all that are known."""
        if self.on in DEVICES:
            return {f"{self.on} at {SHARE:.0%} of its rate": DEVICES[self.on].rate * SHARE}
        if self.gpu and not torch.cuda.is_available():
            return {f"{name} at {SHARE:.0%}": known.rate * SHARE for name, known in DEVICES.items()}
        device, _ = choose_device(self.config.device, self.config.dtype)
        rate = _matmul_rate(device, self.compute)
        return {f"this machine at the {rate / 1e9:.0f} GFLOP/s that a product reaches now": rate}


def _buffers(config: EBFTConfig) -> int:
    """Streams of calibration: inputs, targets; the dense block's inputs, mixed ones, targets of a half or a pair."""
    dense_inputs = config.uses_dense_inputs and config.target == "dense-stream"
    return 2 + dense_inputs + (config.input == "mix") + (config.by_halves or config.by_pairs)


def _where(config: EBFTConfig, on: str) -> tuple[bool, torch.dtype]:
    """Whether the plan is for a GPU, and the dtype of products there."""
    absent = config.gpu_memory is not None and not torch.cuda.is_available() and config.device in ("auto", "cuda")
    if on == HERE and not absent:
        device, compute = choose_device(config.device, config.dtype)
        return device.type == "cuda", compute
    dtype = config.dtype if config.dtype != "auto" else DEVICES[on].dtype if on in DEVICES else "bfloat16"
    return True, getattr(torch, dtype)


def _on_meta(config: EBFTConfig, model_config: Any) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code)
    except ValueError:
        raise EBFTError(f"model {config.model} is not a decoder (a causal language model)") from None


def _stand_in(config: EBFTConfig, model_config: Any) -> PreTrainedModel:
    """The model with a vocabulary of 8: real outside its blocks, so that it can be entered, and on meta inside."""
    small = copy.deepcopy(model_config)
    small.get_text_config().update({"vocab_size": 8, "pad_token_id": 0})
    model = _on_meta(config, small)
    _, blocks = find_blocks(model)
    inside = {module for block in blocks for module in block.modules()}
    for module in model.modules():
        if module not in inside:
            module.to_empty(device="cpu", recurse=False)
            model._init_weights(module)
    return model


class _Observed(TorchFunctionMode):
    """Inputs of linear layers go into statistics, as they do in the dense pass.

    Attributes:
        widths: inputs of the layers in turn, once where several multiply one tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.widths: list[int] = []
        self._last: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and max(PRODUCTS[func]) < len(args):
            x, weight = (args[place] for place in PRODUCTS[func])
            if isinstance(weight, nn.Parameter) and x is not self._last:
                self._last = x
                self.widths.append(x.shape[-1])
                InputStatistics.empty(x.shape[-1], x.device).add(x)
        return func(*args, **(kwargs or {}))


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


def _gib(size: int) -> str:
    return f"{size / _GIB:9.3f} GiB"


def _table(heading: str, rows: dict[str, int]) -> list[str]:
    return [
        f"  {heading:<44} {_gib(sum(rows.values()))}",
        *(f"    {name:<42} {_gib(size)}" for name, size in rows.items()),
    ]
