"""Reconstruction of one block (arXiv 2402.12419): tune its kept weights until it gives the dense block's outputs.

    minimise over W:  mean || f(X; M * W) - Y ||^2

Pruned weights are held at exactly zero by the optimizer, so the block runs as it is, without masks (docs/method.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebft.config import EBFTConfig
from ebft.decoder import BlockCall
from ebft.matrices import router_paths
from ebft.stream import carry
from ebft_kernels import MaskedAdamW, PackedMask, reconstruction_loss_and_gradient

Forward = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class BlockResult:
    """What tuning a block did.

    Attributes:
        losses: the loss (mean squared error) of every step, before that step.
        gradient_norms: the gradient's L2 norm over kept weights of every step, before clipping.
        error_before, error_after: mean squared error on the probe samples.
        branch_energy: mean of (Y - X)^2 on them, how far the targets are from the inputs; error / energy is the
            relative error.
        seconds: time that the steps took.
    """

    losses: list[float]
    gradient_norms: list[float]
    error_before: float
    error_after: float
    branch_energy: float
    seconds: float


class BlockReconstructor:
    """Tunes one block at a time; holds settings only, so one object serves all blocks.

    Args:
        config: lr, betas, weight_decay, clip, epochs, batch_size and seed are used.
        device: where the block lives and the batches go.
        compute: dtype of the matrix products; with float16 the loss is scaled dynamically and clipped after unscaling.
    """

    def __init__(self, config: EBFTConfig, device: torch.device, compute: torch.dtype = torch.float32) -> None:
        self._config, self._device, self._compute = config, device, compute

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
        **kwargs: Any,
    ) -> BlockResult:
        """Tune ``block`` in place.

        Args:
            block: float32, on the device; its weights at pruned places are set to zero and stay so.
            inputs, targets: (samples, seqlen, width), float32 or bfloat16, in any memory.
            masks: parameter name -> kept weights, in the parameter's shape; other parameters are tuned freely
                (routers are not tuned), without weight decay.
            index: number of the block; with the seed and the epoch it determines the batch order.
            forward: (block, hidden) -> hidden; by default ``block(hidden, **kwargs)`` under autocast.
            on_step: called with (steps done, steps in all) after each step.
        """
        config = self._config
        forward = forward or partial(BlockCall((), kwargs), compute=self._compute)
        optimizer, scaler = self.prepare(block, masks)
        probe = slice(0, max(1, len(inputs) // 16))
        error_before = self._error(block, inputs[probe], targets[probe], forward)

        steps = config.epochs * -(-len(inputs) // config.batch_size)
        losses, norms = torch.zeros(steps, device=self._device), torch.zeros(steps, device=self._device)
        step, began = 0, time.perf_counter()
        for epoch in range(config.epochs):
            batches = batch_order(len(inputs), config.seed, index, epoch).split(config.batch_size)
            for x, y in carry(self._device, (inputs, targets), batches):
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * (1 - step / steps)
                losses[step], norms[step] = self.step(block, optimizer, scaler, x, y, forward)
                step += 1
                if on_step:
                    on_step(step, steps)
        step_losses, step_norms = losses.tolist(), norms.tolist()  # sync points
        seconds = time.perf_counter() - began
        block.requires_grad_(False)

        return BlockResult(
            losses=step_losses,
            gradient_norms=step_norms,
            error_before=error_before.item(),
            error_after=self._error(block, inputs[probe], targets[probe], forward).item(),
            branch_energy=F.mse_loss(inputs[probe].float(), targets[probe].float()).item(),
            seconds=seconds,
        )

    def prepare(self, block: nn.Module, masks: Mapping[str, PackedMask]) -> tuple[MaskedAdamW, torch.amp.GradScaler]:
        """The optimizer over what is tuned in ``block`` (which then requires gradients), and the loss scaler."""
        config, routers = self._config, router_paths(block)
        tuned = {
            name: parameter.requires_grad_()
            for name, parameter in block.named_parameters()
            if parameter.is_floating_point() and name.rpartition(".")[0] not in routers
        }
        optimizer = MaskedAdamW(
            [
                {"params": [tuned[name] for name in masks], "weight_decay": config.weight_decay},
                {"params": [tuned[name] for name in tuned if name not in masks], "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=config.betas,
            masks={tuned[name]: mask for name, mask in masks.items()},
        )
        return optimizer, torch.amp.GradScaler(self._device.type, enabled=self._compute == torch.float16)

    def step(
        self,
        block: nn.Module,
        optimizer: MaskedAdamW,
        scaler: torch.amp.GradScaler,
        x: Tensor,
        y: Tensor,
        forward: Forward,
    ) -> tuple[Tensor, Tensor]:
        """One step on a batch; the loss before it and the gradient norm before clipping, on the device."""
        output = forward(block, x)
        loss, gradient = reconstruction_loss_and_gradient(output, y)
        output.backward(scaler.scale(gradient))
        scaler.unscale_(optimizer)
        norm = optimizer.clip_grad_norm_(self._config.clip or float("inf"))
        scaler.step(optimizer)  # a sync point with float16 only, where a step may be skipped
        scaler.update()
        optimizer.zero_grad()
        return loss, norm

    @torch.no_grad()
    def _error(self, block: nn.Module, inputs: Tensor, targets: Tensor, forward: Forward) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        size = self._config.batch_size
        for x, y in carry(self._device, (inputs, targets), [slice(n, n + size) for n in range(0, len(inputs), size)]):
            total += F.mse_loss(forward(block, x), y, reduction="sum")
        return total / targets.numel()


def batch_order(samples: int, seed: int, block: int, epoch: int) -> Tensor:
    """A permutation of the samples that depends on (seed, block, epoch) alone, so that a resumed run has the same."""
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + block) * 1_000_003 + epoch) % 2**63)
    return torch.randperm(samples, generator=generator)
