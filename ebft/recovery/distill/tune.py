"""Distillation from its beginning to its end: a rate is found, epochs follow, and validation says what is kept."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ebft.config import EBFTConfig, parse_bytes
from ebft.distributed import Ranks
from ebft.errors import EBFTError
from ebft.model.decoder import Decoder
from ebft.model.matrices import router_paths
from ebft.model.tensors import Tensors
from ebft.output.checkpoint import Checkpoint
from ebft.recovery.allowance import Allowance
from ebft.recovery.distill.blocks import Held, Streamed, bytes_a_weight, where_they_fit
from ebft.recovery.distill.predictions import Predictions
from ebft.recovery.distill.stack import Stack
from ebft.recovery.ebft.learning_rate import set_scales
from ebft.recovery.optimizers.masked import forget
from ebft.recovery.rates import COST, FACTOR, FORWARD_ALONE, Trials
from ebft.recovery.samples import Split, batch_order
from ebft.recovery.skipping import zeros_skipped
from ebft.recovery.whole_model import WholeResult, WholeTask
from ebft_kernels import MaskedAdamW, PackedMask

if TYPE_CHECKING:
    from ebft.recovery.distill import Distillation

VALIDATION = 0.125  # share of the sequences, where --holdout gives none
FIRST_RATE = 0.003  # that is tried; less than a block's first, because all blocks move together
LONGER = 0.28  # the power of a tuning's steps that its best rate rises with (docs/quality.md, "Rates")
PATIENCE = 1  # epochs without a gain, before the rate is lowered
LOWEST = 0.01  # of the first rate; below that nothing is left to gain
WARMUP = 0.05  # share of the steps in which the rate rises
WITH_TEXT = 0.5  # the share of cross-entropy that is tried
SEARCHING = COST / (1 + COST)  # share of the work that trials may be
_STATE = ("rate", "share", "_epoch", "_without_gain", "_lowered")  # of a tuner, what a checkpoint holds of it by name
_WHOLE, _TRIAL = -1, 2**20  # in place of a block's number and an epoch's, for the batch order


def distill(task: WholeTask, config: EBFTConfig, own: Distillation.Settings) -> WholeResult:
    """Tune all blocks under their masks towards the dense model's predictions; the best weights seen are kept.

    Raises:
        EBFTError: the loss is NaN or infinity from the start.
    """
    allowance, decoder = Allowance(task.seconds, task.device, task.ranks), task.decoder
    predictions = Predictions.of(task.teacher, task.tokens, own.distill_top, task.store, task.ranks)
    blocks = _blocks(task, config, own)
    scaler = torch.amp.GradScaler(task.device.type, enabled=task.compute == torch.float16)
    stack = Stack(
        decoder=decoder,
        blocks=blocks,
        ids=task.tokens,
        predictions=predictions,
        at_once=config.recover.at_once,
        ranks=task.ranks,
        clip=own.clip,
        recompute=own.recompute != "none",
        store=task.store,
        scaler=scaler,
    )
    tokens = config.recover.at_once * task.tokens.shape[1]
    with stack.in_place(), contextlib.ExitStack() as undone_after:
        for name, block in zip(decoder.names, blocks, strict=True):
            masks = task.masks_of(name)
            undone_after.enter_context(zeros_skipped(block, masks, tokens, task.device, task.compute))
        tuner = _Tuner(stack, config, own, task.on_step)
        tuner.run(allowance, task.checkpoint)
    for block in blocks:
        block.requires_grad_(False)
    return WholeResult(
        blocks=list(blocks),
        losses=tuner.losses,
        held_out_before=tuner.before.loss(tuner.share),
        held_out_after=tuner.best.loss(tuner.share),
        held_out_parts={
            "divergence from the dense model": (tuner.before.kl, tuner.best.kl),
            "cross-entropy of the text": (tuner.before.ce, tuner.best.ce),
        },
        seconds=allowance.taken(),
        notes=[tuner.note],
    )


def _blocks(task: WholeTask, config: EBFTConfig, own: Distillation.Settings) -> Held:
    """The blocks with their optimizers, where ``distill_blocks`` has them."""
    decoder = task.decoder
    kept = sum(mask.count() for mask in task.masks.values()) / sum(mask.numel() for mask in task.masks.values())
    working = (decoder.working_block(index, task.saved(index)) for index in range(len(decoder)))
    named = zip(decoder.names, working, strict=True)
    made = ((block, _optimizer(task, config, own, name, block)) for name, block in named)
    on_host = place_of_blocks(decoder, config, own, kept) == "host"
    return Streamed(made, task.device) if on_host else Held(made)


def place_of_blocks(decoder: Decoder, config: EBFTConfig, own: Distillation.Settings, kept: float) -> str:
    """``device`` or ``host``, of which ``kept`` is the share of kept weights."""
    sizes = [sum(p.numel() for p in decoder.stored_block(index).parameters()) for index in range(len(decoder))]
    needed = sum(sizes) * bytes_a_weight(own.moments, own.compact, kept) + 4 * max(sizes)  # and gradients of one block
    budget = parse_bytes(config.runtime.gpu_memory, "--gpu-memory") if config.runtime.gpu_memory else None
    return where_they_fit(own.distill_blocks, decoder.device, int(needed), budget)


def host_memory_of(decoder: Decoder, config: EBFTConfig, own: Distillation.Settings) -> int:
    """Bytes: blocks and states that are not on a GPU, the weights that trials begin from, and the best ones."""
    weights = sum(p.numel() for index in range(len(decoder)) for p in decoder.stored_block(index).parameters())
    on_gpu = decoder.device.type == "cuda" and place_of_blocks(decoder, config, own, kept=1.0) == "device"
    return int(weights * (8 + (0 if on_gpu else bytes_a_weight(own.moments, own.compact, kept=1.0))))


def _optimizer(
    task: WholeTask, config: EBFTConfig, own: Distillation.Settings, name: str, block: nn.Module
) -> MaskedAdamW:
    """Of a block of the model, with rates by its own weights."""
    optimizer = optimizer_of(block, task.masks_of(name), own, seed=config.runtime.seed)
    set_scales(optimizer, "rms")
    return optimizer


def optimizer_of(
    block: nn.Module, masks: Mapping[str, PackedMask], own: Distillation.Settings, *, seed: int = 0
) -> MaskedAdamW:
    """Every matrix at a rate of its own size, all else but routers beside them; no weight decay.

    Args:
        masks: of the block's parameters by their names in it.
    """
    routers = router_paths(block)
    tuned = {
        name: parameter.requires_grad_()
        for name, parameter in block.named_parameters()
        if parameter.is_floating_point() and name.rpartition(".")[0] not in routers
    }
    return MaskedAdamW(
        [
            *({"params": [tuned[name]]} for name in tuned if name in masks),
            {"params": [parameter for name, parameter in tuned.items() if name not in masks]},
        ],
        weight_decay=0.0,
        betas=own.betas,
        masks={parameter: masks[name] for name, parameter in tuned.items() if name in masks},
        moments=own.moments,
        compact=own.compact,
        seed=seed,
    )


class Validated:
    """A model on the validation split: KL and CE of each of its sequences, (sequences, 2), nats a token."""

    def __init__(self, of_samples: Tensor) -> None:
        self.of_samples = of_samples
        self.kl, self.ce = of_samples.mean(0).tolist()

    def loss(self, share: float) -> float:
        """What is minimised, with this share of the cross-entropy."""
        return (1 - share) * self.kl + share * self.ce

    def is_less_surprised_than(self, other: Validated) -> bool:
        """Whether its cross-entropy is lower for certain: by two standard errors, sequence by sequence."""
        gains = (other.of_samples - self.of_samples)[:, 1]
        return len(gains) > 1 and float(gains.mean()) > 2 * float(gains.std()) / math.sqrt(len(gains))


class _Tuner:
    """Weights on their way, the best of them so far, and what validation says.

    Attributes:
        before, best: on the validation split, at first and of the weights that are kept.
        rate, share: the learning rate at its highest, and how much of the loss is the text's cross-entropy.
        losses: of every step that counts.
    """

    def __init__(
        self, stack: Stack, config: EBFTConfig, own: Distillation.Settings, on_step: Callable[[float], None]
    ) -> None:
        self._stack, self._own, self._on_step = stack, own, on_step
        self._seed, self._batch_size = config.runtime.seed, config.recover.batch_size
        self._split = Split.of(len(stack.ids), config.recover.holdout or VALIDATION, Ranks())
        self._tuned = [p for block in stack.blocks for p in block.parameters() if p.requires_grad]
        self._steps = own.distill_epochs * -(-len(self._split.tuned) // self._batch_size)
        self._judging = len(self._split.held_out) / (FORWARD_ALONE * self._batch_size)  # what it costs, in steps
        self.rate = FIRST_RATE if own.distill_lr == "auto" else own.distill_lr
        self.share = 0.0 if own.distill_text == "auto" else own.distill_text
        self._totals = list[Tensor]()  # KL and CE of every step
        self._epoch = self._without_gain = 0
        self._lowered = 1.0  # what the rate has been lowered by

    def run(self, allowance: Allowance, checkpoint: Checkpoint | None) -> None:
        """Trials find what the settings leave open; then come all epochs, at a rate that falls to zero.

        With a time limit it is the time that the rate falls by, and epochs follow one another until it is over. Where
        validation has not become better for ``PATIENCE`` epochs, the best weights are gone on from at a lower rate.
        After an epoch a ``checkpoint`` is written where that takes little of the time.

        Raises:
            EBFTError: the loss is NaN or infinity from the start.
        """
        if checkpoint is not None and checkpoint.found:
            self._go_on_from(*checkpoint.found)
        else:
            self._begin(allowance)
        since = allowance.passed()
        while not self._is_over(allowance, since):
            for batch in self._batches(self._epoch):
                step, of = self._place(allowance, since)
                if self._totals and step >= of:
                    break
                share = min((step + 1) / max(1, WARMUP * of), 1 - step / of)
                self._totals.append(self._stack.step(batch, self.rate * self._lowered * share, self.share))
                self._on_step(SEARCHING + (1 - SEARCHING) * (step + 1) / of)
            best = self.best
            self._see()
            self._epoch += 1
            self._without_gain = 0 if self.best is not best else self._without_gain + 1
            if self._without_gain >= PATIENCE:
                self._lowered, self._without_gain = self._lowered / FACTOR, 0
                self._put(self._kept)
            if checkpoint is not None and checkpoint.is_due(self._size()):
                checkpoint.write(*self._state())
        self._put(self._kept)

    @property
    def losses(self) -> list[float]:
        """Of every step that counts. A sync point."""
        return [(1 - self.share) * kl + self.share * ce for kl, ce in torch.stack(self._totals).tolist()]

    def _begin(self, allowance: Allowance) -> None:
        self.before = self.best = self._validated()
        if not math.isfinite(self.before.loss(self.share)):
            raise EBFTError(f"the pruned model's divergence from the dense one is {self.before.kl}; expected a number")
        self._kept = self._copied()
        if self._own.distill_lr == "auto":
            self._search(self._steps_in(allowance))

    def _place(self, allowance: Allowance, since: float) -> tuple[int, int]:
        """The step that is next, of how many. A sync point with a time limit."""
        return (len(self._totals), self._steps) if allowance.seconds is None else allowance.as_steps(since)

    def _is_over(self, allowance: Allowance, since: float) -> bool:
        """Whether no further epoch has anything to gain, or the time for one."""
        step, of = self._place(allowance, since)
        return bool(self._totals) and (step >= of or self._lowered < LOWEST)

    # --- to go on from -----------------------------------------------------------------------------------------------

    def _size(self) -> int:
        """Bytes of ``_state``, about."""
        return sum(held.nbytes for held in (*self._tuned, *self._kept, *self._states(Tensor).values()))

    def _states(self, kind: type) -> dict[str, Any]:
        """What the optimizers keep, of this kind, by block, parameter and name."""
        return {
            f"state.{block}.{number}.{key}": value
            for block, optimizer in enumerate(self._stack.optimizers)
            for number, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()
            if isinstance(value, kind) and key != "mask"
        }

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that a run goes on from, after an epoch: what JSON can hold, and tensors."""
        content = {name: getattr(self, name) for name in _STATE} | {
            "totals": [total.tolist() for total in self._totals],
            "states": self._states(int),
            "scaler": self._stack.scaler.state_dict(),
            "before": self.before.of_samples.tolist(),
            "best": self.best.of_samples.tolist(),
        }
        tensors = {f"now.{number}": parameter.detach() for number, parameter in enumerate(self._tuned)}
        tensors |= {f"kept.{number}": weights for number, weights in enumerate(self._kept)}
        return content, tensors | self._states(Tensor)

    def _go_on_from(self, content: Mapping[str, Any], tensors: Tensors) -> None:
        """The same bits as if the run had never ended."""
        for name in _STATE:
            setattr(self, name, content[name])
        self._totals = list(torch.tensor(content["totals"], dtype=torch.float64))
        self.before, self.best = (
            Validated(torch.tensor(content[of], dtype=torch.float64)) for of in ("before", "best")
        )
        self._kept = [tensors[f"kept.{number}"] for number in range(len(self._tuned))]
        self._put([tensors[f"now.{number}"] for number in range(len(self._tuned))])
        states: dict[int, dict[int, dict[str, Any]]] = {}
        of_tensors = {name: tensors[name] for name in tensors.names() if name.startswith("state.")}
        for name, value in (content["states"] | of_tensors).items():
            _, block, number, key = name.split(".")
            states.setdefault(int(block), {}).setdefault(int(number), {})[key] = value
        for block, optimizer in enumerate(self._stack.optimizers):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": states.get(block, {})})
        self._stack.scaler.load_state_dict(content["scaler"])

    # --- rate and share ----------------------------------------------------------------------------------------------

    def _steps_in(self, allowance: Allowance) -> int:
        """How many steps there will be; where there is a time limit, by what validation takes. A sync point."""
        if (before := allowance.left()) is None:
            return self._steps
        self._validated()
        left = allowance.left() or 0.0
        return max(1, int(left / max((before - left) / self._judging, 1e-9)))

    @property
    def note(self) -> str:
        """What was done, in a sentence."""
        text = f", with {self.share:.0%} of the text's cross-entropy" if self.share else ""
        return f"tuned at a rate of {self.rate:.2g}{text}"

    def _search(self, steps: int) -> None:
        """Find the rate for so many steps; and the share of the text, where one more trial shows that it helps.

        All trials begin from the same weights. The best weights of them stay: that one has been no loss of time. No
        rate below the first is tried: Adam's first steps harm a model that later ones mend, and a trial is no more than
        first steps. Where the first rate is too high for a whole epoch too, ``run`` lowers it.
        """
        start, seen = self._copied(), dict[float, Validated]()

        def trial(rate: float, steps: int) -> float:
            self._put(start)
            for step, batch in enumerate(islice(self._batches(_TRIAL), steps)):
                self._stack.step(batch, rate * (1 - step / steps), self.share)
                self._on_step(SEARCHING * min(1.0, (trials.spent + step + 1) / trials.most))
            seen[rate] = self._see()
            return seen[rate].loss(self.share)

        trials = Trials.of(trial, steps=steps, judging=self._judging, whole=steps)
        untuned = self.before.loss(self.share)
        best = trials.climbed(FIRST_RATE, untuned, down=False)
        gains = trials.loss(best) < untuned
        self.rate = best * (min(FACTOR, (steps / trials.length) ** LONGER) if gains else 1.0)
        if self._own.distill_text == "auto" and trials.affordable():
            without, earlier = seen[best], (self.best, self._kept)
            self.share = WITH_TEXT
            trial(best, trials.length)
            if not seen[best].is_less_surprised_than(without):
                self.share, (self.best, self._kept) = 0.0, earlier
        self._put(self._kept)

    def _batches(self, epoch: int) -> Iterator[Tensor]:
        order = batch_order(len(self._split.tuned), self._seed, _WHOLE, epoch)
        yield from self._split.tuned[order].split(self._batch_size)

    def _validated(self) -> Validated:
        return Validated(self._stack.losses(self._split.held_out))

    def _see(self) -> Validated:
        """Validate the weights as they are now, and keep them if they are the best."""
        now = self._validated()
        if now.loss(self.share) < self.best.loss(self.share):
            self.best, self._kept = now, self._copied()
        return now

    def _copied(self) -> list[Tensor]:
        """The weights as they are now, on the host."""
        return [parameter.detach().to("cpu", copy=True) for parameter in self._tuned]

    @torch.no_grad()
    def _put(self, weights: list[Tensor]) -> None:
        """Go on from these weights, with optimizers that have seen nothing."""
        for kept, parameter in zip(weights, self._tuned, strict=True):
            parameter.copy_(kept)
        for optimizer in self._stack.optimizers:
            forget(optimizer)
