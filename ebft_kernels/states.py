"""``Layout``: how ``MaskedAdamW`` stores what it knows of a parameter (docs/layouts.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebft_kernels import sharding
from ebft_kernels.mask import PackedMask
from ebft_kernels.reference import dequantize, quantize

WEIGHTS = ("fp32", "master", "stochastic")
MOMENTS = ("fp32", "bf16", "int8")
MOMENT_KEYS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Layout:
    """One choice on each of the three axes; ``MaskedAdamW`` says what they are.

    Raises:
        ValueError: there is no such choice.
    """

    weights: str
    moments: str
    compact: bool

    def __post_init__(self) -> None:
        for name, given, allowed in (("weights", self.weights, WEIGHTS), ("moments", self.moments, MOMENTS)):
            if given not in allowed:
                raise ValueError(f"MaskedAdamW got {name} = {given!r}; expected one of {', '.join(allowed)}")

    def check_param(self, param: Tensor) -> None:
        """Whether the states of ``param`` can be stored so.

        Raises:
            ValueError: it is sharded, and its states cannot be.
            TypeError: it has another dtype.
        """
        whole = self.weights == "stochastic" or self.moments == "int8" or self.compact
        if whole and sharding.is_sharded(param):
            raise ValueError(
                f"MaskedAdamW got a sharded parameter {tuple(param.shape)} with weights={self.weights!r}, "
                f"moments={self.moments!r}, compact={self.compact}; expected weights 'fp32' or 'master', moments "
                "'fp32' or 'bf16' and compact=False, whose states are sharded as the parameter is"
            )
        allowed = {"fp32": [], "master": [torch.bfloat16, torch.float16], "stochastic": [torch.bfloat16]}[self.weights]
        allowed = [torch.float32, *([torch.float64] if self.moments == "fp32" else []), *allowed]
        if param.dtype not in allowed:
            raise TypeError(
                f"MaskedAdamW got a parameter of {param.dtype}; expected {', '.join(map(str, allowed))} with "
                f"weights={self.weights!r}, moments={self.moments!r}"
            )

    def has_master(self, param: Tensor) -> bool:
        """Whether a float32 master goes with ``param``."""
        return self.weights == "master" and param.dtype in (torch.bfloat16, torch.float16)

    def rounds_stochastically(self, param: Tensor) -> bool:
        """Whether a step rounds ``param`` stochastically."""
        return self.weights == "stochastic" and param.dtype == torch.bfloat16

    def begin(self, state: dict[str, Any], param: Tensor, mask: PackedMask | None) -> None:
        """Make the states before the first step."""
        held = sharding.local(param)
        for key in MOMENT_KEYS:
            self.store(state, key, torch.zeros(held.shape, dtype=wide(param), device=param.device), param, mask)
        if self.has_master(param):
            self.store(state, "master", held.float(), param, mask)
        self.note_rows(state, mask)

    def note_rows(self, state: dict[str, Any], mask: PackedMask | None) -> None:
        """Keep where each row of compact states begins."""
        if self.compact and mask is not None:
            state["row_offsets"] = mask.row_offsets()

    def store(self, state: dict[str, Any], key: str, dense: Tensor, param: Tensor, mask: PackedMask | None) -> None:
        """Store what is of the parameter's (local) shape."""
        stored = dense[mask.dense()] if self.compact and mask is not None else dense.contiguous()
        if key == "master" or self.moments == "fp32":
            state[key] = sharding.sharded_as(stored, param)
        elif self.moments == "bf16":
            state[key] = sharding.sharded_as(stored.to(torch.bfloat16), param)
        else:
            codes, state[f"{key}_scale"] = quantize(stored.flatten(), signed=key == "exp_avg")
            state[key] = codes.view(stored.shape)

    def dense(self, state: dict[str, Any], key: str, param: Tensor, mask: PackedMask | None) -> Tensor:
        """A state as it is meant: float32 (float64) in the parameter's (local) shape, 0 where nothing is stored."""
        stored = sharding.local(state[key]).flatten()
        stored = dequantize(stored, state[f"{key}_scale"]) if f"{key}_scale" in state else stored.to(wide(param))
        if mask is None or not self.compact:
            return stored.view(sharding.local(param).shape).clone()
        return torch.zeros(param.shape, dtype=stored.dtype, device=param.device).masked_scatter_(mask.dense(), stored)

    def check(self, state: dict[str, Any], param: Tensor, mask: PackedMask | None) -> None:
        """Whether states, which come from a state dict, are stored so.

        Raises:
            ValueError: they have another layout.
        """
        if "exp_avg" not in state:
            return
        dtype = {"fp32": wide(param), "bf16": torch.bfloat16, "int8": torch.int8}[self.moments]
        stored = mask.count() if mask is not None and self.compact else param.numel()
        master = self.has_master(param)
        if state["exp_avg"].dtype != dtype or state["exp_avg"].numel() != stored or ("master" in state) != master:
            given = f"{state['exp_avg'].dtype} moments of {state['exp_avg'].numel()} entries"
            given += " and a master" if "master" in state else ""
            raise ValueError(
                f"MaskedAdamW got a state dict with {given} for a parameter {tuple(param.shape)}; expected {dtype} "
                f"moments of {stored} entries{' and a master' if master else ''}, those of weights={self.weights!r}, "
                f"moments={self.moments!r}, compact={self.compact}"
            )


def wide(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's arithmetic."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32
