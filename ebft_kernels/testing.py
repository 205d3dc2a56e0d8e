"""For tests of kernels, here and elsewhere: inputs on ugly shapes, and a tolerance that has a reason.

The rule is that of Cut Cross Entropy: against a float64 truth, a kernel may err no more than twice what plain torch
errs in the same dtype, plus a small constant; so a tolerance is never a number somebody raised until a test passed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebft_kernels.adamw import TENSORS, AdamWStep
from ebft_kernels.reference import (
    masked_linear,
    masked_linear_dw,
    masked_linear_dx,
    pack_mask,
    quantize,
    row_offsets,
)
from ebft_kernels.states import MOMENTS, WEIGHTS

# (tokens, outputs N, inputs K): no multiple of a tile, K no multiple of 8 or 32, one word, one weight, no tokens
UGLY_SHAPES = [
    ((5,), 7, 33),
    ((2, 3), 65, 100),
    ((1,), 1, 1),
    ((4, 1, 3), 31, 32),
    ((17,), 130, 257),
    ((0,), 9, 40),
    ((3, 0), 4, 5),
]
MASK_KINDS = ("random", "all kept", "all pruned", "one empty row", "2:4-like")


@dataclass(frozen=True)
class LinearCase:
    """Inputs of one masked linear layer; ``weight`` is dense: pruned places are not zero."""

    x: Tensor
    weight: Tensor
    mask: Tensor
    bias: Tensor
    dy: Tensor


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody has written holds NaN (the largest value, in integers): what a kernel forgets to write shows.

    This is torch's own switch, and every ``empty`` obeys it, those inside of C++ kernels too.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


def make_mask(kind: str, outputs: int, inputs: int, generator: torch.Generator) -> Tensor:
    """A bool mask (outputs, inputs) of a kind of ``MASK_KINDS``, on the CPU."""
    mask = torch.rand(outputs, inputs, generator=generator) > 0.6
    if kind == "all kept":
        mask.fill_(True)
    elif kind == "all pruned":
        mask.fill_(False)
    elif kind == "one empty row":
        mask[outputs // 2 : outputs // 2 + 1] = False
    elif kind == "2:4-like":
        mask = (torch.arange(inputs) % 4 < 2).expand(outputs, inputs).contiguous()
    elif kind != "random":
        raise ValueError(f"make_mask got kind {kind!r}; expected one of {', '.join(MASK_KINDS)}")
    return mask


def linear_cases(
    dtype: torch.dtype, device: torch.device | str = "cpu", contiguous: bool = True, seed: int = 0
) -> Iterator[tuple[str, LinearCase]]:
    """(name, inputs) for every ugly shape with every kind of mask; not ``contiguous``: strided views."""
    generator = torch.Generator().manual_seed(seed)

    def floats(*shape: int) -> Tensor:
        if contiguous:
            return torch.randn(*shape, generator=generator).to(device, dtype)
        apart = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(device, dtype)
        return apart[..., ::2]

    for lead, outputs, inputs in UGLY_SHAPES:
        for kind in MASK_KINDS:
            mask = make_mask(kind, outputs, inputs, generator).to(device)
            case = LinearCase(
                floats(*lead, inputs), floats(outputs, inputs), mask, floats(outputs), floats(*lead, outputs)
            )
            yield f"{lead}x{inputs}->{outputs}, {kind}", case


# (weights, moments, compact): every layout of MaskedAdamW's states
ADAMW_LAYOUTS = [(w, m, c) for w in WEIGHTS for m in MOMENTS for c in (False, True)]


def adamw_step(
    weights: str,
    moments: str,
    compact: bool,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
    **changes: Any,
) -> AdamWStep:
    """A step in a layout of ``ADAMW_LAYOUTS``, with old states and garbage in pruned places.

    Parameters of ugly shapes, with masks (random, all pruned, all kept, one row empty) and without. ``dtype`` is that
    of the parameters, unless ``weights`` is ``"fp32"``. Gradients span 1e-6 to 1; where pruned they are NaN.
    ``changes`` are fields of the step that are not as usual.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if weights == "fp32" else dtype
    shapes = [((7, 33), "random"), ((5,), None), ((2, 3, 70), "random"), ((1, 600), "random"), ((4, 40), "all pruned")]
    shapes += [((3, 96), "all kept"), ((9, 260), "one empty row"), ((1500,), None), ((40, 300), "random")]
    steps = []
    for shape, kind in shapes:

        def floats(shape: tuple[int, ...] = shape) -> Tensor:
            return torch.randn(shape, generator=generator)

        scale = 10 ** (-6 * torch.rand(shape, generator=generator))
        param, grad, m, v = (
            floats().to(dtype).float(),
            floats() * scale,
            floats() * scale * 0.1,
            (floats() * scale).square(),
        )
        fields, stored = {}, slice(None)
        if kind is not None:
            mask = make_mask(kind, math.prod(shape[:-1]), shape[-1], generator).view(shape)
            fields["words"] = pack_mask(mask)
            grad[~mask], m[~mask], v[~mask] = float("nan"), 0.0, 0.0
            if compact:
                m, v, stored, fields["row_offsets"] = m[mask], v[mask], mask, row_offsets(fields["words"])
        if weights == "master":
            fields["masters"] = param[stored] + 1e-4 * floats()[stored]
        if moments == "int8":
            (m, fields["exp_avg_scales"]), (v, fields["exp_avg_sq_scales"]) = _codes(m, True), _codes(v, False)
        elif moments == "bf16":
            m, v = m.bfloat16(), v.bfloat16()
        steps.append(one_adamw_step(param.to(dtype), grad.to(dtype), m, v, **fields))
    all_of_them = zip(*(step.tensors for step in steps), strict=True)
    whole = steps[0].with_tensors([tensor for (tensor,) in of] for of in all_of_them)
    whole = whole._replace(stochastic=weights == "stochastic", param_ids=list(range(len(steps))))
    return whole.each(lambda tensor: tensor.contiguous().to(device))._replace(**changes)


