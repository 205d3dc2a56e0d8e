"""Distillation from its beginning to its end: a rate is found, epochs follow, and validation says what is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ebft.config import EBFTConfig, parse_bytes
from ebft.distributed import Ranks
from ebft.errors import EBFTError
from ebft.model.matrices import router_paths
from ebft.recovery.distill.blocks import Held, Streamed, bytes_a_weight, where_they_fit
from ebft.recovery.distill.predictions import Predictions
from ebft.recovery.distill.stack import Stack
from ebft.recovery.ebft.learning_rate import set_scales
from ebft.recovery.samples import Split, batch_order
from ebft.recovery.whole_model import WholeResult, WholeTask
from ebft_kernels import MaskedAdamW, PackedMask

if TYPE_CHECKING:
    from ebft.recovery.distill import Distillation

VALIDATION = 0.125  # share of the sequences, where --holdout gives none
FIRST_RATE = 0.01  # that is tried; what is found does not depend on it by much
FACTOR = 2.5  # between two rates that are tried
_WHOLE = -1  # in place of a block's number, for the batch order


def distill(task: WholeTask, config: EBFTConfig, own: Distillation.Settings) -> WholeResult:
    """Tune all blocks under their masks towards the dense model's predictions; the best weights seen are kept.

    Raises:
        EBFTError: the loss is NaN or infinity from the start.
    """
    began, decoder = time.perf_counter(), task.decoder
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
    with stack.in_place():
        tuner = _Tuner(stack, config, own, task.on_step)
        tuner.run()
    for block in blocks:
        block.requires_grad_(False)
    return WholeResult(
        blocks=list(blocks),
        losses=tuner.losses,
        held_out_before=tuner.before.loss,
        held_out_after=tuner.best.loss,
        held_out_parts={
            "divergence from the dense model": (tuner.before.kl, tuner.best.kl),
            "cross-entropy of the text": (tuner.before.ce, tuner.best.ce),
        },
        seconds=time.perf_counter() - began,
        notes=tuner.notes,
    )


def _blocks(task: WholeTask, config: EBFTConfig, own: Distillation.Settings) -> Held:
    """The blocks with their optimizers, where ``distill_blocks`` has them."""
    decoder = task.decoder
    sizes = [sum(p.numel() for p in decoder.stored_block(index).parameters()) for index in range(len(decoder))]
    kept = sum(mask.count() for mask in task.masks.values()) / sum(mask.numel() for mask in task.masks.values())
    needed = sum(sizes) * bytes_a_weight(own.moments, own.compact, kept) + 4 * max(sizes)  # and gradients of one block
    budget = parse_bytes(config.runtime.gpu_memory, "--gpu-memory") if config.runtime.gpu_memory else None
    working = (decoder.working_block(index, task.saved(index)) for index in range(len(decoder)))
    named = zip(decoder.names, working, strict=True)
    made = ((block, _optimizer(task, config, own, name, block)) for name, block in named)
    where = where_they_fit(own.distill_blocks, task.device, int(needed), budget)
    return Streamed(made, task.device) if where == "host" else Held(made)


def _optimizer(
    task: WholeTask, config: EBFTConfig, own: Distillation.Settings, name: str, block: nn.Module
) -> MaskedAdamW:
    """Of a block of the model, with rates by its own weights."""
    masks = {n: mask for n, _ in block.named_parameters() if (mask := task.masks.get(f"{name}.{n}")) is not None}
    optimizer = optimizer_of(block, masks, own, seed=config.runtime.seed)
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


@dataclass(frozen=True)
class Validated:
    """KL and CE on the validation split, nats a token, and the loss that they make."""

    kl: float
    ce: float
    loss: float


class _Tuner:
    """Weights on their way, the best of them so far, and what validation says.

    Attributes:
        before, best: on the validation split, at first and of the weights that are kept.
        losses: of every step that counts.
        notes: for the report.
    """

    def __init__(
        self, stack: Stack, config: EBFTConfig, own: Distillation.Settings, on_step: Callable[[float], None]
    ) -> None:
        self._stack, self._config, self._own, self._on_step = stack, config, own, on_step
        self._split = Split.of(len(stack.ids), config.recover.holdout or VALIDATION, Ranks())
        self._tuned = [p for block in stack.blocks for p in block.parameters() if p.requires_grad]
        self._kept = [torch.empty_like(p, device="cpu", pin_memory=p.is_cuda, requires_grad=False) for p in self._tuned]
        self._steps = own.distill_epochs * -(-len(self._split.tuned) // config.recover.batch_size)
        self.losses, self.notes = list[float](), list[str]()
        self.before = self.best = self._validated()
        if not math.isfinite(self.before.loss):
            raise EBFTError(f"the pruned model's loss is {self.before.loss}; expected a finite one to tune by")
        self._keep()

    def run(self) -> None:
        """All of it."""
        lr = self._own.distill_lr or self._found_rate()
        self._restore()
        step, totals = 0, list[Tensor]()
        for epoch in range(self._own.distill_epochs):
            for batch in self._batches(epoch):
                totals.append(self._stack.step(batch, lr * (1 - step / self._steps), self._own.distill_text))
                step += 1
                self._on_step(step / self._steps)
            self._see()
        self._restore()
        self.losses = [self._loss(kl, ce) for kl, ce in torch.stack(totals).tolist()]
        self.notes.append(f"tuned at a rate of {lr:.2g}")

    def _found_rate(self) -> float:
        """The best of a few rates, each tried for a few steps from the same weights; the best of these weights stay."""
        return FIRST_RATE

    def _batches(self, epoch: int) -> Iterator[Tensor]:
        order = batch_order(len(self._split.tuned), self._config.runtime.seed, _WHOLE, epoch)
        yield from self._split.tuned[order].split(self._config.recover.batch_size)

    # --- validation -------------------------------------------------------------------------------------------------

    def _loss(self, kl: float, ce: float) -> float:
        return (1 - self._own.distill_text) * kl + self._own.distill_text * ce

    def _validated(self) -> Validated:
        kl, ce = self._stack.losses(self._split.held_out)
        return Validated(kl, ce, self._loss(kl, ce))

    def _see(self) -> bool:
        """Keep the weights as they are now, if they are the best."""
        now = self._validated()
        if better := now.loss < self.best.loss:
            self.best = now
            self._keep()
        return better

    @torch.no_grad()
    def _keep(self) -> None:
        for kept, parameter in zip(self._kept, self._tuned, strict=True):
            kept.copy_(parameter, non_blocking=True)

    @torch.no_grad()
    def _restore(self) -> None:
        """The best weights, and optimizers that have seen nothing."""
        for kept, parameter in zip(self._kept, self._tuned, strict=True):
            parameter.copy_(kept)
        for optimizer in self._stack.optimizers:
            optimizer.state.clear()
