"""The kernels' microbenchmarks, once for ``benchmarks/gpu_report.py`` and once for ``pytest benchmarks``.

A case has contenders that do the same work; ``validate`` holds their results against each other before any is timed.
For each, the least bytes or the FLOPs of the work say what the floor is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebft_kernels import CompressedLinear, MaskedAdamW, PackedMask, explain, reconstruction_loss_and_gradient, use_impl
from ebft_kernels.testing import ADAMW_LAYOUTS, one_adamw_step

OPS = torch.ops.ebft_kernels
SHAPES = {
    "full": [(4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (4001, 4099)],
    "toy": [(48, 64), (33, 65)],
}
TOKENS = {"full": (8192, 512, 16, 1), "toy": (16, 1)}
SPARSITIES = (0.5, 0.7, "2:4")
RECIPE: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
Contender = Callable[[], Any]


@dataclass(frozen=True)
class Prepared:
    """A case with its tensors.

    Attributes:
        contenders: name -> what is timed.
        validate: raises AssertionError where a contender is wrong.
        flops: of one call.
        bytes: name -> bytes that a contender must move at least.
    """

    contenders: dict[str, Contender]
    validate: Callable[[], None]
    flops: float = 0.0
    bytes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A microbenchmark that is not prepared yet."""

    group: str
    name: str
    prepare: Callable[[], Prepared]


def cases(size: str, device: torch.device, dtype: torch.dtype, compiled: bool) -> Iterator[Case]:
    """All cases, the most important ones first. ``compiled``: torch.compile takes part."""
    shapes = SHAPES[size]
    for weights, moments, compact in sorted(ADAMW_LAYOUTS, key=lambda layout: layout not in _FIRST):
        name = f"{weights} weights, {moments} moments" + (", survivors only" if compact else "")
        yield Case("AdamW", name, partial(adamw, shapes[0], device, weights, moments, compact))
    for shape in shapes:
        yield Case(
            "dW + AdamW",
            f"{shape}, {TOKENS[size][0]} tokens",
            partial(gradient_step, shape, TOKENS[size][0], device, dtype),
        )
    for tokens in TOKENS[size]:
        for shape in shapes:
            for sparsity in SPARSITIES if shape == shapes[0] else SPARSITIES[:1]:
                for product in ("forward", "dx", "dW"):
                    yield Case(
                        f"linear {product}", f"{shape}, {tokens} tokens, sparsity {sparsity}",
                        partial(linear, product, shape, tokens, sparsity, device, dtype, compiled),
                    )  # fmt: skip
    for rows in (1, 4, 8):
        for sparsity in (0.5, 0.7):
            yield Case(
                f"compressed linear at {sparsity:.0%}", f"{shapes[1]}, {rows} rows",
                partial(compressed, shapes[1], rows, sparsity, device, dtype),
            )  # fmt: skip
    for name, make in (
        ("pack", pack),
        ("unpack", unpack),
        ("2:4 select", select),
        ("2:4 check", check),
        ("row offsets", offsets),
    ):
        yield Case("masks", name, partial(make, shapes[0], device, dtype))
    yield Case("loss", "mean squared error and gradient", partial(loss, (TOKENS[size][0], shapes[0][0]), device, dtype))


_FIRST = [
    ("fp32", "fp32", False),
    ("master", "fp32", True),
    ("stochastic", "bf16", False),
    ("stochastic", "int8", True),
]


def mask_of(shape: tuple[int, int], sparsity: float | str, device: torch.device) -> Tensor:
    """A random bool mask; 2:4 leaves a ragged width's last columns kept."""
    scores = torch.rand(shape, device=device, generator=torch.Generator(device).manual_seed(0))
    if not isinstance(sparsity, str):
        return scores >= sparsity
    width = shape[1] // 4 * 4
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    mask[:, :width] = PackedMask.from_scores(scores[:, :width].contiguous(), 2, 4).dense()
    return mask


