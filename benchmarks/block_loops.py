"""One LlamaV1-7B-shaped block, tuned a few steps by the published loop, by a compiled clean loop, and by ours.

published        mask multiplied into float32 weights in every forward pass, autocast, AdamW one parameter at a time,
                 and the hidden states copied to the host and back in every step; once more without these copies
compiled         the same arithmetic, written cleanly under torch.compile, with the fused AdamW
ours             zeroed bfloat16 weights with float32 masters, plain products, loss, clipping and step in fused kernels;
                 once more with norms, rotary embedding and SwiGLU in liger-kernel, where that is installed
ours, leanest    stochastic rounding, 8-bit moments of survivors, weights updated in the backward pass
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from benchmarks.baseline_loop import MultipliedLinear, hidden_of, replace
from ebft.model.fused import fuse_, liger_missing
from ebft_kernels import MaskedAdamW, PackedMask, mask_linears_, reconstruction_loss_and_gradient

RECIPE: dict[str, Any] = {"lr": 2e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
PAPER_FLOPS = 1.14e9 / 202.4e6  # of training, a token and a weight (the block's input needs no gradient)


@dataclass(frozen=True)
class Problem:
    """A block's weights and masks, on the host, and one batch on the device."""

    config: LlamaConfig
    masks: dict[str, Tensor]
    weights: dict[str, Tensor]
    inputs: Tensor
    targets: Tensor

    @property
    def tokens(self) -> int:
        """In a step."""
        return self.inputs.shape[:-1].numel()

    @property
    def flops(self) -> float:
        """Of a step, as PAPER.md counts them; never recomputation."""
        return PAPER_FLOPS * self.tokens * sum(mask.numel() for mask in self.masks.values())


def make_problem(size: str, device: torch.device) -> Problem:
    """LlamaV1-7B's block and 8 x 1024 tokens, or a toy; half of every matrix is pruned at random."""
    hidden, ffn, heads, batch, seqlen = (4096, 11008, 32, 8, 1024) if size == "full" else (32, 48, 4, 2, 8)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_attention_heads=heads, attn_implementation="sdpa"
    )
    torch.manual_seed(0)
    with device:
        block = LlamaDecoderLayer(config, 0)
    weights = {name: parameter.detach().cpu() for name, parameter in block.named_parameters()}
    linears = {path: module for path, module in block.named_modules() if isinstance(module, nn.Linear)}
    masks = {f"{path}.weight": (torch.rand_like(linear.weight) > 0.5).cpu() for path, linear in linears.items()}
    inputs = torch.randn(batch, seqlen, hidden, device=device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        targets = hidden_of(block(inputs, position_embeddings=_rotary(config, inputs))).float()
    return Problem(config, masks, weights, inputs, targets)


def _rotary(config: LlamaConfig, inputs: Tensor) -> tuple[Tensor, Tensor]:
    positions = torch.arange(inputs.shape[1], device=inputs.device).unsqueeze(0)
    with inputs.device:
        rotary = LlamaRotaryEmbedding(config)
    return rotary(inputs, positions)


def _block(problem: Problem, dtype: torch.dtype) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    """The block with its pruned weights at zero, and how it is called."""
    with problem.inputs.device:
        block = LlamaDecoderLayer(problem.config, 0).to(dtype)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(problem.weights[name])
            if name in problem.masks:
                parameter.mul_(problem.masks[name].to(parameter.device))
    places = _rotary(problem.config, problem.inputs.to(dtype))
    return block, lambda module, x: hidden_of(module(x, position_embeddings=places))


def published(problem: Problem, host_copies: bool) -> Callable[[], float]:
    """The loop as published; a function that takes a step and gives its loss."""
    block, call = _block(problem, torch.float32)
    for name, mask in problem.masks.items():
        path = name.removesuffix(".weight")
        linear = block.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        replace(block, path, MultipliedLinear(linear, mask.float().to(linear.weight.device)))
    optimizer = torch.optim.AdamW(block.parameters(), foreach=False, fused=False, **RECIPE)
    device = problem.inputs.device
    inputs, targets = (t.cpu() if host_copies else t for t in (problem.inputs, problem.targets))

    def step() -> float:
        x, y = inputs.to(device), targets.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            out = call(block, x)
        if host_copies:
            out.detach().float().cpu()  # sync point
        loss = F.mse_loss(out.float(), y)
        loss.backward()
        nn.utils.clip_grad_norm_(block.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # sync point

    return step


def compiled(problem: Problem) -> Callable[[], Tensor]:
    """A clean loop under torch.compile."""
    block, call = _block(problem, torch.float32)
    for name, mask in problem.masks.items():
        path = name.removesuffix(".weight")
        linear = block.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        replace(block, path, MultipliedLinear(linear, mask.float().to(linear.weight.device)))
    optimizer = torch.optim.AdamW(block.parameters(), fused=True, **RECIPE)
    device = problem.inputs.device

    @torch.compile
    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            out = call(block, x)
        return F.mse_loss(out.float(), y)

    def step() -> Tensor:
        loss = loss_of(problem.inputs, problem.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(block.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def ours(problem: Problem, lean: bool = False, liger: bool = False) -> Callable[[], Tensor]:
    """Zeroed weights and ``MaskedAdamW``; ``lean``: as little memory as there is."""
    block, call = _block(problem, torch.bfloat16)
    if liger:
        fuse_(block)
    inputs = problem.inputs.bfloat16()
    if lean:
        mask_linears_(block, problem.masks)
        layout: dict[str, Any] = {
            "weights": "stochastic",
            "moments": "int8",
            "compact": True,
            "update_in_backward": True,
        }
        optimizer = MaskedAdamW.for_module(block, **layout, **RECIPE)
    else:
        parameters = dict(block.named_parameters())
        masks = {parameters[name]: PackedMask.from_dense(mask) for name, mask in problem.masks.items()}
        optimizer = MaskedAdamW(parameters.values(), masks=masks, weights="master", compact=True, **RECIPE)

    def step() -> Tensor:
        output = call(block, inputs)
        loss, gradient = reconstruction_loss_and_gradient(output, problem.targets)
        output.backward(gradient.to(output.dtype))
        if not lean:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


CONTENDERS: dict[str, Callable[[Problem], Callable[[], Any]]] = {
    "ours": ours,
    "published, with host copies": lambda problem: published(problem, host_copies=True),
    "published, without host copies": lambda problem: published(problem, host_copies=False),
    "ours, leanest": lambda problem: ours(problem, lean=True),
    **({} if liger_missing() else {"ours, with liger-kernel": lambda problem: ours(problem, liger=True)}),
    "torch.compile of a clean loop": compiled,
}
