"""``MaskedLinear``: an ``nn.Linear`` whose pruned weights take no part, and helpers that put it into models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ebft_kernels.functional import masked_linear
from ebft_kernels.mask import MaskLike, PackedMask, as_packed
from ebft_kernels.zeroed import is_zeroed, mark_zeroed


class MaskedLinear(nn.Linear):
    """y = x (M * W)^T + b; an ``nn.Linear`` to whoever looks at it, with the same state-dict keys.

    The mask is kept as one bit a weight in the buffer ``mask_words``, which is not in the state dict
    (``ebft_kernels.save_masks`` keeps masks). The weight's gradient is exactly zero where pruned. While the weight is
    known to hold zeros there (after ``from_linear``, ``apply_mask_``, ``load_state_dict`` and every ``MaskedAdamW``
    step) the products run on it as it is; after any other change, and under ``torch.compile``, the mask takes part in
    them. A write through ``weight.data`` is not seen: call ``apply_mask_()`` after it.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        mask: PackedMask or bool (out_features, in_features), 1 / True = kept; by default everything is kept.
    """

    mask_words: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        mask: MaskLike | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._hold(PackedMask.ones(self.weight.shape, self.weight.device) if mask is None else mask)
        self.apply_mask_()

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: MaskLike) -> MaskedLinear:
        """A masked layer on the very parameters of ``linear``; their pruned weights are set to zero."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.train(linear.training)
        layer._hold(mask)
        return layer.apply_mask_()

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` on the same parameters, with zeros in the weight where pruned."""
        self.apply_mask_()
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    @property
    def mask(self) -> PackedMask:
        """The mask, in the weight's shape."""
        return PackedMask(self.mask_words, self.weight.shape)

    def set_mask_(self, mask: MaskLike) -> MaskedLinear:
        """Take another mask. The weight is left as it is: newly kept places hold what stands there.

        An optimizer that holds the old mask has to be told too (``MaskedAdamW.set_mask_``).
        """
        self._hold(mask)
        return self

    def apply_mask_(self) -> MaskedLinear:
        """Set the pruned weights to exactly zero."""
        self.mask.zero_pruned_(self.weight)
        mark_zeroed(self.weight, self.mask_words)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """``masked_linear`` of (..., in_features), with the mask left out where the weight is known to hold zeros."""
        zeroed = not torch.compiler.is_compiling() and is_zeroed(self.weight, self.mask_words)
        return masked_linear(input, self.weight, self.mask, self.bias, zeroed=zeroed)

    def extra_repr(self) -> str:
        """That of ``nn.Linear``, with the sparsity."""
        density = "" if self.mask_words.is_meta else f", sparsity={1 - self.mask.density():.3f}"
        return super().extra_repr() + density

    def _hold(self, mask: MaskLike) -> None:
        packed = as_packed(mask)
        if packed.shape != self.weight.shape:
            raise ValueError(
                f"MaskedLinear got a mask {tuple(packed.shape)}; expected the weight's shape {tuple(self.weight.shape)}"
            )
        self.register_buffer("mask_words", packed.to(self.weight.device).words, persistent=False)

    # --- what else changes a weight: loading, moving, copying ---------------------------------------------------

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if local_metadata.get("assign_to_params_buffers", False):  # the caller's own tensor, which is not ours to zero
            self.weight: nn.Parameter = nn.Parameter(self.weight.detach().clone(), self.weight.requires_grad)
        self.apply_mask_()

    def _apply(self, fn: Any, recurse: bool = True) -> MaskedLinear:
        zeroed, words = is_zeroed(self.weight, self.mask_words), self.mask_words
        super()._apply(fn, recurse)
        if not words.is_meta:  # not by ``fn``: ``to_empty`` would leave garbage, and no state dict brings it back
            self.mask_words = words.to(self.weight.device)
        return self.apply_mask_() if zeroed else self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zeroed": is_zeroed(self.weight, self.mask_words)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        zeroed = state.pop("_zeroed")
        super().__setstate__(state)
        if zeroed:
            mark_zeroed(self.weight, self.mask_words)


def mask_linears_(module: nn.Module, masks: Mapping[str, MaskLike]) -> nn.Module:
    """Replace linear layers inside ``module`` by ``MaskedLinear`` ones on the same parameters; gives ``module``.

    Args:
        module: anything that holds ``nn.Linear`` layers (or masked ones, which get the new mask).
        masks: weight name as in ``module.state_dict()`` (``"layers.0.q_proj.weight"``) -> mask of the weight's shape.

    Raises:
        ValueError: a name is not the weight of a linear layer inside ``module``, or a shape does not fit; nothing has
            been replaced then.
    """
    packed, layers = {name: as_packed(mask) for name, mask in masks.items()}, dict(module.named_modules())
    for name, mask in packed.items():
        path, _, last = name.rpartition(".")
        layer = layers.get(path)
        if last != "weight" or not path or type(layer) not in (nn.Linear, MaskedLinear):
            found = type(layer).__name__ if layer is not None and path else "nothing"
            raise ValueError(
                f"mask_linears_ got {name!r}, where {found} is; expected the weight of an nn.Linear inside"
            )
        if mask.shape != layer.weight.shape:  # type: ignore[union-attr]
            raise ValueError(
                f"mask_linears_ got a mask {tuple(mask.shape)} for {name}; expected {tuple(layer.weight.shape)}"  # type: ignore[union-attr]
            )
    for name, mask in packed.items():
        path = name.rpartition(".")[0]
        parent, _, attribute = path.rpartition(".")
        linear = module.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        setattr(module.get_submodule(parent), attribute, MaskedLinear.from_linear(linear, mask))
    return module
