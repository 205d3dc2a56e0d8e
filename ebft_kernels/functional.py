"""The ops as functions of tensors and masks: they check what they are given, and then call the op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ebft_kernels.mask import MaskLike, PackedMask, as_packed

_OPS = torch.ops.ebft_kernels


def masked_linear(
    x: Tensor, weight: Tensor, mask: MaskLike, bias: Tensor | None = None, *, zeroed: bool = False
) -> Tensor:
    """y = x (M * W)^T + b, differentiable in x, weight and bias to any order.

    The weight's gradient is exactly zero where pruned. Under autocast the operands are cast as ``F.linear``'s are.

    Args:
        x: float (..., K), any leading shape.
        weight: float (N, K), of x's dtype; what stands in pruned places does not matter.
        mask: PackedMask or bool tensor (N, K), 1 / True = kept.
        bias: float (N,) or None.
        zeroed: the caller's word that pruned places of ``weight`` hold 0 already, which saves masking it.

    Returns:
        (..., N).

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other.
    """
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"masked_linear got x {tuple(x.shape)} and weight {tuple(weight.shape)}; expected (..., K) and (N, K)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"masked_linear got bias {tuple(bias.shape)}; expected ({weight.shape[0]},)")
    words = _words(mask, weight, "masked_linear")
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is not None and (operand.dtype != x.dtype or operand.device != x.device):
            given = f"{operand.dtype} on {operand.device}"
            raise ValueError(
                f"masked_linear got {name} {given} and x {x.dtype} on {x.device}; expected the same of both"
            )
    return _OPS.masked_linear(x, weight, words, bias, zeroed)


def masked_grad_norm(grads: Sequence[Tensor], masks: Sequence[MaskLike | None]) -> Tensor:
    """The L2 norm over all kept gradient entries: a scalar on their device, with no host synchronisation.

    Args:
        grads: float tensors (..., K) on one device.
        masks: a mask for each, or None for a parameter without one.
    """
    words = [_words(mask, grad, "masked_grad_norm") for mask, grad in zip(masks, grads, strict=True)]
    return _OPS.masked_grad_norm(list(grads), words)


def masked_adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masks: Sequence[MaskLike | None],
    *,
    lr: float,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    grad_scale: Tensor | None = None,
) -> None:
    """One AdamW step (arXiv 1711.05101, algorithm 2) on kept weights, in place; pruned ones and their moments become 0.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: float tensors (..., K), one by one alike in shape and dtype.
        masks: a mask for each, or None for a parameter without one.
        step: number of this step, from 1.
        grad_scale: scalar tensor that multiplies the gradients (a clip factor, 1 / loss scale), on their device.

    Raises:
        ValueError: shapes or dtypes do not fit each other.
    """
    lists = (params, grads, exp_avgs, exp_avg_sqs)
    if step < 1 or len({len(of) for of in (*lists, masks)}) != 1:
        lengths = ", ".join(str(len(of)) for of in (*lists, masks))
        raise ValueError(
            f"masked_adamw_step got step {step} and lists of {lengths}; expected step >= 1 and equal lengths"
        )
    for param, *others in zip(*lists, strict=True):
        for other in others:
            if other.shape != param.shape or other.dtype != param.dtype or other.device != param.device:
                raise ValueError(
                    f"masked_adamw_step got {other.dtype} {tuple(other.shape)} on {other.device} for a parameter "
                    f"{param.dtype} {tuple(param.shape)} on {param.device}; expected the same"
                )
    _OPS.masked_adamw_step(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [_words(mask, param, "masked_adamw_step") for mask, param in zip(masks, params, strict=True)],
        grad_scale,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        step=step,
    )


def _words(mask: MaskLike | None, weight: Tensor, who: str) -> Tensor:
    """The words of ``mask``, checked against ``weight``; no words (numel 0) where there is no mask."""
    if mask is None:
        return torch.empty(0, dtype=torch.int32, device=weight.device)
    packed: PackedMask = as_packed(mask)
    if packed.shape != weight.shape or packed.device != weight.device:
        raise ValueError(
            f"{who} got a mask {tuple(packed.shape)} on {packed.device} for a tensor {tuple(weight.shape)} on "
            f"{weight.device}; expected the same shape and device"
        )
    return packed.words
