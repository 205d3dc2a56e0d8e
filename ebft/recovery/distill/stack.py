"""A step through the whole model, block by block: forward, the loss at its end, and back, each block updated in turn.

No graph spans more than one block: the hidden states between blocks are kept, a block's gradient by its inputs goes on
to the block before, and a block's optimizer steps as soon as its gradients are whole. So a block and its states need to
be on the device only while it is their turn (``Blocks``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ebft.distributed import Ranks
from ebft.model.decoder import Decoder
from ebft.recovery.distill.objective import losses_and_gradient_, losses_of
from ebft.recovery.distill.predictions import Predictions, chunks_of_places
from ebft_kernels import MaskedAdamW


@dataclass
class Stack:
    """A model's blocks with their optimizers, and the predictions that it is tuned towards.

    Attributes:
        decoder: runs the blocks; its entrance and exit are used as they are, and not tuned.
        blocks: float32, on the device; what of them is tuned requires gradients.
        optimizers: one a block.
        ids: the calibration text, (samples, seqlen).
        at_once: samples that go through a block together.
        ranks: those that share every batch.
        clip: what each block's gradient norm is held to; 0 for nothing.
        recompute: make a block's activations again in the backward pass, in place of keeping those of all blocks.
    """

    decoder: Decoder
    blocks: Sequence[nn.Module]
    optimizers: Sequence[MaskedAdamW]
    ids: Tensor
    predictions: Predictions
    at_once: int
    ranks: Ranks
    clip: float
    recompute: bool
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The ends of the model on the device while inside."""
        with self.decoder.at_exit(), self.decoder.at_entrance():
            yield

    def step(self, batch: Tensor, lr: float, share: float) -> Tensor:
        """One step on samples by their numbers; gives KL and CE before it, means over places, (2,) on the device.

        Args:
            lr: of every parameter group, times its ``scale``.
            share: of the cross-entropy in the loss.
        """
        parts = self._mine(batch)
        passes = [self._forward(part) for part in parts]
        places = len(batch) * (self.ids.shape[1] - 1)
        totals = torch.zeros(2, dtype=torch.float64, device=self.decoder.device)
        gradients = []
        for part, states in zip(parts, passes, strict=True):
            losses, gradient = self._at_exit(part, states[-1], share, places)
            totals += losses
            gradients.append(gradient)
        for index in reversed(range(len(self.blocks))):
            for number, states in enumerate(passes):
                gradients[number] = self._backward(index, states, gradients[number])
            self._update(index, lr)
        self.scaler.update()
        self.ranks.add_([totals])
        return totals / places

    @torch.no_grad()
    def losses(self, samples: Tensor) -> Tensor:
        """KL and CE of each of these samples, (samples, 2), means over its places; on the host. A sync point."""
        found = torch.zeros(len(samples), 2, dtype=torch.float64, device=self.decoder.device)
        numbers = torch.arange(len(samples))[self.ranks.share(len(samples))]
        for part in numbers.split(self.at_once):
            ids = self.ids[samples[part]]
            hidden = self.decoder.enter(ids).to(self.decoder.device)
            for index, block in enumerate(self.blocks):
                hidden = self.decoder.run_block(index, block, hidden)
            for places, *known in self._known(samples[part]):
                logits = self.decoder.logits(ids[:, places], hidden[:, places])
                losses = losses_of(logits.flatten(0, 1).float(), *known)
                found[part] += torch.stack([of.view(len(part), -1).sum(1, dtype=torch.float64) for of in losses], -1)
        self.ranks.add_([found])
        return (found / (self.ids.shape[1] - 1)).cpu()

    # --- its parts --------------------------------------------------------------------------------------------------

    def _mine(self, batch: Tensor) -> list[Tensor]:
        """This rank's share of the samples, in parts that go through a block at once."""
        return [part for part in batch[self.ranks.share(len(batch))].split(self.at_once) if len(part)]

    def _forward(self, part: Tensor) -> list[Any]:
        """For every block (its inputs, its outputs or None where they are to be made again); last, the final states."""
        hidden, kept = self.decoder.enter(self.ids[part]).to(self.decoder.device), list[Any]()
        for index, block in enumerate(self.blocks):
            inputs = hidden.requires_grad_(index > 0)
            with torch.set_grad_enabled(not self.recompute):
                outputs = self.decoder.run_block(index, block, inputs)
            kept.append((inputs, None if self.recompute else outputs))
            hidden = outputs.detach()
        return [*kept, hidden]

    def _at_exit(self, part: Tensor, hidden: Tensor, share: float, places: int) -> tuple[Tensor, Tensor]:
        """KL and CE summed, (2,), and the gradient of the mean loss by the final hidden states."""
        found, by_states = torch.zeros(2, dtype=torch.float64, device=hidden.device), torch.zeros_like(hidden)
        for at, *known in self._known(part):
            states = hidden[:, at].detach().requires_grad_()
            with torch.enable_grad():
                logits = self.decoder.logits(self.ids[part][:, at], states)
            losses, gradient = losses_and_gradient_(logits.detach().flatten(0, 1).float(), *known, share)
            gradient = self.scaler.scale(gradient.div_(places)).view_as(logits).to(logits.dtype)
            (by_states[:, at],) = torch.autograd.grad(logits, states, gradient)
            found += torch.stack([of.sum(dtype=torch.float64) for of in losses])
        return found, by_states

    def _known(self, part: Tensor) -> Iterator[tuple[Any, ...]]:
        """Chunks of places; of each the dense model's likeliest tokens, their log-probabilities, and the text's."""
        device, ids = self.decoder.device, self.ids[part]
        for places in chunks_of_places(self.decoder, *ids.shape):
            of_dense = (self.predictions.tokens, self.predictions.logarithms)
            tokens, logarithms = (known[part][:, places].flatten(0, 1).to(device) for known in of_dense)
            yield places, tokens.long(), logarithms.float(), ids[:, 1:][:, places].flatten().to(device)

    def _backward(self, index: int, states: list[Any], gradient: Tensor) -> Tensor:
        """Add a block's gradients; gives that by its inputs (of the first block nothing of use)."""
        inputs, outputs = states[index]
        states[index] = None
        if outputs is None:
            with torch.enable_grad():
                outputs = self.decoder.run_block(index, self.blocks[index], inputs)
        outputs.backward(gradient)
        return gradient if inputs.grad is None else inputs.grad

    def _update(self, index: int, lr: float) -> None:
        optimizer = self.optimizers[index]
        tuned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self.ranks.count > 1:
            for parameter in tuned:
                if parameter.grad is None:  # none of the batch's samples are here, or none took this way
                    parameter.grad = torch.zeros_like(parameter)
            self.ranks.add_(parameter.grad for parameter in tuned)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.scaler.unscale_(optimizer)
        optimizer.clip_grad_norm_(self.clip or float("inf"))
        self.scaler.step(optimizer)
        optimizer.zero_grad()
