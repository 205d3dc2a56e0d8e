"""What a recovery of the whole pruned model is given and gives; and how a model is tuned on text.

``fit`` tunes on the language model's own loss, next-token cross-entropy on the calibration tokens. The model is then
in memory whole, in float32, on the device; only parameters of its blocks are tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ebft.config import EBFTConfig
from ebft.data.streams import Store
from ebft.distributed import Ranks
from ebft.errors import EBFTError
from ebft.model.blocks import autocast
from ebft.model.decoder import Decoder
from ebft.model.tensors import Tensors
from ebft.output.checkpoint import Checkpoint
from ebft.recovery.allowance import Allowance
from ebft.recovery.checkpointing import recomputed
from ebft.recovery.samples import Split, batch_order
from ebft.recovery.settings import LanguageModelTuning
from ebft_kernels import MaskedAdamW, PackedMask

_WHOLE = -1  # in place of a block's number, for the batch order


@dataclass(frozen=True)
class WholeTask:
    """A pruned model, and what it is recovered on.

    Attributes:
        decoder: the model, whose own weights are those from before the walk.
        teacher: the dense one.
        saved: the weights that a block has now; zero at pruned places.
        masks: full parameter name -> kept weights, in the parameter's shape.
        tokens: all of them on every rank, (samples, seqlen), int64.
        store: where hidden states of all samples may be kept.
        ranks: those that share every batch.
        on_step: called with the share of the work that is done.
        checkpoint: where a recovery that takes long may keep what it has come to; None for nowhere.
        seconds: that the recovery may take; None for as long as its own settings say.
    """

    decoder: Decoder
    teacher: Decoder
    saved: Callable[[int], Tensors]
    masks: Mapping[str, PackedMask]
    tokens: Tensor
    store: Store
    ranks: Ranks
    on_step: Callable[[float], None]
    checkpoint: Checkpoint | None = None
    seconds: float | None = None

    def masks_of(self, block: str) -> dict[str, PackedMask]:
        """Of the parameters of the block with this full name, by their names in it."""
        inside = f"{block}."
        return {name.removeprefix(inside): mask for name, mask in self.masks.items() if name.startswith(inside)}

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        return self.decoder.device

    @property
    def compute(self) -> torch.dtype:
        """Of the products."""
        return self.decoder.compute

    @cached_property
    def model(self) -> PreTrainedModel:
        """The whole model: float32, on ``device``, evaluation mode, no gradients; made when it is first asked for."""
        return self.decoder.whole(self.saved)

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        """Those of ``model``, by their full names."""
        return {name: self.model.get_submodule(name) for name in self.decoder.names}


@dataclass(frozen=True)
class WholeResult:
    """What recovering the model did.

    Attributes:
        blocks: the recovered ones, in order, float32; weights at pruned places are zero.
        losses: the loss of every step, before that step; nats a token.
        held_out_before, held_out_after: the loss on the samples that were held out; None without any.
        held_out_parts: what that loss is made of, by name: before, after; empty where it is one thing.
        seconds: time that the steps took.
        notes: what is worth a line in the report, a sentence each.
        left_out: full parameter name -> makes what the mask kept out of the weight, (outputs, inputs) as the
            parameter: added to it, the weight is that of the plain merge. Empty where nothing was kept out.
    """

    blocks: Sequence[nn.Module]
    losses: list[float]
    held_out_before: float | None
    held_out_after: float | None
    seconds: float
    held_out_parts: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)


def fit(
    task: WholeTask, config: EBFTConfig, own: LanguageModelTuning, optimizer: MaskedAdamW, *, dropout: bool = False
) -> WholeResult:
    """Tune what ``optimizer`` holds on the language-model loss, for ``lm_epochs`` or ``lm_seconds``, a step at least.

    The learning rate falls linearly from ``lm_lr`` to 0 over whichever of the two ends first. Every step takes
    ``batch_size`` sequences, ``micro_batch`` at once; of several ranks each takes its share, and gradients are summed.
    Sequences that ``holdout`` sets apart are not tuned on; their loss is measured before and after.

    Raises:
        EBFTError: the loss is NaN or infinity.
    """
    split = Split.of(len(task.tokens), config.recover.holdout, Ranks())
    steps = own.lm_epochs * -(-len(split.tuned) // config.recover.batch_size)
    tuned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scaler = torch.amp.GradScaler(task.device.type, enabled=task.compute == torch.float16)
    losses, step = torch.zeros(steps, device=task.device), 0
    before = _held_out_loss(task, config, split)
    limits = [limit for limit in (own.lm_seconds, task.seconds) if limit is not None]
    allowance = Allowance(min(limits, default=None), task.device, task.ranks)
    with recomputed(list(task.blocks.values()) if own.recompute != "none" else [], random=dropout):
        for batch in _batches(split.tuned, config, own.lm_epochs):
            passed = max(step / steps, allowance.passed()) if step else 0.0
            if passed >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = own.lm_lr * (1 - passed)
            for part in _mine(batch, task.ranks, config):
                loss = _loss(task, part) * (len(part) / len(batch))
                scaler.scale(loss).backward()
                losses[step] += loss.detach()
            _sum_gradients(tuned, task.ranks)
            scaler.unscale_(optimizer)
            optimizer.clip_grad_norm_(own.clip or float("inf"))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1
            task.on_step(passed)
    task.ranks.add_([losses])
    of_steps = losses[:step].tolist()
    seconds = allowance.taken()
    after = _held_out_loss(task, config, split)
    if not all(map(torch.isfinite, map(torch.tensor, [*of_steps, 0.0 if after is None else after]))):
        raise EBFTError(
            f"the language-model loss is no longer a number with --lm-lr {own.lm_lr:g}; expected a smaller one"
        )
    return WholeResult(list(task.blocks.values()), of_steps, before, after, seconds)


def _batches(tuned: Tensor, config: EBFTConfig, epochs: int) -> Iterator[Tensor]:
    """Numbers of the samples of each step."""
    for epoch in range(epochs):
        yield from tuned[batch_order(len(tuned), config.runtime.seed, _WHOLE, epoch)].split(config.recover.batch_size)


def _mine(batch: Tensor, ranks: Ranks, config: EBFTConfig) -> Sequence[Tensor]:
    """This rank's share of the samples, in parts that go through the model at once."""
    parts = batch[ranks.share(len(batch))].split(config.recover.at_once)
    return [part for part in parts if len(part)]


def _loss(task: WholeTask, samples: Tensor) -> Tensor:
    """The model's own loss: the mean over predicted tokens."""
    ids = task.tokens[samples].to(task.device)
    with autocast(task.device, task.compute):
        return task.model(input_ids=ids, labels=ids, use_cache=False).loss


@torch.no_grad()
def _held_out_loss(task: WholeTask, config: EBFTConfig, split: Split) -> float | None:
    """The mean loss on the samples held out. A sync point."""
    if not len(split.held_out):
        return None
    total = torch.zeros((), dtype=torch.float64, device=task.device)
    for part in _mine(split.held_out, task.ranks, config):
        total += _loss(task, part).double() * len(part)
    task.ranks.add_([total])
    return float(total) / len(split.held_out)


def _sum_gradients(tuned: Sequence[Tensor], ranks: Ranks) -> None:
    if ranks.count > 1:
        for parameter in tuned:
            if parameter.grad is None:  # none of the batch's samples are here
                parameter.grad = torch.zeros_like(parameter)
        ranks.add_(parameter.grad for parameter in tuned if parameter.grad is not None)