def randn(*shape: int, device: torch.device, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(*shape, device=device, generator=torch.Generator(device).manual_seed(seed)).to(dtype)


def forced(impl: str, run: Contender) -> Contender:
    """``run`` with an implementation forced."""

    def inside() -> Any:
        with use_impl(impl):
            return run()

    return inside


def has(impl: str, op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an implementation can run ``op`` here."""
    try:
        with use_impl(impl):
            explain(op, device, dtype)
    except RuntimeError:
        return False
    return True


# --- products -------------------------------------------------------------------------------------------------------


def linear(
    product: str,
    shape: tuple[int, int],
    tokens: int,
    sparsity: float | str,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool,
) -> Prepared:
    """One of the three products: plain on the zeroed weight, mask multiplied in, both compiled, and ours."""
    (n, k), packed = shape, PackedMask.from_dense(mask_of(shape, sparsity, device))
    words, factor = packed.words, packed.dense().to(dtype)
    dense = randn(n, k, device=device, dtype=dtype)
    zeroed = dense * factor
    x, dy = randn(tokens, k, device=device, dtype=dtype), randn(tokens, n, device=device, dtype=dtype, seed=2)
    plain, multiplied, ours = {
        "forward": (
            lambda: F.linear(x, zeroed),
            lambda: F.linear(x, dense * factor),
            lambda: OPS.masked_linear(x, dense, words, None, False),
        ),
        "dx": (
            lambda: dy @ zeroed,
            lambda: dy @ (dense * factor),
            lambda: OPS.masked_linear_dx(dy, dense, words, False),
        ),
        "dW": (lambda: dy.T @ x, lambda: (dy.T @ x) * factor, lambda: OPS.masked_linear_dw(dy, x, words)),
    }[product]
    contenders: dict[str, Contender] = {"torch, no mask in the product": plain, "torch, mask multiplied": multiplied}
    if compiled:
        contenders["torch.compile, no mask in the product"] = torch.compile(plain)
        contenders["torch.compile, mask multiplied"] = torch.compile(multiplied)
    contenders["ours, as chosen"] = ours
    if has("triton", "masked_linear", device, dtype):
        contenders["ours, Triton"] = forced("triton", ours)

    def validate() -> None:
        operands = {"forward": (x, zeroed.T), "dx": (dy, zeroed), "dW": (dy.T, x)}[product]
        truth = (operands[0].double() @ operands[1].double()) * (factor.double() if product == "dW" else 1)
        for name, run in contenders.items():
            got = run() * (factor if product == "dW" and "no mask" in name else 1)
            error = (got.double() - truth).abs().max()
            assert error <= 4 * torch.finfo(dtype).eps * truth.abs().max() + 1e-4, f"{name} errs by {error}"

    moved = (x.nbytes + dy.nbytes + dense.nbytes) + words.nbytes
    return Prepared(contenders, validate, 2.0 * tokens * n * k, dict.fromkeys(contenders, float(moved)))


def compressed(
    shape: tuple[int, int], rows: int, sparsity: float, device: torch.device, dtype: torch.dtype
) -> Prepared:
    """A layer without its zeros on few rows of x, against ``F.linear`` on the dense-stored one."""
    weight = randn(*shape, device=device, dtype=dtype) * mask_of(shape, sparsity, device)
    layer = CompressedLinear.from_weight(weight, weight != 0)
    x = randn(rows, shape[1], device=device, dtype=dtype)

    @torch.no_grad()
    def ours() -> Tensor:
        return layer(x)

    def validate() -> None:
        truth = x.double() @ weight.double().T
        error, torchs = ((y.double() - truth).abs().max() for y in (ours(), F.linear(x, weight)))
        assert error <= 1.5 * torchs + 1e-6, f"errs by {error}, torch by {torchs}"

    moved = x.nbytes + rows * shape[0] * dtype.itemsize
    least = {"F.linear": float(moved + weight.nbytes), "ours": float(moved + layer.nbytes())}
    return Prepared(
        {"F.linear": lambda: F.linear(x, weight), "ours": ours}, validate, 2.0 * rows * weight.numel(), least
    )


# --- AdamW ----------------------------------------------------------------------------------------------------------

WIDTH = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0 + 4 / 256}  # bytes of a stored moment


def must_move(weights: str, moments: str, compact: bool, sparsity: float) -> float:
    """Bytes a weight: parameter read and written, gradient read, the mask bit, stored states read and written."""
    stored = 1 - sparsity if compact else 1.0
    states = 4 * WIDTH[moments] + (8 if weights == "master" else 0)
    return 3 * (4 if weights == "fp32" else 2) + 1 / 8 + stored * states


def adamw(
    shape: tuple[int, int], device: torch.device, weights: str, moments: str, compact: bool, sparsity: float = 0.5
) -> Prepared:
    """A step in one layout, against torch's fused step and the mask multiply (and torchao's 8-bit one if installed)."""
    mask = mask_of(shape, sparsity, device)
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    start = randn(*shape, device=device, dtype=dtype) * mask
    gradient = randn(*shape, device=device, dtype=dtype, seed=2)

    def parameter(kind: torch.dtype) -> nn.Parameter:
        made = nn.Parameter(start.to(kind).clone())
        made.grad = gradient.to(kind)
        return made

    mine, theirs = parameter(dtype), parameter(torch.float32)
    ours = MaskedAdamW([mine], masks={mine: mask}, weights=weights, moments=moments, compact=compact, **RECIPE)
    fused, factor = torch.optim.AdamW([theirs], fused=True, **RECIPE), mask.float()

    @torch.no_grad()
    def torch_step() -> None:
        fused.step()
        theirs.mul_(factor)

    contenders: dict[str, Contender] = {"torch.optim.AdamW(fused=True) + mask, fp32": torch_step, "ours": ours.step}
    in_cuda = device.type == "cuda" and compact and moments == "fp32" and weights != "stochastic"
    if in_cuda and has("native", "masked_adamw_step", device, dtype):
        contenders["ours, CUDA C++"] = forced("native", ours.step)
    if moments == "int8" and find_spec("torchao"):
        from torchao.optim import AdamW8bit

        small = parameter(dtype)
        eight = AdamW8bit([small], **RECIPE)

        @torch.no_grad()
        def torchao_step() -> None:
            eight.step()
            small.mul_(mask)

        contenders["torchao AdamW8bit + mask"] = torchao_step

    def validate() -> None:
        for step in (ours.step, torch_step):
            step()
        moved = (mine.float() - theirs)[mask].abs().max()
        unit = 0.0 if weights == "fp32" else 2.0**-7 * float(start.abs().max())
        assert moved <= unit + 2 * RECIPE["lr"] * {"fp32": 1e-2, "bf16": 2e-2, "int8": 0.1}[moments], (
            f"differs by {moved}"
        )
        assert torch.count_nonzero(mine[~mask]) == 0

    each, numel = must_move(weights, moments, compact, sparsity), shape[0] * shape[1]
    return Prepared(
        contenders, validate, bytes={"ours": numel * each, "torch.optim.AdamW(fused=True) + mask, fp32": numel * 28.125}
    )


def gradient_step(shape: tuple[int, int], tokens: int, device: torch.device, dtype: torch.dtype) -> Prepared:
    """Weight gradient and step: in one op, and as torch's product followed by our step."""
    (n, k), mask = shape, mask_of(shape, 0.5, device)
    x, dy = randn(tokens, k, device=device, dtype=dtype), randn(tokens, n, device=device, dtype=dtype, seed=2)
    start = (randn(n, k, device=device, dtype=dtype) * mask).to(dtype)
    m, v = (torch.zeros(shape, device=device) for _ in range(2))
    fields = {"masters": start.float(), "words": PackedMask.from_dense(mask).words}
    step = one_adamw_step(start, None, m, v, **fields, lr=1e-4, step=1)
    one, other = step.each(torch.clone), step.each(torch.clone)

    def together() -> None:
        OPS.masked_dw_adamw_step(dy, x, *one)

    def apart() -> None:
        OPS.masked_adamw_step(*other._replace(grads=[dy.T @ x]))

    def validate() -> None:
        together()
        apart()
        torch.testing.assert_close(one.params[0], other.params[0], rtol=2e-2, atol=1e-3)
        assert torch.count_nonzero(one.params[0][~mask]) == 0

    return Prepared({"torch's product, then the step": apart, "ours, in one": together}, validate, 2.0 * tokens * n * k)


# --- masks and loss -------------------------------------------------------------------------------------------------


def against_torch(run: Contender, moved: float, equal: Callable[[Any, Any], bool] = torch.equal) -> Prepared:
    """An op as it is chosen, against the same in torch."""
    contenders = {"torch": forced("torch", run), "ours": run}

    def validate() -> None:
        assert equal(contenders["torch"](), run()), "the results differ"

    return Prepared(contenders, validate, bytes=dict.fromkeys(contenders, moved))


def pack(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Prepared:
    mask = mask_of(shape, 0.5, device)
    return against_torch(lambda: OPS.pack_mask(mask), mask.numel() * 9 / 8)


def unpack(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Prepared:
    words = PackedMask.from_dense(mask_of(shape, 0.5, device)).words
    return against_torch(lambda: OPS.unpack_mask(words, shape[1]), shape[0] * shape[1] * 9 / 8)


def select(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Prepared:
    scores = randn(*shape, device=device, dtype=torch.float32).abs()
    return against_torch(lambda: OPS.nm_mask(scores, 2, 4), scores.nbytes + scores.numel() / 8)


def check(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Prepared:
    words = PackedMask.from_dense(mask_of(shape, "2:4", device)).words
    return against_torch(lambda: OPS.is_nm(words, shape[1], 2, 4), words.nbytes)


def offsets(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Prepared:
    words = PackedMask.from_dense(mask_of(shape, 0.5, device)).words
    return against_torch(lambda: OPS.row_offsets(words), words.nbytes)


def loss(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Prepared:
    output = randn(*shape, device=device, dtype=dtype).requires_grad_()
    target = randn(*shape, device=device, dtype=torch.float32, seed=2)

    def ours() -> Tensor:
        return reconstruction_loss_and_gradient(output, target)[1].to(dtype)

    def torchs() -> Tensor:
        return torch.autograd.grad(F.mse_loss(output.float(), target), output)[0]

    def validate() -> None:
        torch.testing.assert_close(ours(), torchs())

    moved = output.numel() * (2 * dtype.itemsize + 4.0)
    return Prepared({"F.mse_loss": torchs, "ours": ours}, validate, bytes={"F.mse_loss": moved, "ours": moved})