def one_adamw_step(param: Tensor, grad: Tensor | None, exp_avg: Tensor, exp_avg_sq: Tensor, **fields: Any) -> AdamWStep:
    """A step of one parameter, from single tensors; what is not among ``fields`` is empty or as usual."""
    none = {name: torch.empty(0, device=param.device) for name in AdamWStep._fields[:TENSORS]}
    none["words"], none["row_offsets"] = none["words"].int(), none["row_offsets"].long()
    given = {"params": param, "grads": grad, "exp_avgs": exp_avg, "exp_avg_sqs": exp_avg_sq}
    tensors = {name: fields.pop(name, given.get(name, empty)) for name, empty in none.items()}
    lists: dict[str, Any] = {name: [] if tensor is None else [tensor] for name, tensor in tensors.items()}
    return AdamWStep(**lists, **{**_USUAL, **fields})


_USUAL: dict[str, Any] = {
    "grad_scale": None, "lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 3,
    "stochastic": False, "seed": 2**40 + 17, "param_ids": [0], "zero_grads": False,
}  # fmt: skip


def _codes(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    codes, scales = quantize(values.flatten(), signed)
    return codes.view(values.shape), scales


def check_linear(run: Callable[[Tensor, Tensor, Tensor], Tensor], case: LinearCase, what: str = "") -> None:
    """A masked linear layer, ``run(x, weight, bias)``, and its gradients against the reference in float64.

    They may err no more than torch's own product of the multiplied weight; the weight gradient is exactly 0 where
    pruned.
    """

    def with_gradients(layer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (case.x, case.weight, case.bias)]
        y = layer(*leaves)
        return (y, *torch.autograd.grad(y, leaves, case.dy))

    got = with_gradients(run)
    plain = with_gradients(lambda x, weight, bias: torch.nn.functional.linear(x, weight * case.mask, bias))
    x, weight, dy, words = case.x.double(), case.weight.double(), case.dy.double(), pack_mask(case.mask)
    truth = (
        masked_linear(x, weight, words, case.bias.double()),
        masked_linear_dx(dy, weight, words),
        masked_linear_dw(dy, x, words),
        dy.reshape(-1, dy.shape[-1]).sum(0),
    )
    for part, mine, torchs, true in zip(("y", "dx", "dW", "db"), got, plain, truth, strict=True):
        assert_no_worse_than_torch(mine, torchs, true, what=f"{what}: {part}")
    assert_exact_zeros(got[2], case.mask, what)


def assert_no_worse_than_torch(
    got: Tensor, torch_result: Tensor, truth: Tensor, slack: float = 2.0, what: str = ""
) -> None:
    """``got`` errs against the float64 ``truth`` at most ``slack`` times as much as torch's result, plus rounding.

    Errors are largest absolute ones. "Rounding" is 4 units in the last place at the truth's largest value, so that a
    torch result which happens to be exact does not make every other summation order a failure.
    """
    if got.shape != truth.shape or got.dtype != torch_result.dtype:
        given = f"{got.dtype} {tuple(got.shape)}"
        raise AssertionError(f"{what}: got {given}, expected {torch_result.dtype} {tuple(truth.shape)}")
    truth = truth.detach().double()
    if truth.numel() == 0:
        return
    if not torch.isfinite(got).all():
        raise AssertionError(f"{what}: the result holds NaN or infinity")
    error, torch_error = (float((t.detach().double() - truth).abs().max()) for t in (got, torch_result))
    allowed = slack * torch_error + 4 * torch.finfo(got.dtype).eps * float(truth.abs().max())
    if error > allowed:
        raise AssertionError(f"{what}: errs by {error:.3g}, torch by {torch_error:.3g}; allowed is {allowed:.3g}")


def assert_exact_zeros(tensor: Tensor, mask: Tensor, what: str = "") -> None:
    """``tensor`` is exactly +0 or -0 wherever ``mask`` (bool, of its shape) prunes."""
    wrong = (tensor.detach()[~mask.to(tensor.device)] != 0).sum()  # NaN != 0 is true
    if wrong:
        raise AssertionError(f"{what}: {int(wrong)} pruned entries are not zero")
