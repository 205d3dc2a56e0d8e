"""Reconstruction of one block (arXiv 2402.12419): tune its kept weights until it gives the dense block's outputs.

    minimise over W:  mean || f(X; M * W) - Y ||^2        (or another loss, ebft/recovery/losses/)

Pruned weights are held at exactly zero by the optimizer, so the block runs as it is, without masks (docs/method.md).

Just over the guide line, because how one block is tuned is read from top to bottom.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ebft.config import EBFTConfig
from ebft.data.streams import carry
from ebft.distributed import Ranks
from ebft.errors import EBFTError, MemoryRanOut
from ebft.model.blocks import BlockCall
from ebft.model.matrices import router_paths
from ebft.recovery.allowance import Allowance
from ebft.recovery.checkpointing import recompute, recomputed
from ebft.recovery.ebft import EBFT
from ebft.recovery.ebft.early_stopping import Best, HeldOut, Probe, Watch
from ebft.recovery.ebft.epochs import MOST, epochs_for
from ebft.recovery.ebft.halves import halves
from ebft.recovery.ebft.learning_rate import learning_rate, set_scales
from ebft.recovery.ebft.objective import Measured, Objective, measured_by_token
from ebft.recovery.ebft.refresh import BATCHES, MaskRefresh
from ebft.recovery.optimizers.masked import MaskedOptimizer, forget
from ebft.recovery.rates import FORWARD_ALONE, Trials, found_rate
from ebft.recovery.samples import Energies, Errors, Split, batch_order, samples_of_all
from ebft.recovery.skipping import masked_layers, zeros_skipped
from ebft.recovery.task import BlockResult, BlockTask, Forward
from ebft.registry import optimizers
from ebft_kernels import MaskedAdamW, PackedMask

MOST_BY_TIME = 10_000  # epochs of a block that has its time: patience or the time ends it


@dataclass(frozen=True)
class Tuning:
    """A block while it is tuned.

    Attributes:
        forward: hidden states through the block, recomputed and compiled as the settings say.
        notes: what happened, for the report.
        loss: what is minimised.
    """

    forward: Callable[[Tensor], Tensor]
    optimizer: MaskedAdamW | MaskedOptimizer
    scaler: torch.amp.GradScaler
    notes: list[str]
    loss: Objective = field(default_factory=Objective)


class BlockReconstructor:
    """Tunes one block at a time; one object serves all blocks.

    Args:
        config: the settings of ``--recover ebft``, and the seed.
        device: where the block lives and the batches go.
        compute: dtype of the matrix products; with float16 the loss is scaled dynamically and clipped after unscaling.
        ranks: those that share the samples: each is given its part of them, and all tune the same weights.

    Attributes:
        micro_batch: sequences that go through the block at once. Halved, for good, where the GPU's memory runs out.

    Raises:
        EBFTError: settings do not go with ``compute``.
    """

    def __init__(
        self,
        config: EBFTConfig,
        device: torch.device,
        compute: torch.dtype = torch.float32,
        ranks: Ranks | None = None,
    ) -> None:
        self._config, self._device, self._compute, self._ranks = config, device, compute, ranks or Ranks()
        self._own = own = config.of_method(EBFT.Settings)
        kind = optimizers[own.optimizer]
        self._optimizer = optimizer = kind(config.of_method(kind.Settings))
        self.micro_batch = config.recover.at_once
        if optimizer.weights != "fp32" and compute != torch.bfloat16:
            raise EBFTError(
                f"--weights {optimizer.weights} keeps matrices in bfloat16, and products are in {_name(compute)}; "
                "expected --dtype bfloat16 or --weights fp32"
            )
        if optimizer.updates_in_backward and self._ranks.count > 1:
            raise EBFTError(
                f"--update-in-backward uses gradients before they are summed over ranks, and {self._ranks.count} ranks "
                "share the sequences; expected one, or blocks that are independent (--target and --input dense-stream)"
            )
        if optimizer.updates_in_backward and compute == torch.float16:
            raise EBFTError(
                "--update-in-backward uses gradients before they are unscaled, and products in float16 need a loss "
                "scale; expected --dtype bfloat16 or float32"
            )
        if own.refresh_every and compute == torch.float16:
            raise EBFTError(
                "--refresh-every compares gradients of many batches, and products in float16 need a loss scale; "
                "expected --dtype bfloat16 or float32"
            )

    def recover(self, task: BlockTask) -> BlockResult:
        """``fit`` on a block of the walk."""
        return self.fit(
            task.block,
            task.inputs,
            task.targets,
            masks=task.masks,
            index=task.index,
            forward=task.forward,
            on_step=task.on_step,
            only=task.only,
            finished=task.finished,
            blocks=task.blocks,
            error_before=task.error_before,
            seconds=task.seconds,
        )

    def fit(
        self,
        block: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        *,
        masks: Mapping[str, PackedMask],
        index: int = 0,
        forward: Forward | None = None,
        on_step: Callable[[int, int], None] | None = None,
        only: frozenset[str] | None = None,
        finished: Sequence[Mapping[str, Any]] = (),
        blocks: int = 1,
        error_before: float | None = None,
        seconds: float | None = None,
        **kwargs: Any,
    ) -> BlockResult:
        """Tune ``block`` in place.

        Where tuning ends worse than it began, or no longer in numbers, the best weights seen between epochs are kept.
        With ``holdout`` the best are those of the least error of a token, by its size, on the samples held out; they
        are kept in any case, and tuning ends ``patience`` epochs after them.

        Args:
            block: float32, on the device; its weights at pruned places are set to zero and stay so.
            inputs, targets: (samples, seqlen, width), float32 or bfloat16, in any memory; of several ranks, this one's
                ``share`` of all samples.
            masks: parameter name -> kept weights, in the parameter's shape; other parameters are tuned freely
                (routers are not tuned), without weight decay.
            index: number of the block; with the seed and the epoch it determines the batch order.
            forward: (block, hidden) -> hidden; by default ``block(hidden, **kwargs)`` under autocast.
            on_step: called with (steps done, steps in all) after each step.
            only: names of the parameters that are tuned (default: all but routers).
            finished, blocks, error_before, seconds: see ``BlockTask``.

        Raises:
            EBFTError: the block has no halves to recompute.
            MemoryRanOut: the GPU's memory ran out where nothing can be repeated.
        """
        config, own = self._config, self._own
        forward = forward or partial(BlockCall((), kwargs), compute=self._compute)
        split = Split.of(samples_of_all(inputs, self._ranks), config.recover.holdout, self._ranks)
        errors = Errors(inputs, targets, split, self._device, self._ranks, self.micro_batch)
        through = partial(forward, block)
        energy = errors.branch_energy()
        tokens = min(self.micro_batch, config.recover.batch_size) * inputs.shape[1]
        with self.prepared(block, masks, forward, index, only, tokens) as tuning:
            tuning = replace(tuning, loss=Objective.of(config, partial(Energies.of, errors)))
            judged = partial(tuning.loss.measured, errors, through)
            set_scales(tuning.optimizer, own.lr_scale)
            before = now = judged(split.probe)
            harm = (before.error if error_before is None else error_before) / (energy or math.inf)
            allowance = Allowance(seconds, self._device, self._ranks)
            most = epochs_for(own, finished, harm) if seconds is None else MOST_BY_TIME
            steps = most * -(-len(split.tuned) // config.recover.batch_size)
            losses, norms = list[Tensor](), list[Tensor]()
            refresh = MaskRefresh(config, block, masks, tuning.optimizer, steps)
            best = Best(block, refresh.masks)
            judge = partial(measured_by_token, errors, through, split.held_out)
            watch: Watch = HeldOut(best, before, judge, own.patience) if len(split.held_out) else Probe(best, before)
            rate, trial_cost = own.lr, 0.0
            if rate == "auto":
                run = partial(self._trial, tuning, errors, best, judge, index)
                expected = self._steps_in(allowance, judge, split) if seconds is not None else steps
                trials = Trials.of(run, steps=expected, judging=self._judging(split), whole=expected * blocks)
                rate = found_rate(trials, watch.untuned, expected, finished)
                trial_cost = trials.spent
            since = allowance.passed()
            for epoch in range(most):
                for batch, x, y in self._batches(errors, index, epoch):
                    step, of = (len(losses), steps) if seconds is None else allowance.as_steps(since)
                    if losses and step >= of:
                        break
                    _set_rate(tuning.optimizer, learning_rate(own, rate, step, of))
                    loss, norm = self.step(tuning, x, y, of=len(batch))
                    losses.append(loss)
                    norms.append(norm)
                    if refresh.due(len(losses)):
                        self._refresh(tuning, refresh, errors, index, len(losses))
                    if on_step:
                        on_step(min(step + 1, of), of)
                # The one sync point of an epoch.
                errors.at_once = self.micro_batch  # which may have been halved
                now = judged(split.probe)
                if watch.done(now) or not math.isfinite(now.loss) or step >= of:
                    break
            notes, error = watch.end(now)
        of_steps = torch.stack([torch.stack(losses), torch.stack(norms)])
        self._ranks.add_([of_steps[0]])

        return BlockResult(
            losses=of_steps[0].tolist(),
            gradient_norms=of_steps[1].tolist(),
            error_before=before.error,
            error_after=error,
            branch_energy=energy,
            seconds=allowance.taken(),
            notes=tuning.notes + refresh.notes() + notes,
            held_out_before=watch.held_out_before,
            held_out_after=watch.held_out_after,
            masks=refresh.changed(),
            epochs=epoch + 1,
            learning_rate=rate,
            trial_steps=trial_cost,
        )

    def _batches(self, errors: Errors, index: int, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The numbers of each step's samples, and inputs and targets of those that are here, on the device."""
        split = errors.split
        order = batch_order(len(split.tuned), self._config.runtime.seed, index, epoch)
        batches = split.tuned[order].split(self._config.recover.batch_size)
        carried = carry(self._device, (errors.inputs, errors.targets), map(split.here, batches))
        for batch, (x, y) in zip(batches, carried, strict=True):
            yield batch, x, y

    def _judging(self, split: Split) -> float:
        """What it costs to look at the validation split, in steps."""
        return len(split.held_out) / (FORWARD_ALONE * self._config.recover.batch_size)

    def _steps_in(self, allowance: Allowance, judge: Callable[[], Measured], split: Split) -> int:
        """About how many steps the time that is left is enough for. A sync point."""
        began = allowance.left() or 0.0
        judge()
        left = allowance.left() or 0.0
        return max(1, int(left / max((began - left) / self._judging(split), 1e-9)))

    def _trial(
        self,
        tuning: Tuning,
        errors: Errors,
        best: Best,
        judge: Callable[[], Measured],
        index: int,
        rate: float,
        steps: int,
    ) -> float:
        """The loss on the validation split after so many steps from the first weights, which are there again then."""
        batches = itertools.chain.from_iterable(self._batches(errors, index, epoch) for epoch in itertools.count())
        for step, (batch, x, y) in enumerate(itertools.islice(batches, steps)):
            _set_rate(tuning.optimizer, rate * (1 - step / steps))
            self.step(tuning, x, y, of=len(batch))
        loss = judge().loss
        best.restore()
        forget(tuning.optimizer)
        return loss

    @contextlib.contextmanager
    def prepared(
        self,
        block: nn.Module,
        masks: Mapping[str, PackedMask],
        forward: Forward,
        index: int = 0,
        only: frozenset[str] | None = None,
        tokens: int = 0,
    ) -> Iterator[Tuning]:
        """``block`` as the settings want it tuned, while inside; float32 and without gradients again afterwards.

        With so many ``tokens`` at once, products skip zeros where that is faster.
        """
        own, optimizer_kind, routers = self._own, self._optimizer, router_paths(block)
        tuned = {
            name: parameter.requires_grad_()
            for name, parameter in block.named_parameters()
            if parameter.is_floating_point()
            and name.rpartition(".")[0] not in routers
            and (only is None or name in only)
        }
        if optimizer_kind.weights != "fp32":
            for name in masks:
                tuned[name].data = tuned[name].data.to(torch.bfloat16)
        with contextlib.ExitStack() as undone_after:
            if optimizer_kind.updates_in_backward:
                undone_after.enter_context(masked_layers(block, masks))
            elif tokens and not (own.refresh_every or own.compile):
                undone_after.enter_context(zeros_skipped(block, masks, tokens, self._device, self._compute))
            if own.recompute == "halves":
                undone_after.enter_context(recomputed([block.get_submodule(half) for half in halves(block, masks)]))
            matrices = [[tuned[name] for name in masks]]
            if own.lr_scale == "rms":  # each has a learning rate of its own
                matrices = [[matrix] for matrix in matrices[0]]
            groups = [
                *({"params": of_group, "weight_decay": own.weight_decay} for of_group in matrices),
                {"params": [tuned[name] for name in tuned if name not in masks], "weight_decay": 0.0},
            ]
            seed = (self._config.runtime.seed * 1_000_003 + index) % 2**63
            of_parameters = {tuned[name]: mask for name, mask in masks.items()}
            optimizer = optimizer_kind.make(groups, lr=0.0, masks=of_parameters, seed=seed)
            through: Callable[[Tensor], Tensor] = partial(forward, torch.compile(block) if own.compile else block)
            if own.recompute == "block":
                through = partial(recompute, through)
            scaler = torch.amp.GradScaler(self._device.type, enabled=self._compute == torch.float16)
            yield Tuning(through, optimizer, scaler, notes=[])
        block.requires_grad_(False)
        if optimizer_kind.weights != "fp32":
            for name in masks:
                tuned[name].data = tuned[name].data.float()

    def step(self, tuning: Tuning, x: Tensor, y: Tensor, of: int | None = None) -> tuple[Tensor, Tensor]:
        """One step on a batch; the loss before it and the gradient norm before clipping, on the device.

        Args:
            of: samples of the batch on all ranks; the loss is then the share that this one's have in it.
        """
        loss = self._gradients(tuning, x, y, of or len(x))
        self._sum_gradients(tuning)
        optimizer, scaler, norm = tuning.optimizer, tuning.scaler, torch.full((), math.nan, device=self._device)
        try:
            scaler.unscale_(optimizer)
            if not self._optimizer.updates_in_backward:
                norm = optimizer.clip_grad_norm_(self._own.clip or float("inf"))
            scaler.step(optimizer)  # a sync point with float16 only, where a step may be skipped
        except torch.OutOfMemoryError:
            raise MemoryRanOut(
                "out of GPU memory in the optimizer's step, which may have updated a part of the weights and so is not "
                f"repeated; expected {_LEANER}"
            ) from None
        scaler.update()
        optimizer.zero_grad()
        return loss, norm

    def _sum_gradients(self, tuning: Tuning) -> None:
        """Over the ranks."""
        if self._ranks.count > 1:
            tuned = [parameter for group in tuning.optimizer.param_groups for parameter in group["params"]]
            for parameter in tuned:
                if parameter.grad is None:  # none of the batch's samples are here, or none took this way
                    parameter.grad = torch.zeros_like(parameter)
            self._ranks.add_(parameter.grad for parameter in tuned)

    def _refresh(self, tuning: Tuning, refresh: MaskRefresh, errors: Errors, index: int, step: int) -> None:
        """Choose masks anew by the gradients of a few batches, which depend on (seed, block, step) alone."""
        config, split = self._config, errors.split
        order = batch_order(
            len(split.tuned), config.runtime.seed, index, MOST * self._own.epochs + step
        )  # as that of no epoch
        batches = split.tuned[order].split(config.recover.batch_size)[:BATCHES]
        sources = errors.inputs, errors.targets
        for batch, (x, y) in zip(batches, carry(self._device, sources, map(split.here, batches)), strict=True):
            self._gradients(tuning, x, y, len(batch))
            self._sum_gradients(tuning)
            refresh.see_gradients()
            tuning.optimizer.zero_grad()
        refresh.choose()

    def _gradients(self, tuning: Tuning, x: Tensor, y: Tensor, of: int) -> Tensor:
        """Make what samples add to the gradients of the mean loss over ``of``, and to the loss, which is given.

        Out of memory, it is made again with less at once.
        """
        if len(x) == 0:
            return torch.zeros((), device=self._device)
        while True:
            size = min(self.micro_batch, len(x))
            try:
                parts = zip(x.split(size), y.split(size), strict=True)
                return torch.stack([_backward(tuning, *part, share=len(part[0]) / of) for part in parts]).sum()
            except torch.OutOfMemoryError:
                if self._optimizer.updates_in_backward:
                    raise MemoryRanOut(
                        "out of GPU memory in a backward pass that updates weights and so is not repeated; expected "
                        f"{_LEANER}"
                    ) from None
                if size == 1:
                    raise MemoryRanOut(f"out of GPU memory with --micro-batch 1; expected {_LEANER}") from None
            tuning.optimizer.zero_grad()  # out here the failed attempt's activations are gone
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self.micro_batch = size // 2
            tuning.notes.append(f"out of GPU memory with {size} sequences at once: {size // 2} from here on")


_LEANER = "leaner settings, which python -m ebft.run … --plan --gpu-memory SIZE finds"


def _set_rate(optimizer: MaskedAdamW | MaskedOptimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _backward(tuning: Tuning, x: Tensor, y: Tensor, share: float) -> Tensor:
    """Add the gradients of a part of a batch, ``share`` of its samples; gives the part's share of the loss."""
    output = tuning.forward(x)
    loss, gradient = tuning.loss(output, y, x)
    if share != 1:
        loss, gradient = loss * share, gradient.mul_(share)
    output.backward(tuning.scaler.scale(gradient))
    return loss
