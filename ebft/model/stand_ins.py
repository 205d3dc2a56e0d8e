"""Running a block on shapes alone: no storage, no arithmetic, whatever the model's size; and what it would allocate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partialmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

OTHERS = "batch, temporaries and others"
_KINDS = {
    "Parameter": "weights",
    "Gradient": "gradients",
    "Optstate": "optimizer states",
    "Activation": "activations",
}


class Tracker(MemTracker):
    """torch's tracker, which hangs hooks on parameters to know their gradients: here on those alone that have any."""

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> Any:
        all_have = all(parameter.requires_grad for parameter in module.parameters())
        return super()._track_module_params_and_buffers(module, install_grad_hooks and all_have)

    def peak(self) -> int:
        """Most bytes at a time, on the device that has most."""
        return max(int(size["Total"]) for size in self.get_tracker_snapshot("peak").values())

    def rows(self) -> dict[str, int]:
        """Bytes at the peak, by what they are for."""
        rows = dict.fromkeys((*_KINDS.values(), OTHERS), 0)
        for kind, size in next(iter(self.get_tracker_snapshot("peak").values())).items():
            name = str(getattr(kind, "value", kind))
            if name != "Total":
                rows[_KINDS.get(name, OTHERS)] += int(size)
        return rows


@contextlib.contextmanager
def shapes_only(*, kept: float = 1.0, flash: bool = False) -> Iterator[None]:
    """Inside, tensors are fake (torch's ``FakeTensorMode``), experts' grouped products among them.

    Args:
        kept: share of a mask's places that are taken for True, where entries are picked by one.
        flash: attention allocates and saves what flash attention on a GPU does, not what the CPU's does.
    """
    changed: dict[str, Any] = {"grouped_mm": _grouped_as_one}
    if flash:
        changed["scaled_dot_product_attention"] = _flash_attention
    with (
        FakeTensorMode(),
        _replaced(F, changed),
        _replaced(torch, {"_grouped_mm": _grouped_as_one}),
        _replaced(Tensor, {"__getitem__": partialmethod(_picked, Tensor.__getitem__, kept)}),
    ):
        yield


def without_values(tensor: Tensor) -> Tensor:
    """Inside ``shapes_only``: a fake CPU tensor of that shape (a fake one of another device fails in autograd)."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


@contextlib.contextmanager
def _replaced(owner: Any, changed: dict[str, Any]) -> Iterator[None]:
    """Other functions under these names while inside. (A mode would not do: backward passes run without modes.)"""
    own = {name: vars(owner).get(name) for name in changed}
    for name, function in changed.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for name, before in own.items():
            if before is None:  # it was inherited
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def _grouped_as_one(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    """Grouped products as one product with the first expert: the same shapes, FLOPs and sizes of gradients.

    The fake kernel of ``grouped_mm`` takes bfloat16 alone, unlike the real one.
    """
    return x @ weight[0]


def _picked(tensor: Tensor, own: Callable[..., Tensor], kept: float, index: Any) -> Tensor:
    """``tensor[index]``; with a mask that has no values, as many entries as ``kept`` says, by way of their places."""
    if not isinstance(index, Tensor) or index.dtype != torch.bool or index.shape != tensor.shape:
        return own(tensor, index)
    count = round(kept * tensor.numel())
    places = torch.empty((tensor.ndim, count), dtype=torch.int64)
    entries = tensor.new_empty(count)
    del places
    return entries


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """Scaled dot product attention with the memory of flash attention on a GPU."""
    tensors = [q, k, v, *([attn_mask] if attn_mask is not None else [])]
    if torch.is_autocast_enabled("cpu"):
        tensors = [tensor.to(torch.get_autocast_dtype("cpu")) for tensor in tensors]
    return _Flash.apply(*tensors)[0]


class _Flash(torch.autograd.Function):
    """What flash attention saves (its operands, its result, a float32 a row) and what its backward pass needs.

    That of grouped queries makes gradients of keys and values for every query head and sums them; the gradient of the
    queries is summed in float32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> tuple[Tensor, Tensor]:
        """The result (batch, heads, tokens, width of a value), and a sum for each of its rows."""
        out, sums = q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums, *mask)
        ctx.mark_non_differentiable(sums)
        return out, sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the three operands."""
        q, k, v, _, sums, *mask = ctx.saved_tensors
        wide, rows = torch.empty_like(q, dtype=torch.float32), torch.empty_like(sums)
        grouped = q.shape[1] != k.shape[1]
        every_head = [t.new_empty((t.shape[0], q.shape[1], *t.shape[2:])) for t in (k, v)] if grouped else []
        made = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), *[None for _ in mask])
        del wide, rows, every_head
        return made
