"""``AdamWStep``: what one step of masked AdamW is given, said once.

The op ``masked_adamw_step`` takes the fields in their order, ``masked_dw_adamw_step`` the operands of a gradient and
then the fields. Everything in Python hands the object on; only ``ops.py`` (the schemas) and ``dispatch.py`` (what an op
is called with) look at it as a list of arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from torch import Tensor

TENSORS: Final = 9  # how many fields are lists of tensors: the first
WRITTEN: Final = 7  # how many of these a step writes: the first again


class AdamWStep(NamedTuple):
    """One step on some parameters; ``reference.masked_adamw_step`` says what it does, docs/layouts.md has the layouts.

    Attributes:
        params: float parameters (..., K); 16-bit ones have a master weight or are rounded stochastically.
        grads: of the parameters' shapes and dtypes; read, and then set to 0 if ``zero_grads``. None of them where
            the step makes the gradient itself (``masked_dw_adamw_step``).
        exp_avgs, exp_avg_sqs: m and v, stored as float32 (float64 for float64 parameters), bfloat16, or 8-bit codes
            (int8 for m, uint8 for v; ``reference.quantize``).
        exp_avg_scales, exp_avg_sq_scales: float32 scales of 8-bit codes; empty tensors otherwise.
        masters: float32 weights, stored as the moments are; empty tensors where the parameter itself is the weight.
        words: int32 mask words of each parameter; no words (numel 0) for a parameter without a mask.
        row_offsets: int64 (rows + 1), how many weights are kept before each row: the states are compact; empty: dense.
        grad_scale: scalar tensor that multiplies the gradients (a clip factor, 1 / loss scale), or None.
        lr, beta1, beta2, eps, weight_decay: the hyper-parameters.
        step: number of this step, from 1.
        stochastic: round bfloat16 parameters stochastically, with the bits of ``reference.philox``.
        seed, param_ids: what those bits depend on, with step and place.
        zero_grads: set the gradients to 0 in the same pass.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    exp_avg_scales: list[Tensor]
    exp_avg_sq_scales: list[Tensor]
    masters: list[Tensor]
    words: list[Tensor]
    row_offsets: list[Tensor]
    grad_scale: Tensor | None
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    stochastic: bool
    seed: int
    param_ids: list[int]
    zero_grads: bool

    @property
    def tensors(self) -> tuple[list[Tensor], ...]:
        """The lists of tensors, an entry a parameter: the fields from ``params`` to ``row_offsets``."""
        return self[:TENSORS]

    @property
    def written(self) -> tuple[list[Tensor], ...]:
        """Of these, what a step writes: the fields from ``params`` to ``masters``."""
        return self[:WRITTEN]

    def with_tensors(self, lists: Iterable[list[Tensor]]) -> AdamWStep:
        """The same step with other ``tensors``."""
        fields: dict[str, Any] = dict(zip(self._fields[:TENSORS], lists, strict=True))
        return self._replace(**fields)

    def only(self, n: int) -> AdamWStep:
        """The step of parameter number ``n`` alone."""
        alone = self.with_tensors([of[n]] for of in self.tensors)
        return alone._replace(param_ids=[self.param_ids[n]])

    def each(self, do: Callable[[Tensor], Tensor]) -> AdamWStep:
        """The same step with ``do(tensor)`` in place of each of its tensors."""
        done = self.with_tensors([do(tensor) for tensor in of] for of in self.tensors)
        return done if self.grad_scale is None else done._replace(grad_scale=do(self.grad_scale))
