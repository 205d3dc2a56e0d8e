"""The ops as functions of tensors and masks: they check what they are given, and then call the op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ebft_kernels.adamw import AdamWStep
from ebft_kernels.mask import MaskLike, PackedMask, as_packed
from ebft_kernels.places import Places
from ebft_kernels.reference import QUANTIZED_BLOCK
from ebft_kernels.sharding import beside, is_sharded
from ebft_kernels.updates import Updater, updater_of

_OPS = torch.ops.ebft_kernels


def masked_linear(
    x: Tensor,
    weight: Tensor,
    mask: MaskLike,
    bias: Tensor | None = None,
    *,
    zeroed: bool = False,
    places: Places | None = None,
) -> Tensor:
    """y = x (M * W)^T + b, differentiable in x, weight and bias to any order, by ``torch.func`` too.

    The weight's gradient is exactly zero where pruned. Under autocast the operands are cast as ``F.linear``'s are. A
    weight of ``MaskedAdamW(update_in_backward=True)`` gets no gradient: the backward pass updates it.

    Args:
        x: float (..., K), any leading shape.
        weight: float (N, K), of x's dtype; what stands in pruned places does not matter.
        mask: PackedMask or bool tensor (N, K), 1 / True = kept.
        bias: float (N,) or None.
        zeroed: the caller's word that pruned places of ``weight`` hold 0 already, which saves masking it.
        places: those of the mask, on a CPU: kept weights alone are multiplied. Faster where ``explain`` says so.

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
    words = words_of(mask, weight, "masked_linear")
    if is_sharded(weight) or is_transformed():
        kept = beside(PackedMask(words, weight.shape).dense(), weight)
        return F.linear(x, torch.where(kept, weight, 0.0), bias)
    if is_traceable_wrapper_subclass(weight):
        raise ValueError(
            f"masked_linear got a weight that is a {type(weight).__name__}; expected a plain tensor: call "
            "unmask_linears_ on the model before it is quantised"
        )
    kind = x.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    master, updater = weight, None if torch.compiler.is_compiling() else updater_of(weight)
    if autocast and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        weight = weight.detach().to(dtype) if updater is not None else weight.to(dtype)
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is not None and (operand.dtype != x.dtype or operand.device != x.device):
            given = f"{operand.dtype} on {operand.device}"
            raise ValueError(
                f"masked_linear got {name} {given} and x {x.dtype} on {x.device}; expected the same of both"
            )
    if updater is not None and torch.is_grad_enabled() and master.requires_grad:
        return _UpdatedInBackward.apply(x, master, weight.detach(), words, bias, zeroed, updater)
    if places is not None:
        values = _OPS.gather_kept(weight, words, places.row_offsets)
        return _OPS.sparse_linear(x, values, *places.walk, *places.back, bias, weight.shape[1])
    return _OPS.masked_linear(x, weight, words, bias, zeroed)


def linear_of_zeroed(x: Tensor, weight: Tensor, words: Tensor, bias: Tensor | None) -> Tensor:
    """``masked_linear`` of a weight that holds zeros where ``words`` prune, on a CPU: torch's product at once, without
    the checks and the way through an op that it takes.
    """
    tuned = torch.is_grad_enabled() and weight.requires_grad
    return F.linear(x, _KeptGradient.apply(weight, words) if tuned else weight, bias)


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is at work, which see through torch's own operations
    alone."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


