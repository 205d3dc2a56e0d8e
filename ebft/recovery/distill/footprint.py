"""What distillation needs: a block's step on fake tensors under torch's own trackers, and what lies around it."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ebft.model.stand_ins import OTHERS, Tracker
from ebft.recovery.distill.blocks import bytes_a_weight
from ebft.recovery.distill.predictions import LOGITS_AT_ONCE, Predictions
from ebft.recovery.distill.tune import VALIDATION, optimizer_of
from ebft.recovery.protocol import Footprint, Traffic
from ebft_kernels import PackedMask

if TYPE_CHECKING:
    from ebft.plan.shapes import Shapes
    from ebft.recovery.distill import Distillation

LOGITS = 4  # tensors of logits at hand: those of the head, in float32, exponentials, and a gradient


def footprint(recovery: Distillation, shapes: Shapes) -> Footprint:
    """See ``Recovery``."""
    return _Needs(recovery, shapes).footprint()


class _Needs:
    """Of a model of some shapes."""

    def __init__(self, recovery: Distillation, shapes: Shapes) -> None:
        self.config, self.own, self.shapes = recovery.config, recovery.settings, shapes
        self.data, self.blocks = self.config.data, len(shapes.decoder)
        self.batch = min(self.config.recover.batch_size, self.data.samples)
        self.at_once = min(self.config.recover.at_once, self.batch)
        self.held_out = self.config.recover.holdout or VALIDATION
        self.streamed = self.own.distill_blocks == "host"
        self.keeps_activations = not self.streamed and self.own.recompute == "none"
        kept = 1 - self.config.prune.mask_pattern.sparsity
        self.a_weight = bytes_a_weight(self.own.moments, self.own.compact, kept)

    def footprint(self) -> Footprint:
        """See ``Recovery``."""
        data, shapes, own = self.data, self.shapes, self.own
        steps = own.distill_epochs * -(-round(data.samples * (1 - self.held_out)) // self.batch)
        forward, of_step = self._flops()
        passes = data.samples * (1 + self.held_out * (own.distill_epochs + 1))  # predictions, and validation
        of_predictions = data.samples * (data.seqlen - 1) * Predictions.bytes_a_token(own.distill_top)
        locked = shapes.gpu and not self.streamed
        host = {
            "the dense model's predictions": of_predictions,
            "the best weights of all blocks": self.blocks * _locked(self._sizes) if locked else 4 * shapes.in_blocks,
        }
        if self.streamed:
            host["weights and states of all blocks"] = self.blocks * self._away
        borders = 0.0 if self.keeps_activations else (self.blocks + 1) * self.batch / data.samples
        traffic = Traffic(
            a_step=int((4 + self.a_weight) * shapes.in_blocks),  # in both passes weights, in the second all the rest
            steps=steps,
            samples=self.batch,
            flops=of_step,
        )
        return Footprint(
            device=self._step(),
            stages=self._ends(),
            host=host,
            flops=passes * forward + steps * self.batch * of_step,
            streams=max(1.0, borders + self.held_out),
            traffic=traffic if self.streamed and shapes.gpu else None,
        )

    def _step(self) -> dict[str, int]:
        """Bytes on the device while a block is updated, by row."""
        shapes = self.shapes
        rows = dict(self._block)
        if self.streamed:
            rows["weights of the next block"] = 4 * shapes.largest
        else:
            rows["the other blocks, and their states"] = int(self.a_weight * (shapes.in_blocks - shapes.largest))
        if self.keeps_activations:
            parts = -(-self.batch // self.at_once)
            rows["activations of the other blocks"] = self._saved * (self.blocks * parts - 1)
            rows["hidden states at the borders"] = 4 * (self.blocks + 1) * self.batch * self.data.seqlen * shapes.width
        return rows | {"final norm, head and embeddings": self._outside}

    @cached_property
    def _block(self) -> dict[str, int]:
        """Peak bytes of two steps of a block by row: the first makes the optimizer's states, the second has them."""
        tracker, shapes, size = Tracker(), self.shapes, self.at_once
        with shapes.fakes(size, self.data.seqlen, flash=shapes.gpu) as (block, call):
            x, gradient = (torch.empty(size, self.data.seqlen, shapes.width) for _ in range(2))
            masks = {name: PackedMask.from_dense(block.get_parameter(name) != 0) for name in shapes.matrices}
            optimizer = optimizer_of(block, masks, self.own)
            words = [mask.words for mask in masks.values()]
            tensors = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
            tracker.track_external(block, optimizer, x, gradient, *words, *tensors)
            with tracker:
                for _ in range(2):
                    for _ in range(-(-min(self.batch, 2 * size) // size)):  # further parts are like the second
                        tracker.reset_mod_stats()  # or it takes a second part for a mistake
                        call(block, x.detach().requires_grad_(), compute=shapes.compute).backward(gradient)
                    optimizer.clip_grad_norm_(1.0)
                    optimizer.step()
                    optimizer.zero_grad()
        rows = tracker.rows()
        of_masks = sum(of_matrix.nbytes for of_matrix in words)  # the optimizer's, though not among its states
        rows["optimizer states"] += of_masks
        rows[OTHERS] -= of_masks
        return rows

    @cached_property
    def _saved(self) -> int:
        """Bytes that a block's forward pass keeps for its backward pass, of what goes through it at once."""
        kept: dict[int, int] = {}
        with self.shapes.fakes(self.at_once, self.data.seqlen, flash=self.shapes.gpu) as (block, call):
            own = {_storage(tensor) for tensor in (*block.requires_grad_().parameters(), *block.buffers())}

            def note(tensor: Tensor) -> Tensor:
                if _storage(tensor) not in own:
                    kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
                    held.append(tensor)  # or another may take its place
                return tensor

            held = list[Tensor]()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                call(block, torch.empty(self.at_once, self.data.seqlen, self.shapes.width), self.shapes.compute)
        return sum(kept.values())

    def _flops(self) -> tuple[float, float]:
        """For one sample: of a forward pass, head included, and of a step."""
        shapes, counted = self.shapes, []
        with shapes.fakes(1, self.data.seqlen, flash=False) as (block, call):
            block.requires_grad_()
            for grad in (False, True):
                x = torch.empty(1, self.data.seqlen, shapes.width, requires_grad=grad)
                with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
                    outputs = call(block, x, compute=shapes.compute)
                    if grad:
                        outputs.backward(torch.empty_like(outputs))
                counted.append(self.blocks * counter.get_total_flops())
        forward, both = counted
        head = 2 * self.data.seqlen * shapes.vocabulary * shapes.width
        again = 0 if self.keeps_activations else forward
        return forward + head, both + again + 2 * head

    def _ends(self) -> dict[str, int]:
        """Bytes on the device while logits are at hand: of the dense model, and of the one that is tuned."""
        shapes = self.shapes
        head = shapes.vocabulary * shapes.width
        of_logits = LOGITS * 4 * max(LOGITS_AT_ONCE, shapes.vocabulary * self.at_once)
        if shapes.compute.itemsize < 4:
            of_logits += head * shapes.compute.itemsize
        held = 0 if self.streamed else int(self.a_weight * shapes.in_blocks)
        if self.keeps_activations:
            rows = self._step()
            held += rows["activations of the other blocks"] + self._saved + rows["hidden states at the borders"]
        return {
            "distillation, the dense model's logits": 4 * head + of_logits,
            "distillation, logits": self._outside + of_logits + held,
        }

    @property
    def _outside(self) -> int:
        return 4 * (self.shapes.parameters - self.shapes.in_blocks)

    @property
    def _sizes(self) -> list[int]:
        """Bytes of each of a block's parameters."""
        return [4 * parameter.numel() for parameter in self.shapes.block.parameters()]

    @property
    def _away(self) -> int:
        """Bytes of a block on the host."""
        states = self.a_weight - 4 - 1 / 8
        tensors = [*self._sizes, *2 * [int(states / 2 * size / 4) for size in self._sizes]]
        return (_locked(tensors) if self.shapes.gpu else sum(tensors)) + sum(self._sizes) // 32


def _locked(sizes: list[int]) -> int:
    """Bytes of tensors in page-locked memory, which come in powers of two."""
    return sum(1 << (size - 1).bit_length() for size in sizes)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
