"""Lion and Muon under the mask, as torch optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ebft_kernels import MaskedAdamW, PackedMask, masked_grad_norm

Groups = list[dict[str, Any]]  # torch's parameter groups


class MaskedOptimizer(torch.optim.Optimizer):
    """Pruned weights are exactly zero from the start and after every step; states are float32, as the parameters.

    Args:
        groups: parameter groups, each with its ``weight_decay``, which is decoupled.
        masks: parameter -> kept weights, in the parameter's shape.
    """

    def __init__(
        self, groups: Groups, *, lr: float, betas: tuple[float, float], masks: Mapping[Tensor, PackedMask]
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas})
        self._masks = dict(masks)
        for parameter, mask in self._masks.items():
            mask.zero_pruned_(parameter.detach())

    def mask_of(self, param: Tensor) -> PackedMask | None:
        """The mask of a parameter, or None."""
        return self._masks.get(param)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale gradients so that their L2 norm over kept entries is at most ``max_norm``; gives the norm before."""
        found = [
            (p.grad, self.mask_of(p)) for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        gradients = [gradient for gradient, _ in found]
        norm = masked_grad_norm(gradients, [mask for _, mask in found])
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One step on every parameter that has a gradient, on kept entries alone."""
        assert closure is None
        for parameter, mask in self._masks.items():
            if parameter.grad is not None:
                mask.zero_pruned_(parameter.grad)
        self._move()
        for parameter, mask in self._masks.items():
            mask.zero_pruned_(parameter)

    def forget(self) -> None:
        """Begin anew: no states."""
        self.state.clear()

    def _move(self) -> None:
        raise NotImplementedError


def forget(optimizer: MaskedAdamW | MaskedOptimizer) -> None:
    """An optimizer that begins anew, with no states."""
    if isinstance(optimizer, MaskedOptimizer):
        optimizer.forget()
    else:
        optimizer.state.clear()


class MaskedLion(MaskedOptimizer):
    """Lion (arXiv 2302.06675), the sign of a momentum: with its betas, gradient g and momentum m,

    w <- w - lr (sign(beta_1 m + (1 - beta_1) g) + weight_decay w),   then   m <- beta_2 m + (1 - beta_2) g
    """

    def _move(self) -> None:
        for group in self.param_groups:
            lr, (first, second) = group["lr"], group["betas"]
            for parameter in group["params"]:
                if (gradient := parameter.grad) is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                direction = torch.lerp(gradient, momentum, first).sign_()
                parameter.mul_(1 - lr * group["weight_decay"]).add_(direction, alpha=-lr)
                momentum.lerp_(gradient, 1 - second)


class MaskedMuon(MaskedOptimizer):
    """Muon, as torch has it, on the masked momentum of every matrix that has a mask; AdamW on all other parameters.

    The momentum, beta_1 of ``betas``, is brought near an orthogonal matrix (Newton and Schulz's iteration, five times,
    products in bfloat16), scaled to the root mean square that an AdamW step of the same learning rate has
    (arXiv 2502.16982), and masked. Fused experts are taken one by one.
    """

    def __init__(
        self, groups: Groups, *, lr: float, betas: tuple[float, float], masks: Mapping[Tensor, PackedMask]
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, masks=masks)
        self._matrices = {p: list(p.detach().reshape(-1, *p.shape[-2:])) for p in masks}  # views of it
        inside = [
            {**group, "params": [matrix for p in group["params"] if p in masks for matrix in self._matrices[p]]}
            for group in self.param_groups
        ]
        others = [{**group, "params": [p for p in group["params"] if p not in masks]} for group in self.param_groups]
        self._muon = torch.optim.Muon(inside, lr=lr, momentum=betas[0], adjust_lr_fn="match_rms_adamw")
        self._adamw = MaskedAdamW(others, lr=lr, betas=betas)

    def forget(self) -> None:
        """See ``MaskedOptimizer``."""
        for optimizer in (self._muon, self._adamw):
            optimizer.state.clear()

    def _move(self) -> None:
        for parameter, matrices in self._matrices.items():
            if (gradient := parameter.grad) is not None:
                for matrix, of_matrix in zip(matrices, gradient.reshape(-1, *gradient.shape[-2:]), strict=True):
                    matrix.grad = of_matrix
        for optimizer in (self._muon, self._adamw):
            for ours, inside in zip(self.param_groups, optimizer.param_groups, strict=True):
                inside["lr"] = ours["lr"]
            optimizer.step()
        for matrices in self._matrices.values():
            for matrix in matrices:
                matrix.grad = None
