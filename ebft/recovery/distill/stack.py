"""A step through the whole model, block by block: forward, the loss at its end, and back, each block updated in turn.

No graph spans more than one block: the hidden states at the borders between blocks are kept, a block's gradient by its
inputs goes on to the block before, and a block's optimizer steps as soon as its gradients are whole. All of a batch
goes through a block before the next one's turn, so that a block which is not at hand (``blocks.py``) comes once a pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ebft.data.streams import Store, Stream, write_through
from ebft.distributed import Ranks
from ebft.model.decoder import Decoder
from ebft.recovery.distill.blocks import Held
from ebft.recovery.distill.objective import losses_and_gradient_, losses_of
from ebft.recovery.distill.predictions import Predictions, chunks_of_places
from ebft_kernels import MaskedAdamW

Graphs = deque[tuple[Tensor, Tensor]]  # inputs and outputs of a block, of one part of the batch after the other


@dataclass
class Stack:
    """A model's blocks with their optimizers, and the predictions that it is tuned towards.

    Attributes:
        decoder: runs the blocks; its entrance and exit are used as they are, and not tuned.
        blocks: float32, wherever they are; what of them is tuned requires gradients.
        ids: the calibration text, (samples, seqlen).
        at_once: samples that go through a block together.
        ranks: those that share every batch.
        clip: what each block's gradient norm is held to; 0 for nothing.
        recompute: make a block's activations again in the backward pass, in place of keeping those of all blocks.
        store: where hidden states at the borders are, if activations are not kept on the device anyway.
    """

    decoder: Decoder
    blocks: Held
    ids: Tensor
    predictions: Predictions
    at_once: int
    ranks: Ranks
    clip: float
    recompute: bool
    store: Store
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))
    _streams: dict[str, Stream] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.recompute |= self.blocks.streamed
        if not self.recompute:
            self.store = dataclasses.replace(self.store, kind="device")

    @property
    def optimizers(self) -> list[MaskedAdamW]:
        """One a block."""
        return self.blocks.optimizers

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The ends of the model on the device while inside; room for hidden states is given back at the end."""
        with self.decoder.at_exit(), self.decoder.at_entrance():
            yield
        for name in list(self._streams):
            self.store.drop(self._streams.pop(name).name)

    def step(self, batch: Tensor, lr: float, share: float) -> Tensor:
        """One step on samples by their numbers; gives KL and CE before it, means over places, (2,) on the device.

        Args:
            lr: of every parameter group, times its ``scale``.
            share: of the cross-entropy in the loss.
        """
        mine = self._mine(batch)
        places = len(batch) * (self.ids.shape[1] - 1)
        totals = torch.zeros(2, dtype=torch.float64, device=self.decoder.device)
        borders = [self._stream(f"border-{number}", len(mine)) for number in range(len(self.blocks) + 1)]
        graphs: list[Graphs] = [deque() for _ in range(len(self.blocks))]
        borders[0].enter(self.decoder, self.ids[mine])
        for index, block in self.blocks.in_turn(range(len(self.blocks))):
            borders[index].through(partial(self._forward, index, block, graphs[index]), out=borders[index + 1])
        parts = iter(mine.split(self.at_once))

        def at_exit(hidden: Tensor) -> Tensor:
            losses, gradient = self._at_exit(next(parts), hidden, share, places)
            totals.add_(losses)
            return gradient

        end = borders.pop()  # holds the gradients at the border where the backward pass is
        end.through(at_exit, out=end)
        for index, block in self.blocks.in_turn(range(len(self.blocks))[::-1], tuned=True):
            write_through([borders.pop(), end], partial(self._backward, index, block, graphs[index]), out=end)
            self._update(index, lr)
        self.scaler.update()
        self.ranks.add_([totals])
        return totals / places

    @torch.no_grad()
    def losses(self, samples: Tensor) -> Tensor:
        """KL and CE of each of these samples, (samples, 2), means over its places; on the host. A sync point."""
        found = torch.zeros(len(samples), 2, dtype=torch.float64, device=self.decoder.device)
        mine, here = self._mine(samples), self._mine(torch.arange(len(samples)))
        stream = self._stream("validation", len(mine))
        stream.enter(self.decoder, self.ids[mine])
        for index, block in self.blocks.in_turn(range(len(self.blocks))):
            stream.through(partial(self.decoder.run_block, index, block), out=stream)
        parts = (_split(numbers, self.at_once) for numbers in (mine, here))
        for part, numbers, hidden in zip(*parts, stream.batches(), strict=True):
            for places, *known in self._known(part):
                logits = self.decoder.logits(self.ids[part][:, places], hidden[:, places])
                losses = losses_of(logits.flatten(0, 1).float(), *known)
                found[numbers] += torch.stack([of.view(len(part), -1).sum(1, dtype=torch.float64) for of in losses], -1)
        self.ranks.add_([found])
        return (found / (self.ids.shape[1] - 1)).cpu()

    # --- its parts --------------------------------------------------------------------------------------------------

    def _mine(self, batch: Tensor) -> Tensor:
        """This rank's share of the samples."""
        return batch[self.ranks.share(len(batch))]

    def _stream(self, name: str, samples: int) -> Stream:
        """Room for hidden states of so many samples, the same for all steps."""
        name = f"distill-{name}"
        if name not in self._streams or len(self._streams[name].states) < samples:
            shape = (max(1, samples), self.ids.shape[1], self.decoder.width())
            self._streams[name] = Stream(shape, self.store, self.at_once, name)
        return self._streams[name].first(samples)

    def _forward(self, index: int, block: nn.Module, graphs: Graphs, hidden: Tensor) -> Tensor:
        """What a block gives; without recomputation how it came about is kept."""
        if self.recompute:
            return self.decoder.run_block(index, block, hidden)
        inputs, outputs = self._with_graph(index, block, hidden)
        graphs.append((inputs, outputs))
        return outputs.detach()

    def _backward(self, index: int, block: nn.Module, graphs: Graphs, hidden: Tensor, gradient: Tensor) -> Tensor:
        """Add a block's gradients; gives that by its inputs (of the first block nothing of use)."""
        inputs, outputs = self._with_graph(index, block, hidden) if self.recompute else graphs.popleft()
        outputs.backward(gradient)
        self.blocks.states_ahead(index)
        return gradient if inputs.grad is None else inputs.grad

    def _with_graph(self, index: int, block: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        inputs = hidden.detach().requires_grad_(index > 0)
        with torch.enable_grad():
            return inputs, self.decoder.run_block(index, block, inputs)

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

    def _update(self, index: int, lr: float) -> None:
        self.blocks.states_here(index)
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


def _split(samples: Tensor, size: int) -> list[Tensor]:
    """Parts of that size; none of nothing."""
    return list(samples.split(size)) if len(samples) else []
