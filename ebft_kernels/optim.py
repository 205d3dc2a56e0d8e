"""``MaskedAdamW``: AdamW that never moves a pruned weight from exactly zero."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ebft_kernels.functional import masked_adamw_step, masked_grad_norm
from ebft_kernels.mask import MaskLike, PackedMask, as_packed, masks_of
from ebft_kernels.zeroed import mark_zeroed


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) on the kept weights; pruned ones are exactly zero from the start and after every step.

    On kept weights it does what ``torch.optim.AdamW`` does, to rounding. The gradients may be anything, NaN included,
    where pruned. Parameters without a mask may be present.

    Args:
        params: parameters or parameter groups, float32 or float64.
        lr, betas, eps, weight_decay: as for ``torch.optim.AdamW``.
        masks: parameter -> PackedMask or bool mask of its shape (1 / True = kept).

    Raises:
        ValueError: a setting is out of range, or a mask has another shape or belongs to no parameter given.
        TypeError: a parameter is neither float32 nor float64.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        masks: Mapping[Tensor, MaskLike] | None = None,
    ) -> None:
        for name, value, most in (
            ("lr", lr, None), ("eps", eps, None), ("weight_decay", weight_decay, None),
            ("betas[0]", betas[0], 1.0), ("betas[1]", betas[1], 1.0),
        ):  # fmt: skip
            if not 0 <= value < (most or float("inf")):
                raise ValueError(
                    f"MaskedAdamW got {name} = {value}; expected at least 0 and less than {most or 'infinity'}"
                )
        self._grad_scale: Tensor | None = None
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        for param, mask in (masks or {}).items():
            self.set_mask_(param, mask)

    @classmethod
    def for_module(cls, module: nn.Module, **settings: Any) -> MaskedAdamW:
        """For all parameters of ``module`` that require gradients, with the masks of its ``MaskedLinear`` layers."""
        params = {name: p for name, p in module.named_parameters() if p.requires_grad}
        masks = {params[name]: mask for name, mask in masks_of(module).items() if name in params}
        return cls(params.values(), masks=masks, **settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer``'s, with the dtypes checked."""
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"MaskedAdamW got a parameter of {param.dtype}; expected torch.float32 or torch.float64"
                )

    def mask_of(self, param: Tensor) -> PackedMask | None:
        """The mask of a parameter, or None."""
        words = self.state[param].get("mask") if param in self.state else None
        return None if words is None else PackedMask(words, param.shape)

    @torch.no_grad()
    def set_mask_(self, param: Tensor, mask: MaskLike) -> None:
        """Take ``mask`` for ``param`` from now on: survivors keep their moments, newcomers start at zero."""
        packed = as_packed(mask).to(param.device)
        if all(param is not p for p in self._params()):
            raise ValueError(
                f"MaskedAdamW got a mask for a tensor {tuple(param.shape)} that is not among its parameters"
            )
        if packed.shape != param.shape:
            raise ValueError(
                f"MaskedAdamW got a mask {tuple(packed.shape)}; expected {tuple(param.shape)}, the parameter's shape"
            )
        state = self.state[param]
        state["mask"] = packed.words
        for tensor in (param, *(state[key] for key in _MOMENTS if key in state)):
            packed.zero_pruned_(tensor)
        mark_zeroed(param, packed.words)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the next step's gradients so that their L2 norm over all kept entries is at most ``max_norm``.

        The factor stays on the device and goes into the next step; ``.grad`` is not touched.

        Returns:
            The norm before, a scalar on the gradients' device (no synchronisation).
        """
        with_grad = [p for p in self._params() if p.grad is not None]
        if not with_grad:
            return torch.zeros(())
        norm = masked_grad_norm([p.grad for p in with_grad], [self.mask_of(p) for p in with_grad])
        self._grad_scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient; gives ``closure``'s loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for step, params in self._advance(group):
                states = [self.state[p] for p in params]
                masked_adamw_step(
                    params,
                    [p.grad for p in params],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [self.mask_of(p) for p in params],
                    lr=float(group["lr"]),
                    step=step,
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    grad_scale=self._grad_scale,
                )
                for p in params:
                    if "mask" in self.state[p]:
                        mark_zeroed(p, self.state[p]["mask"])
        self._grad_scale = None
        return loss

    def _advance(self, group: dict[str, Any]) -> Iterable[tuple[int, list[Tensor]]]:
        """Count the step of every parameter with a gradient; gives those that one call of the op can take together."""
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            state = self.state[p]
            if "step" not in state:
                state["step"] = 0
                for key in _MOMENTS:
                    state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["step"] += 1

        def together(p: Tensor) -> tuple[Any, ...]:
            return (self.state[p]["step"], str(p.device), str(p.dtype))

        for (step, *_), alike in itertools.groupby(sorted(params, key=together), key=together):
            yield step, list(alike)

    def _params(self) -> Iterable[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer``'s; a clip factor that no step has used goes with the gradients."""
        super().zero_grad(set_to_none)
        self._grad_scale = None

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over settings, moments and masks; the state of a plain ``torch.optim.AdamW`` is taken too.

        A parameter for which ``state_dict`` has no mask keeps the one it has. Pruned weights and moments are zeroed.
        """
        masks = {p: self.mask_of(p) for p in self._params()}
        super().load_state_dict(
            state_dict
        )  # checks the groups; but casts all that a state holds to the parameter's dtype
        for number, param in enumerate(self._params()):
            saved = state_dict["state"].get(number, {})
            state = {key: v.to(param.device) if isinstance(v, Tensor) else v for key, v in saved.items()}
            if "step" in state:
                state["step"] = int(state["step"])
            self.state[param] = state
            mask = PackedMask(state["mask"], param.shape) if "mask" in state else masks[param]
            if mask is not None:
                self.set_mask_(param, mask)


_MOMENTS = ("exp_avg", "exp_avg_sq")
