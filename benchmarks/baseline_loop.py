"""The published loop (arXiv 2402.12419), written straightforwardly: what ``ebft`` is measured against.

As a good engineer would write it first: the model whole in memory, a hook that catches the first block's inputs, float
masks multiplied into the weight in each forward pass, autograd through that product, ``torch.optim.AdamW``, gradient
clipping, linear decay. It shares data, batch order and settings with ``ebft``, and nothing of its loop or optimizer.
It knows Llama-like models with ``nn.Linear`` layers in ``model.model.layers``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ebft.config import EBFTConfig
from ebft.recovery.ebft import EBFT
from ebft.recovery.optimizers.adamw import AdamW
from ebft.recovery.samples import batch_order


@dataclass
class BaselineResult:
    """Losses of every step, block by block, and the seconds that tuning alone took."""

    losses: list[list[float]] = field(default_factory=list)
    tuning_seconds: float = 0.0


class MultipliedLinear(nn.Module):
    """y = x (W * M)^T + b with a float mask, multiplied anew in each forward pass."""

    def __init__(self, linear: nn.Linear, mask: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("mask", mask.to(linear.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Of (..., inputs)."""
        return F.linear(x, self.weight * self.mask, self.bias)


def run_baseline(model: PreTrainedModel, ids: Tensor, config: EBFTConfig, **adamw: Any) -> BaselineResult:
    """Wanda masks and recovery of every block, in place.

    Args:
        model: a float32 Llama-like model on the CPU or a GPU.
        ids: token ids (samples, seqlen).
        config: sparsity, epochs, batch_size, lr, betas, weight_decay, clip and seed are used.
        adamw: further arguments of ``torch.optim.AdamW``, such as ``fused=True``.
    """
    result = BaselineResult()
    inputs, kwargs = first_inputs(model, ids, config.recover.batch_size)
    for index, block in enumerate(model.model.layers):
        targets, norms = dense_pass(block, inputs, kwargs, config.recover.batch_size)
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        for name, linear in linears.items():
            score = linear.weight.detach().abs() * norms[name]
            kept = score.topk(round(score.shape[1] * (1 - config.prune.sparsity)), dim=1).indices
            replace(block, name, MultipliedLinear(linear, torch.zeros_like(score).scatter_(1, kept, 1.0)))

        began = time.perf_counter()
        result.losses.append(tune(block, inputs, targets, kwargs, config, index, **adamw))
        result.tuning_seconds += time.perf_counter() - began

        with torch.no_grad():
            for name, linear in linears.items():
                linear.weight.mul_(block.get_submodule(name).mask)
                replace(block, name, linear)
            inputs = torch.cat([hidden_of(block(x, **kwargs)) for x in inputs.split(config.recover.batch_size)])
    return result


def tune(
    block: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    kwargs: dict[str, Any],
    config: EBFTConfig,
    index: int,
    **adamw: Any,
) -> list[float]:
    """The loop over epochs and batches for one block; the loss of every step."""
    recipe, betas = config.of_method(EBFT.Settings), config.of_method(AdamW.Settings).betas
    block.requires_grad_(True)
    matrices = [module.weight for module in block.modules() if isinstance(module, MultipliedLinear)]
    others = [p for p in block.parameters() if all(p is not matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=betas, **adamw)
    steps = recipe.epochs * -(-len(inputs) // config.recover.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    for epoch in range(recipe.epochs):
        for batch in batch_order(len(inputs), config.runtime.seed, index, epoch).split(config.recover.batch_size):
            loss = F.mse_loss(hidden_of(block(inputs[batch], **kwargs)), targets[batch])
            loss.backward()
            nn.utils.clip_grad_norm_(block.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
    block.requires_grad_(False)
    return losses


@torch.no_grad()
def dense_pass(
    block: nn.Module, inputs: Tensor, kwargs: dict[str, Any], batch_size: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The dense block's outputs, and the L2 norm of every input feature of every linear layer."""
    squares: dict[str, Tensor] = {}

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            total = args[0].square().flatten(0, -2).sum(0)
            squares[name] = squares[name] + total if name in squares else total

        return hook

    handles = [m.register_forward_hook(hook_of(n)) for n, m in block.named_modules() if isinstance(m, nn.Linear)]
    targets = torch.cat([hidden_of(block(x, **kwargs)) for x in inputs.split(batch_size)])
    for handle in handles:
        handle.remove()
    return targets, {name: total.sqrt() for name, total in squares.items()}


@torch.no_grad()
def first_inputs(model: PreTrainedModel, ids: Tensor, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
    """The first block's inputs for all samples, and the keyword arguments that the model calls its blocks with."""
    inputs: list[Tensor] = []
    kwargs: dict[str, Any] = {}
    with caught(model.model.layers[0], inputs, kwargs):
        for batch in ids.split(batch_size):
            try:
                model(input_ids=batch, use_cache=False)
            except Caught:
                continue
    return torch.cat(inputs), kwargs


class Caught(Exception):
    """The first block has been reached."""


@contextmanager
def caught(block: nn.Module, inputs: list[Tensor], kwargs: dict[str, Any]) -> Iterator[None]:
    """Inside, a call of ``block`` keeps its hidden states in ``inputs`` and ends in ``Caught``."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], given: dict[str, Any]) -> None:
        inputs.append(args[0])
        kwargs.update(given)
        raise Caught

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def hidden_of(output: Any) -> Tensor:
    """A block's hidden states."""
    return output[0] if isinstance(output, tuple) else output


def replace(block: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place ``name`` of ``block``."""
    parent, _, last = name.rpartition(".")
    setattr(block.get_submodule(parent), last, module)