class _KeptGradient(torch.autograd.Function):
    """A weight as it is, whose gradient is zero where pruned."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, words: Tensor) -> Tensor:
        """The weight itself, which holds zeros where ``words`` prune."""
        ctx.save_for_backward(words)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """The gradient of F.linear, masked."""
        return _OPS.zero_pruned(gradients[0], *ctx.saved_tensors), None


class _UpdatedInBackward(torch.autograd.Function):
    """``masked_linear`` whose backward pass hands the weight's gradient, unmade, to the weight's updater."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        master: Tensor,
        weight: Tensor,
        words: Tensor,
        bias: Tensor | None,
        zeroed: bool,
        updater: Updater,
    ) -> Tensor:
        """``master`` is the parameter, ``weight`` the same in the dtype of the product."""
        ctx.save_for_backward(x, words)
        ctx.master, ctx.version = master, master._version
        ctx.zeroed, ctx.updater = zeroed, updater
        return _OPS.masked_linear(x, weight, words, bias, zeroed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The input gradient uses the weight as it was; then it is updated."""
        (x, words), master = ctx.saved_tensors, ctx.master
        if master._version != ctx.version:
            raise RuntimeError(
                f"masked_linear got a weight {tuple(master.shape)} that changed between its forward and backward pass; "
                "expected a weight that is updated in the backward pass to be used once a step"
            )
        need_bias = ctx.needs_input_grad[4]
        dx = _OPS.masked_linear_dx(dy, master.to(dy.dtype), words, ctx.zeroed) if ctx.needs_input_grad[0] else None
        ctx.updater.update(master, dy, x)
        return dx, None, None, None, dy.reshape(-1, dy.shape[-1]).sum(0) if need_bias else None, None, None


def reconstruction_loss(output: Tensor, target: Tensor, residual: Tensor | None = None) -> Tensor:
    """Mean squared error of a block's outputs, differentiable to any order; its gradient is made in the same pass.

        mean(((output - residual) - target)^2)

    With ``residual`` (the block's inputs) what is compared is the residual branch: ``target`` is what the dense block
    adds to its inputs. A 16-bit stream with channels of size 1e3 cannot hold outputs to less than 4, but can hold the
    branch.

    Args:
        output, target, residual: float tensors of one shape, in whatever dtypes; differences and sums are float32
            (float64).

    Returns:
        A scalar, float32 (float64), on their device.

    Raises:
        ValueError: their shapes or devices differ.
    """
    return _loss_and_gradient(output, target, residual)[0]


@torch.no_grad()
def reconstruction_loss_and_gradient(
    output: Tensor, target: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``reconstruction_loss`` and its gradient with respect to ``output``, in its shape, float32 (float64).

    ``output.backward(gradient)`` saves the pass that multiplies the gradient by the loss's own.
    """
    return _loss_and_gradient(output, target, residual)


def _loss_and_gradient(output: Tensor, target: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    for name, other in (("target", target), ("residual", residual)):
        if other is not None and (other.shape != output.shape or other.device != output.device):
            raise ValueError(
                f"reconstruction_loss got a {name} {tuple(other.shape)} on {other.device} and an output "
                f"{tuple(output.shape)} on {output.device}; expected the same of both"
            )
    if is_transformed():
        wide = torch.promote_types(output.dtype, torch.float32)
        difference = output.to(wide) - target.to(wide) - (0.0 if residual is None else residual.to(wide))
        return difference.square().mean(), difference * (2 / max(1, difference.numel()))
    return _OPS.reconstruction_loss(output, target, residual)


def masked_grad_norm(grads: Sequence[Tensor], masks: Sequence[MaskLike | None]) -> Tensor:
    """The L2 norm over all kept gradient entries: a scalar on their device, with no host synchronisation.

    Args:
        grads: float tensors (..., K) on one device.
        masks: a mask for each, or None for a parameter without one.
    """
    words = [words_of(mask, grad, "masked_grad_norm") for mask, grad in zip(masks, grads, strict=True)]
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
    exp_avg_scales: Sequence[Tensor] | None = None,
    exp_avg_sq_scales: Sequence[Tensor] | None = None,
    masters: Sequence[Tensor] | None = None,
    row_offsets: Sequence[Tensor] | None = None,
    stochastic: bool = False,
    seed: int = 0,
    param_ids: Sequence[int] | None = None,
    zero_grads: bool = False,
) -> None:
    """One AdamW step (arXiv 1711.05101, algorithm 2) on kept weights, in place; pruned ones and their moments become 0.

    docs/layouts.md has the layouts of the states; an entry that a parameter does not need is an empty tensor.

    Args:
        params: float tensors (..., K) on one device.
        grads: of the same shapes and dtypes.
        exp_avgs, exp_avg_sqs: the moments, dense or compact; float32 (float64), bfloat16, or 8-bit codes.
        masks: a mask for each, or None for a parameter without one.
        step: number of this step, from 1.
        grad_scale: scalar tensor that multiplies the gradients (a clip factor, 1 / loss scale), on their device.
        exp_avg_scales, exp_avg_sq_scales: float32 scales of 8-bit codes, one for 256 stored entries.
        masters: float32 weights of 16-bit parameters, stored as the moments are.
        row_offsets: int64 (rows + 1) of ``PackedMask.row_offsets()``: the states of that parameter are compact.
        stochastic: round bfloat16 parameters stochastically, by ``seed``, ``step``, ``param_ids`` and place.
        zero_grads: set the gradients to 0 in the same pass.

    Raises:
        ValueError: shapes, dtypes or lengths do not fit each other.
    """

    def or_empty(tensors: Sequence[Tensor] | None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.empty(0, dtype=dtype, device=p.device) for p in params] if tensors is None else list(tensors)

    adamw = AdamWStep(
        params=list(params),
        grads=list(grads),
        exp_avgs=list(exp_avgs),
        exp_avg_sqs=list(exp_avg_sqs),
        exp_avg_scales=or_empty(exp_avg_scales),
        exp_avg_sq_scales=or_empty(exp_avg_sq_scales),
        masters=or_empty(masters),
        words=[],  # made of the masks below
        row_offsets=or_empty(row_offsets, torch.int64),
        grad_scale=grad_scale,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        step=step,
        stochastic=stochastic,
        seed=seed,
        param_ids=list(param_ids or range(len(params))),
        zero_grads=zero_grads,
    )
    lengths = [len(of) for of in (*adamw.written, masks, adamw.row_offsets, adamw.param_ids)]
    if len(set(lengths)) != 1:
        given = ", ".join(map(str, lengths))
        raise ValueError(f"masked_adamw_step got lists of {given}; expected equal lengths")
    words = [words_of(mask, param, "masked_adamw_step") for mask, param in zip(masks, params, strict=True)]
    take_step(adamw._replace(words=words))


def take_step(adamw: AdamWStep) -> None:
    """The op ``masked_adamw_step``, on lists of equal lengths.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other.
    """
    for param, grad, *states in zip(*adamw.written, strict=True):
        if grad.shape != param.shape or grad.dtype != param.dtype:
            raise ValueError(
                f"masked_adamw_step got a gradient {grad.dtype} {tuple(grad.shape)} for a parameter {param.dtype} "
                f"{tuple(param.shape)}; expected the same"
            )
        for state in (grad, *states):
            if state.device != param.device:
                raise ValueError(
                    f"masked_adamw_step got a state on {state.device}; expected {param.device}, the parameter's"
                )
    _check_states(adamw)
    _OPS.masked_adamw_step(*adamw)


def take_step_on_product(dy: Tensor, x: Tensor, adamw: AdamWStep) -> None:
    """The op ``masked_dw_adamw_step``: a step of one parameter (N, K) on the gradient dy^T x, which need never be
    written.

    Args:
        dy, x: (..., N) and (..., K), of one dtype; the parameter's may be another, as under autocast.
        adamw: of that parameter, without a gradient.

    Raises:
        ValueError: shapes or dtypes do not fit each other.
    """
    (param,), rows = adamw.params, (dy.shape[:-1].numel(), x.shape[:-1].numel())
    if param.shape != (dy.shape[-1], x.shape[-1]) or rows[0] != rows[1] or dy.dtype != x.dtype:
        raise ValueError(
            f"masked_dw_adamw_step got dy {dy.dtype} {tuple(dy.shape)} and x {x.dtype} {tuple(x.shape)} for a parameter"
            f" {tuple(param.shape)}; expected (..., N), (..., K), (N, K), and one dtype"
        )
    _check_states(adamw)
    _OPS.masked_dw_adamw_step(dy, x, *adamw)


def _check_states(adamw: AdamWStep) -> None:
    if adamw.step < 1:
        raise ValueError(f"masked_adamw_step got step {adamw.step}; expected at least 1")
    states = (adamw.exp_avgs, adamw.exp_avg_sqs, adamw.exp_avg_scales, adamw.exp_avg_sq_scales, adamw.masters)
    for param, rows, m, v, m_scale, v_scale, master in zip(adamw.params, adamw.row_offsets, *states, strict=True):
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        kinds = {(wide, wide), (torch.bfloat16, torch.bfloat16), (torch.int8, torch.uint8)}
        if (m.dtype, v.dtype) not in kinds:
            given = f"moments {m.dtype} and {v.dtype}"
            raise ValueError(
                f"masked_adamw_step got {given}; expected {wide}, torch.bfloat16, or torch.int8 and torch.uint8"
            )
        stored = m.numel() if rows.numel() else param.numel()
        scales = -(-stored // QUANTIZED_BLOCK) if m.dtype == torch.int8 else 0
        for name, state, expected in (
            ("first moments", m, stored),
            ("second moments", v, stored),
            ("scales of the first moments", m_scale, scales),
            ("scales of the second moments", v_scale, scales),
            ("master weights", master, stored if master.numel() else 0),
        ):
            if state.numel() != expected:
                raise ValueError(f"masked_adamw_step got {state.numel()} {name}; expected {expected}")


def words_of(mask: MaskLike | None, weight: Tensor, who: str) -> Tensor:
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
