"""The ops' autograd formulas, by which they are differentiable to any order.

The three products of a masked layer are each other's derivatives, and those of kept weights alone are, too:

    y = x (M W)^T,   dx = dy (M W),   dW = M (dy^T x)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ebft_kernels.ops import LIBRARY, NAMESPACE

_OPS = torch.ops.ebft_kernels


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, words, _, ctx.zeroed = inputs
    ctx.save_for_backward(x, weight, words)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, words = ctx.saved_tensors
    need_x, need_weight, _, need_bias, _ = ctx.needs_input_grad
    return (
        _OPS.masked_linear_dx(dy, weight, words, ctx.zeroed) if need_x else None,
        _OPS.masked_linear_dw(dy, x, words) if need_weight else None,
        None,
        dy.reshape(-1, dy.shape[-1]).sum(0) if need_bias else None,
        None,
    )


def _dx_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dy, weight, words, ctx.zeroed = inputs
    ctx.save_for_backward(dy, weight, words)


def _dx_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    dy, weight, words = ctx.saved_tensors
    need_dy, need_weight = ctx.needs_input_grad[:2]
    return (
        _OPS.masked_linear(ddx, weight, words, None, ctx.zeroed) if need_dy else None,
        _OPS.masked_linear_dw(dy, ddx, words) if need_weight else None,
        None,
        None,
    )


def _dw_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _dw_backward(ctx: Any, ddw: Tensor) -> tuple[Any, ...]:
    dy, x, words = ctx.saved_tensors
    return (
        _OPS.masked_linear(x, ddw, words, None, False) if ctx.needs_input_grad[0] else None,
        _OPS.masked_linear_dx(dy, ddw, words, False) if ctx.needs_input_grad[1] else None,
        None,
    )


def _compressed_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, words, values, row_offsets, scales, _, ctx.width = inputs
    ctx.save_for_backward(words, values, row_offsets, scales)
    ctx.dtype = x.dtype


def _compressed_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    words, values, row_offsets, scales = ctx.saved_tensors
    weight = _OPS.decompress(words, values, row_offsets, scales, ctx.width).to(ctx.dtype)
    db = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[5] else None
    return (dy @ weight if ctx.needs_input_grad[0] else None, None, None, None, None, db, None)


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)  # the tensor too: a graph ends where somebody changes it


def _gather_backward(ctx: Any, dvalues: Tensor) -> tuple[Any, ...]:
    tensor, words, row_offsets = ctx.saved_tensors
    return _OPS.decompress(words, dvalues.contiguous(), row_offsets, None, tensor.shape[-1]), None, None


def _decompress_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    words, _, row_offsets, _, _ = inputs
    ctx.save_for_backward(words, row_offsets)


def _decompress_backward(ctx: Any, dense: Tensor) -> tuple[Any, ...]:
    """Of float values alone: codes get no gradients."""
    return None, _OPS.gather_kept(dense.contiguous(), *ctx.saved_tensors), None, None, None


def _sparse_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, values, *walks, _, ctx.width = inputs
    ctx.save_for_backward(x, values, *walks)


def _sparse_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, values, *walks = ctx.saved_tensors
    need_x, need_values, *_, need_bias, _ = ctx.needs_input_grad
    return (
        _OPS.sparse_linear_dx(dy, values, *walks, ctx.width) if need_x else None,
        _OPS.sparse_linear_dw(dy, x, *walks) if need_values else None,
        *[None] * 4,
        dy.reshape(-1, dy.shape[-1]).sum(0) if need_bias else None,
        None,
    )


def _sparse_dx_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.width = inputs
    ctx.save_for_backward(*tensors)


def _sparse_dx_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    dy, values, *walks = ctx.saved_tensors
    need_dy, need_values = ctx.needs_input_grad[:2]
    return (
        _OPS.sparse_linear(ddx, values, *walks, None, ctx.width) if need_dy else None,
        _OPS.sparse_linear_dw(dy, ddx, *walks) if need_values else None,
        *[None] * 5,
    )


def _sparse_dw_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _sparse_dw_backward(ctx: Any, ddw: Tensor) -> tuple[Any, ...]:
    (dy, x, *walks), ddw = ctx.saved_tensors, ddw.contiguous()
    need_dy, need_x = ctx.needs_input_grad[:2]
    return (
        _OPS.sparse_linear(x, ddw, *walks, None, x.shape[-1]) if need_dy else None,
        _OPS.sparse_linear_dx(dy, ddw, *walks, x.shape[-1]) if need_x else None,
        *[None] * 4,
    )


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    result, target, residual = inputs
    ctx.set_materialize_grads(False)  # nobody asks for the gradient's own gradient, as a rule
    ctx.save_for_backward(output[1])
    ctx.dtypes = (result.dtype, target.dtype, None if residual is None else residual.dtype)


def _loss_backward(ctx: Any, dloss: Tensor | None, dgradient: Tensor | None) -> tuple[Any, ...]:
    (gradient,) = ctx.saved_tensors
    total = None if dloss is None else gradient * dloss
    if dgradient is not None:  # of second order
        second = dgradient * (2 / max(1, gradient.numel()))
        total = second if total is None else total + second
    signs = (1, -1, -1)
    return tuple(
        (total if sign == 1 else -total).to(dtype) if need and total is not None else None
        for sign, dtype, need in zip(signs, ctx.dtypes, ctx.needs_input_grad, strict=True)
    )


for _name, _setup, _backward in (
    ("reconstruction_loss", _loss_setup, _loss_backward),
    ("masked_linear", _linear_setup, _linear_backward),
    ("masked_linear_dx", _dx_setup, _dx_backward),
    ("masked_linear_dw", _dw_setup, _dw_backward),
    ("compressed_linear", _compressed_setup, _compressed_backward),
    ("gather_kept", _gather_setup, _gather_backward),
    ("decompress", _decompress_setup, _decompress_backward),
    ("sparse_linear", _sparse_setup, _sparse_backward),
    ("sparse_linear_dx", _sparse_dx_setup, _sparse_dx_backward),
    ("sparse_linear_dw", _sparse_dw_setup, _sparse_dw_backward),
):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _backward, setup_context=_setup, lib=LIBRARY)
