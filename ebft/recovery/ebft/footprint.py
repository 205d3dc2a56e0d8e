"""What reconstruction needs: the memory and work of its real step, run on fake tensors under torch's own trackers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ebft.model.blocks import BlockCall
from ebft.model.stand_ins import OTHERS, Tracker
from ebft.recovery.ebft.objective import Objective
from ebft.recovery.ebft.pairs import in_turn_through
from ebft.recovery.ebft.reconstruct import BlockReconstructor
from ebft.recovery.ebft.refresh import BATCHES, UNTIL
from ebft.recovery.protocol import Footprint
from ebft.recovery.samples import Energies
from ebft.recovery.task import Forward
from ebft.registry import optimizers
from ebft_kernels import PackedMask, reconstruction_loss

if TYPE_CHECKING:
    from ebft.plan.shapes import Shapes
    from ebft.recovery.ebft import EBFT

EXCHANGED_BYTES = 48  # a weight of the matrix at hand, while a part of its mask is chosen anew


def footprint(recovery: EBFT, shapes: Shapes) -> Footprint:
    """See ``Recovery``."""
    own, stored = recovery.settings, shapes.stored.itemsize
    kind = optimizers[own.optimizer]
    weights = kind(recovery.config.of_method(kind.Settings)).weights
    best = recovery.blocks_at_once * shapes.largest * (4 if weights == "fp32" else 2)
    return Footprint(
        device=_step(recovery, shapes),
        host={"the best weights of a block": best},
        disk={"pruned blocks, until the end": shapes.in_blocks * stored} if recovery.changes_masks else {},
        flops=_flops(recovery, shapes),
        streams=int(own.unit in ("halves", "pair")),
    )


def _step(recovery: EBFT, shapes: Shapes) -> dict[str, int]:
    """Peak bytes of two steps by row: the first makes the optimizer's states, the second has them."""
    config = recovery.config
    if config.of_method(type(recovery.settings)).compile:
        config = config.replace(compile=False)
    batch = min(config.recover.batch_size, config.data.samples)
    size, seqlen = min(config.recover.at_once, batch), config.data.seqlen
    planned = min(batch, 2 * size)  # further parts of a batch are like the second
    tracker = Tracker()
    with shapes.blocks(recovery.blocks_at_once, size, seqlen, flash=shapes.gpu) as (blocks, call):
        block, names, through = _tuned(shapes, blocks, call)
        x, y = (torch.empty(planned, seqlen, shapes.width) for _ in range(2))
        masks = {name: PackedMask.from_dense(block.get_parameter(name) != 0) for name in names}

        def forward(block: nn.Module, hidden: Tensor) -> Tensor:
            tracker.reset_mod_stats()  # or it takes a second part for a mistake
            return through(block, hidden)

        reconstructor = BlockReconstructor(config, torch.device("cpu"), shapes.compute)
        with reconstructor.prepared(block, masks, forward) as tuning:
            unscaled = torch.amp.GradScaler("cpu", enabled=False)  # a scale is a number, which fakes do not have
            objective = Objective.of(config, lambda: Energies.even(shapes.width))
            tuning = replace(tuning, scaler=unscaled, loss=objective)
            tensors = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
            words = [mask.words for mask in masks.values()]
            tracker.track_external(block, tuning.optimizer, x, y, *words, *tensors)
            with tracker:
                for _ in range(2):
                    reconstructor.step(tuning, x, y)
    rows = tracker.rows()
    of_masks = sum(of_matrix.nbytes for of_matrix in words)  # the optimizer's, though not among its states
    rows["optimizer states"] += of_masks
    rows[OTHERS] += 2 * (batch - planned) * seqlen * shapes.width * 4 - of_masks
    sizes = [shapes.block.get_parameter(name).numel() for name in shapes.matrices]
    if recovery.changes_masks:
        rows["masks chosen anew"] = 4 * sum(sizes) + EXCHANGED_BYTES * max(sizes)
    optimizer = optimizers[recovery.settings.optimizer]
    made = optimizer(config.of_method(optimizer.Settings))
    if made.updates_in_backward:  # the op makes it inside, where no tracker looks
        parameters = map(shapes.block.get_parameter, shapes.matrices)
        largest = max(parameter.numel() for parameter in parameters if parameter.ndim == 2)
        given = 4 if made.weights == "fp32" else 2
        rows[OTHERS] += largest * (shapes.compute.itemsize + (given if given != shapes.compute.itemsize else 0))
    return rows


def _flops(recovery: EBFT, shapes: Shapes) -> float:
    """FLOPs of its passes through all blocks, those of a recomputation and of the next block's targets among them."""
    config, own, at_once = recovery.config, recovery.settings, recovery.blocks_at_once
    changes = {"compile": False, "gpu_memory": None}
    if own.optimizer == "adamw":
        changes["update_in_backward"] = False
    one = config.replace(**changes)
    counted = []
    with shapes.blocks(at_once, 1, config.data.seqlen, flash=False) as fakes:
        block, names, forward = _tuned(shapes, *fakes)
        x = torch.empty(1, config.data.seqlen, shapes.width)
        masks = {name: PackedMask.ones(block.get_parameter(name).shape) for name in names}
        reconstructor = BlockReconstructor(one, torch.device("cpu"), shapes.compute)
        for grad in (False, True):
            counter = FlopCounterMode(display=False)
            with reconstructor.prepared(block, masks, forward) as tuning, counter, torch.set_grad_enabled(grad):
                loss = reconstruction_loss(tuning.forward(x), x)
                if grad:
                    loss.backward()
            counted.append(counter.get_total_flops() / at_once)
    forward_only, step = counted
    blocks, probes = len(shapes.decoder), (own.epochs + 1) / 16  # on which errors are measured
    tuned = blocks + (blocks - 1) * (at_once - 1)
    steps = float(own.epochs) * (1 + UNTIL * BATCHES / own.refresh_every if own.refresh_every else 1)
    ahead = tuned - blocks
    return config.data.samples * (tuned * (steps * step + probes * forward_only) + ahead * forward_only)


def _tuned(shapes: Shapes, blocks: Sequence[nn.Module], call: BlockCall) -> tuple[nn.Module, list[str], Forward]:
    """What is tuned together, a block or a pair; the names of its matrices, and its forward."""
    forward: Forward = partial(BlockCall.__call__, call, compute=shapes.compute)
    if len(blocks) == 1:
        return blocks[0], list(shapes.matrices), forward
    names = [f"{place}.{name}" for place in range(len(blocks)) for name in shapes.matrices]
    return nn.ModuleList(blocks), names, in_turn_through(*[forward] * len(blocks))
