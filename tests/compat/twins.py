"""A masked model and its plain twin, whose dense weights are multiplied by their masks: a library must give both alike.

Matrices have at least 128 x 128 entries: optimizers with 8-bit states leave smaller ones in 32 bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from multiplied import MultipliedLinear
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ebft_kernels import MaskedLinear, PackedMask, mask_linears_
from ebft_kernels.testing import assert_exact_zeros

VOCABULARY = 64


@dataclass
class Twins:
    """The same start twice, and how to make the plain model once more."""

    masked: nn.Module
    plain: nn.Module
    masks: dict[str, Tensor]
    make: Callable[[], nn.Module]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 160), nn.GELU(), nn.Linear(160, 128))


def llama() -> nn.Module:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **sizes))


def make_twins(make: Callable[[], nn.Module] = mlp, dtype: torch.dtype = torch.float32) -> Twins:
    torch.manual_seed(0)
    masked = make().to(dtype)
    masks = {
        f"{path}.weight": PackedMask.from_scores(layer.weight.abs(), 2, 4).dense()
        for path, layer in masked.named_modules()
        if type(layer) is nn.Linear and path != "lm_head"
    }
    mask_linears_(masked, masks)
    plain = copy.deepcopy(masked)
    for name, mask in masks.items():
        layer = plain.get_submodule(name.removesuffix(".weight"))
        layer.__class__ = MultipliedLinear
        layer.keep = mask
    return Twins(masked, plain, masks, lambda: make().to(dtype))


def batches(count: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(8, 128, generator=generator).to(dtype) for _ in "xy") for _ in range(count)]


def token_rows(count: int = 16) -> list[dict[str, Tensor]]:
    ids = torch.randint(VOCABULARY, (count, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def masked_state(twins: Twins, model: nn.Module) -> dict[str, Tensor]:
    """A state dict of the plain twin's kind, with zeros where pruned."""
    return {
        name: torch.where(twins.masks[name], value, 0.0) if name in twins.masks else value
        for name, value in model.state_dict().items()
    }


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        if hasattr(model, "lm_head"):
            return model(input_ids=torch.stack([row["input_ids"] for row in token_rows(4)])).logits
        return model(batches(1, next(model.parameters()).dtype)[0][0])


def check(twins: Twins, masked: nn.Module | None = None, plain: nn.Module | None = None, **tolerance: float) -> None:
    """State dict and forward pass of the masked model show zeros where pruned, and equal the plain twin's."""
    masked, plain = masked or twins.masked, plain or twins.plain
    layers = [layer for layer in masked.modules() if isinstance(layer, MaskedLinear)]
    assert len(layers) == len(twins.masks)
    found = [layer._parameters["weight"].detach().clone() for layer in layers]

    state, expected = masked.state_dict(), masked_state(twins, plain)
    assert state.keys() == expected.keys()
    tolerance = tolerance or {"rtol": 1e-6, "atol": 1e-7}
    for name, value in state.items():
        if name in twins.masks:
            assert_exact_zeros(value, twins.masks[name], name)
        torch.testing.assert_close(value, expected[name], **tolerance)

    reloaded = twins.make()
    reloaded.load_state_dict(state)
    for layer, value in zip(layers, found, strict=True):  # what the library left: the state dict has set it to zero
        layer._parameters["weight"].data.copy_(value)
    got = outputs(masked)
    torch.testing.assert_close(got, outputs(reloaded), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, outputs(plain), rtol=1e-4, atol=max(1e-5, tolerance["atol"]))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for x, y in batches(steps, next(model.parameters()).dtype):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
