"""``CompressedLinear``: a pruned linear layer that is stored, and runs, without its zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ebft_kernels import reference
from ebft_kernels.functional import is_transformed
from ebft_kernels.mask import MaskLike, PackedMask, as_packed

_OPS = torch.ops.ebft_kernels
LARGEST_BATCH = 16  # rows of x; above it the weight is expanded and torch multiplies
VALUES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


class CompressedLinear(nn.Module):
    """y = x W^T + b for a pruned W (N, K), kept as one bit a weight and the surviving values (inference).

    The state dict holds ``bitmap`` (int32 words, docs/layouts.md), ``values`` (1-D, row by row), ``scales`` with 8-bit
    values, and ``bias``. Up to 16 rows of x a fused kernel expands the weight in registers; above, it is expanded once
    for the call, and again for the gradient. Gradients flow to x and bias, not to the values.

    Args:
        in_features, out_features: K and N.
        kept: how many weights survive.
        bias: whether there is one.
        values: ``"fp32"``, ``"bf16"``, ``"fp16"``, or ``"int8"`` with a float32 scale for 128 inputs of a row.
        device, dtype: of the bias (default dtype: that of the values, or torch's default with ``"int8"``).
    """

    bitmap: Tensor
    values: Tensor
    scales: Tensor | None
    row_offsets: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kept: int,
        bias: bool = True,
        values: str = "bf16",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if values not in VALUES:
            raise ValueError(f"CompressedLinear got values = {values!r}; expected one of {', '.join(VALUES)}")
        if in_features < 1 or out_features < 0 or not 0 <= kept <= in_features * out_features:
            raise ValueError(
                f"CompressedLinear got {kept} kept weights of {out_features} x {in_features}; expected a matrix of at "
                "least one input, and 0 to all of its weights"
            )
        self.in_features, self.out_features = in_features, out_features
        kind, words = VALUES[values], -(-in_features // reference.WORD_BITS)
        groups = -(-in_features // reference.SCALE_GROUP)
        self.register_buffer("bitmap", torch.zeros(out_features, words, dtype=torch.int32, device=device))
        self.register_buffer("values", torch.zeros(kept, dtype=kind, device=device))
        scales = torch.zeros(out_features, groups, dtype=torch.float32, device=device) if values == "int8" else None
        self.register_buffer("scales", scales)
        self.register_buffer(
            "row_offsets", torch.zeros(out_features + 1, dtype=torch.int64, device=device), persistent=False
        )
        default = torch.get_default_dtype() if values == "int8" else kind
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype or default)) if bias else None

    @classmethod
    def from_masked(
        cls, layer: nn.Linear, mask: MaskLike | None = None, *, values: str | None = None
    ) -> CompressedLinear:
        """The layer without its zeros.

        Args:
            layer: a ``MaskedLinear``, or an ``nn.Linear``, whose pruned weights are taken for zero.
            mask: what is kept; by default the layer's own mask or, for a plain ``nn.Linear``, its non-zero weights.
            values: how survivors are stored; by default in the weight's dtype, and ``to_linear`` is lossless.
        """
        own = getattr(layer, "mask", None)
        packed = (
            as_packed(mask) if mask is not None else own if own is not None else PackedMask.from_nonzero(layer.weight)
        )
        return cls.from_weight(
            layer.weight.detach(), packed, None if layer.bias is None else layer.bias.detach(), values=values
        )

    @classmethod
    def from_weight(
        cls, weight: Tensor, mask: MaskLike, bias: Tensor | None = None, *, values: str | None = None
    ) -> CompressedLinear:
        """As ``from_masked``, from a weight (N, K), its mask and a bias (N,)."""
        packed = as_packed(mask).to(weight.device)
        if packed.shape != weight.shape or weight.ndim != 2:
            raise ValueError(
                f"CompressedLinear got a mask {tuple(packed.shape)} for a weight {tuple(weight.shape)}; expected (N, K)"
            )
        if values is None:
            values = next((name for name, dtype in VALUES.items() if dtype == weight.dtype), None)
            if values is None:
                raise ValueError(
                    f"CompressedLinear got a weight of {weight.dtype}; expected float32, bfloat16 or float16"
                )
        survivors, scales = reference.compress(weight, packed.words, int8=values == "int8")
        layer = cls(
            weight.shape[1], weight.shape[0], survivors.numel(), bias is not None, values, weight.device, weight.dtype
        )
        with torch.no_grad():
            layer.bitmap.copy_(packed.words)
            layer.values.copy_(survivors)
            if layer.scales is not None and scales is not None:
                layer.scales.copy_(scales)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer.index_()

    def index_(self) -> CompressedLinear:
        """Count where each row's values begin, and check the whole layout: after it has been written from outside.

        Raises:
            ValueError: shapes, dtypes or the bits beyond a row's end are not those of ``reference.check_compressed``,
                or the bitmap keeps more or fewer weights than there are values.
        """
        try:
            self.row_offsets = reference.row_offsets(self.bitmap)
            reference.check_compressed(
                self.bitmap, self.values, self.row_offsets, self._float_scales(), self.in_features
            )
        except ValueError as error:
            raise ValueError(f"CompressedLinear {error}") from None
        return self

    def _float_scales(self) -> Tensor | None:
        """As the kernels take them, whatever ``.half()`` and the like made of the layer."""
        return None if self.scales is None else self.scales.float()

    @property
    def mask(self) -> PackedMask:
        """Which weights survive."""
        return PackedMask(self.bitmap, torch.Size((self.out_features, self.in_features)))

    @property
    def qweight(self) -> Tensor:
        """``values``, by the name under which peft looks for the device of a layer without a weight."""
        return self.values

    def dense(self) -> Tensor:
        """The weight (N, K) with its zeros; float32 from 8-bit values."""
        return _OPS.decompress(self.bitmap, self.values, self.row_offsets, self._float_scales(), self.in_features)

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear``: bit for bit what was compressed, unless 8-bit values rounded it."""
        weight = self.dense()
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight if self.bias is None else weight.to(self.bias.dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Of (..., in_features), in x's dtype; float32 sums."""
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"CompressedLinear got x {tuple(x.shape)}; expected (..., {self.in_features})")
        if x.numel() <= LARGEST_BATCH * self.in_features and not is_transformed():
            return _OPS.compressed_linear(
                x, self.bitmap, self.values, self.row_offsets, self._float_scales(), self.bias, self.in_features
            )
        bias = None if self.bias is None else self.bias.to(x.dtype)
        plain = is_transformed() or torch.compiler.is_compiling() or not torch.is_grad_enabled()
        if plain or not (x.requires_grad or (bias is not None and bias.requires_grad)):
            return nn.functional.linear(x, self.dense().to(x.dtype), bias)
        expanded: Tensor = _Expanded.apply(x, bias, self)
        return expanded

    def nbytes(self) -> int:
        """Bytes of bitmap, values and scales, and of the row offsets."""
        return sum(t.nbytes for t in (self.bitmap, self.values, self.scales, self.row_offsets) if t is not None)

    def extra_repr(self) -> str:
        """Sizes, density and how values are stored."""
        density = self.values.numel() / max(1, self.in_features * self.out_features)
        kind = next((name for name, dtype in VALUES.items() if dtype == self.values.dtype), self.values.dtype)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"density={density:.3f}, values={kind}"
        )

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        """As any module, and the layout is checked: ``load_state_dict`` says what is wrong with it."""
        before = len(errors)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if self.bitmap.is_meta or len(errors) > before:
            return
        try:
            self.index_()
        except ValueError as error:
            errors.append(f"{prefix.rstrip('.') or 'the layer'}: {error}")


class _Expanded(torch.autograd.Function):
    """``F.linear`` with the expanded weight, of which nothing is kept until the backward pass expands it anew.

    Whoever trains adapters beside frozen layers would otherwise hold the dense weights of all of them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: CompressedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return nn.functional.linear(x, layer.dense().to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dx = (dy @ ctx.layer.dense().to(dy.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return dx, dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None
