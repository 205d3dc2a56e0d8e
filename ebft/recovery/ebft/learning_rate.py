"""The learning rate of every step, and of every matrix."""

from __future__ import annotations

import math

import torch

from ebft.recovery.ebft import EBFT
from ebft.recovery.optimizers.masked import MaskedOptimizer
from ebft_kernels import MaskedAdamW


def learning_rate(own: EBFT.Settings, highest: float, step: int, steps: int) -> float:
    """At ``step`` (from 0) of ``steps``: a linear rise to the ``highest`` over ``--warmup``, then ``--lr-decay``."""
    rise = round(own.warmup * steps)
    if step < rise:
        return highest * (step + 1) / rise
    passed = (step - rise) / (steps - rise)
    decays = {"linear": 1 - passed, "cosine": (1 + math.cos(math.pi * passed)) / 2, "constant": 1.0}
    return highest * decays[own.lr_decay]


@torch.no_grad()
def set_scales(optimizer: MaskedAdamW | MaskedOptimizer, lr_scale: str) -> None:
    """What the learning rate is multiplied by in each parameter group (``--lr-scale``), as ``group["scale"]``.

    With ``rms`` it is the root mean square of the group's kept weights as they are now, so that a step moves them by
    the share ``--lr``; norms and biases, which may be 1 or 0 throughout, take the mean of the matrices'. A sync point.
    """
    for group in optimizer.param_groups:
        group["scale"] = 1.0
    if lr_scale == "absolute":
        return
    masked = [
        (group, [mask for p in group["params"] if (mask := optimizer.mask_of(p)) is not None])
        for group in optimizer.param_groups
    ]
    matrices = [(group, sum(mask.count() for mask in masks)) for group, masks in masked if masks]
    squares = torch.stack([torch.stack([p.float().square().sum() for p in g["params"]]).sum() for g, _ in matrices])
    scales = [math.sqrt(total / max(kept, 1)) for total, (_, kept) in zip(squares.tolist(), matrices, strict=True)]
    for group in optimizer.param_groups:
        group["scale"] = sum(scales) / len(scales)
    for scale, (group, _) in zip(scales, matrices, strict=True):
        group["scale"] = scale
