"""The ops ``ebft_kernels::…``: schema, fake, and the kernel in torch that runs everywhere.

Which kernel runs (this file's, a Triton or a native one) is chosen in ``dispatch.py``; derivatives are in
``derivatives.py``. Arguments are checked in ``functional.py``, ``mask.py`` and ``optim.py``: an op itself trusts its
caller.

Long, because it is the list of all ops.
"""

from __future__ import annotations

import functools
from typing import Any, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from ebft_kernels import reference, sparse_reference
from ebft_kernels.adamw import WRITTEN, AdamWStep
from ebft_kernels.reference import SCALE_GROUP, WORD_BITS

NAMESPACE = "ebft_kernels"
_OPS = torch.ops.ebft_kernels
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def _fields_of_a_step() -> str:
    """``AdamWStep`` as a schema has it. The step's number is symbolic: what is compiled serves the next step too."""
    kinds: dict[Any, str] = {
        list[Tensor]: "Tensor[]", Tensor | None: "Tensor?", float: "float", int: "int", bool: "bool", list[int]: "int[]"
    }  # fmt: skip
    fields = {name: kinds[hint] for name, hint in get_type_hints(AdamWStep).items()} | {"step": "SymInt"}
    for name, letter in zip(list(fields)[:WRITTEN], "abcdefg", strict=True):
        fields[name] = f"Tensor({letter}!)[]"
    return ", ".join(f"{kind} {name}" for name, kind in fields.items())


_WALKS = "Tensor columns, Tensor offsets, Tensor back_columns, Tensor back_offsets"
SCHEMAS = {  # no defaults: what the default kernel is not told, an autograd formula would not be told either
    "pack_mask": "(Tensor mask) -> Tensor",
    "unpack_mask": "(Tensor words, SymInt width) -> Tensor",
    "topk_mask": "(Tensor scores, SymInt k) -> Tensor",
    "nm_mask": "(Tensor scores, int n, int m) -> Tensor",
    "is_nm": "(Tensor words, SymInt width, int n, int m) -> Tensor",
    "row_offsets": "(Tensor words) -> Tensor",
    "zero_pruned": "(Tensor tensor, Tensor words) -> Tensor",
    "zero_pruned_": "(Tensor(a!) tensor, Tensor words) -> ()",
    "masked_linear": "(Tensor x, Tensor weight, Tensor words, Tensor? bias, bool zeroed) -> Tensor",
    "masked_linear_dx": "(Tensor dy, Tensor weight, Tensor words, bool zeroed) -> Tensor",
    "masked_linear_dw": "(Tensor dy, Tensor x, Tensor words) -> Tensor",
    "compressed_linear": (
        "(Tensor x, Tensor words, Tensor values, Tensor row_offsets, Tensor? scales, Tensor? bias, SymInt width) "
        "-> Tensor"
    ),
    "decompress": "(Tensor words, Tensor values, Tensor row_offsets, Tensor? scales, SymInt width) -> Tensor",
    "gather_kept": "(Tensor tensor, Tensor words, Tensor row_offsets) -> Tensor",
    "sparse_linear": f"(Tensor x, Tensor values, {_WALKS}, Tensor? bias, SymInt width) -> Tensor",
    "sparse_linear_dx": f"(Tensor dy, Tensor values, {_WALKS}, SymInt width) -> Tensor",
    "sparse_linear_dw": f"(Tensor dy, Tensor x, {_WALKS}) -> Tensor",
    "reconstruction_loss": "(Tensor output, Tensor target, Tensor? residual) -> (Tensor loss, Tensor gradient)",
    "masked_grad_norm": "(Tensor[] grads, Tensor[] words) -> Tensor",
    "masked_adamw_step": f"({_fields_of_a_step()}) -> ()",
    "masked_dw_adamw_step": f"(Tensor dy, Tensor x, {_fields_of_a_step()}) -> ()",
}
# Their kernels in Python take an AdamWStep in place of its fields, which are the op's last arguments.
OF_A_STEP = ("masked_adamw_step", "masked_dw_adamw_step")
# What csrc/ has kernels for.
NATIVE = tuple(
    name
    for name in SCHEMAS
    if not name.startswith(("masked_linear", "masked_dw", "reconstruction_loss")) and name != "zero_pruned"
)

for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)
    if _name in NATIVE:
        LIBRARY.define(f"{_name}.native{_schema}")

# torch's own fallback for negated views takes it for granted that an op that writes to a tensor also returns one, and
# else writes before the stack of arguments. So the kernels see the view, and refuse it. (Lists of views torch refuses.)
for _name in ("zero_pruned_", "zero_pruned_.native"):
    LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Negative")


def words_in(width: int) -> int:
    """How many 32-bit words hold the mask of a row of ``width`` weights."""
    return -(-width // WORD_BITS)


# --- the kernels in torch -----------------------------------------------------------------------------------------
# Masks are applied to floats by a bitwise AND with 0 or ~0: exact zeros over NaN and infinity, and on a CPU
# much faster than masked_fill (docs/measured.md).


def pack_mask(mask: Tensor) -> Tensor:
    width = mask.shape[-1]
    padded = F.pad(mask, (0, words_in(width) * WORD_BITS - width)).contiguous()
    # Eight bools seen as one int64; the product gathers their low bits, byte i's into bit i, in the top byte.
    octets = padded.view(torch.int64) * 0x0102040810204080 >> 56
    return octets.to(torch.uint8).view(torch.int32)


def unpack_mask(words: Tensor, width: int) -> Tensor:
    octets = words.contiguous().view(torch.uint8)
    spread = _octet_table(words.device).index_select(0, octets.flatten().int())
    return spread.view(torch.bool).view(*words.shape[:-1], words.shape[-1] * WORD_BITS)[..., :width].contiguous()


def topk_mask(scores: Tensor, k: int) -> Tensor:
    if k == 0 or scores.numel() == 0:
        return pack_mask(torch.zeros(scores.shape, dtype=torch.bool, device=scores.device))
    keys = _ordered(scores)
    least = keys.kthvalue(keys.shape[-1] - k + 1, dim=-1, keepdim=True).values  # of the kept ones: no sort
    above, equal = keys > least, keys == least
    left = k - above.sum(-1, keepdim=True)  # of the equal ones, those further left
    return pack_mask(above | (equal & (equal.cumsum(-1) <= left)))


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    groups = scores.reshape(*scores.shape[:-1], scores.shape[-1] // m, m)
    order = _ordered(groups).argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device)
    mask.scatter_(-1, order[..., :n], torch.ones_like(order[..., :n], dtype=torch.bool))
    return pack_mask(mask.reshape(scores.shape))


def _ordered(scores: Tensor) -> Tensor:
    """Integers in the order of the scores: NaN highest, -0 equal to +0."""
    wide = scores.double() if scores.dtype == torch.float64 else scores.float()
    bits = _as_int((wide + 0.0).contiguous())  # -0 + 0 is +0
    top = torch.iinfo(bits.dtype).max
    return torch.where(wide.isnan(), top, torch.where(bits < 0, bits ^ top, bits))


def is_nm(words: Tensor, width: int, n: int, m: int) -> Tensor:
    groups = unpack_mask(words, width).reshape(*words.shape[:-1], width // m, m)
    return (groups.sum(-1) <= n).all()


def masked_linear(x: Tensor, weight: Tensor, words: Tensor, bias: Tensor | None = None, zeroed: bool = False) -> Tensor:
    return F.linear(x, weight if zeroed else _OPS.zero_pruned(weight, words), bias)


def masked_linear_dx(dy: Tensor, weight: Tensor, words: Tensor, zeroed: bool = False) -> Tensor:
    return dy @ (weight if zeroed else _OPS.zero_pruned(weight, words))


def masked_linear_dw(dy: Tensor, x: Tensor, words: Tensor) -> Tensor:
    return _OPS.zero_pruned(dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1]), words)


def decompress(words: Tensor, values: Tensor, row_offsets: Tensor, scales: Tensor | None, width: int) -> Tensor:
    if words.device.type == "cpu":  # elsewhere it would wait for the device; the layer's own check has been there
        reference.check_compressed(words, values, row_offsets, scales, width)
    dense = torch.zeros((words.shape[0], width), dtype=values.dtype, device=values.device)
    dense.masked_scatter_(unpack_mask(words, width), values)
    if scales is None:
        return dense
    return dense.float() * scales.repeat_interleave(SCALE_GROUP, dim=1)[:, :width]


def compressed_linear(
    x: Tensor,
    words: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    width: int,
) -> Tensor:
    weight = decompress(words, values, row_offsets, scales, width).to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def gather_kept(tensor: Tensor, words: Tensor, row_offsets: Tensor) -> Tensor:
    return tensor[unpack_mask(words, tensor.shape[-1])]


# Without kernels that skip zeros they are dense products.
sparse_linear = sparse_reference.sparse_linear
sparse_linear_dx = sparse_reference.sparse_linear_dx
sparse_linear_dw = sparse_reference.sparse_linear_dw


def reconstruction_loss(output: Tensor, target: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    output = reference.wide(output)
    if residual is not None:
        output = output - residual.to(output.dtype)
    target = target.to(output.dtype)
    mean = 1  # the reduction's number
    gradient = torch.ops.aten.mse_loss_backward(output.new_ones(()), output, target, mean)
    return F.mse_loss(output, target), gradient


def masked_grad_norm(grads: list[Tensor], words: list[Tensor]) -> Tensor:
    wide = _wide(grads[0])
    norms = []
    for grad, mask in zip(grads, words, strict=True):  # one at a time: a masked copy is as large as the gradient
        kept = zero_pruned(grad, mask) if mask.numel() else grad
        norms.append(torch.linalg.vector_norm(kept, dtype=wide))
    return torch.linalg.vector_norm(torch.stack(norms))


def row_offsets(words: Tensor) -> Tensor:
    counts = unpack_mask(words, words.shape[-1] * WORD_BITS).sum(-1).flatten()
    return F.pad(counts.cumsum(0), (1, 0))


def masked_adamw_step(adamw: AdamWStep) -> None:
    for n, tensors in enumerate(zip(*adamw.tensors, strict=True)):
        param, grad, exp_avg, exp_avg_sq, exp_avg_scale, _, master, words, rows = tensors
        packed = any(state.numel() for state in (exp_avg_scale, master))
        plain = param.dtype in (torch.float32, torch.float64) and exp_avg.dtype == param.dtype
        if packed or adamw.stochastic or not plain:
            reference.masked_adamw_step(adamw.only(n))
            continue
        if rows.numel():  # the step of dense states, spread out for it: another arithmetic would give other bits
            kept = unpack_mask(words, param.shape[-1])
            m, v = (torch.zeros_like(param).masked_scatter_(kept, state) for state in (exp_avg, exp_avg_sq))
            _fused_step(param, grad, m, v, words, adamw)
            for state, dense in ((exp_avg, m), (exp_avg_sq, v)):
                state.copy_(dense[kept].view_as(state))
        else:
            _fused_step(param, grad, exp_avg, exp_avg_sq, words, adamw)
        if adamw.zero_grads:
            grad.zero_()


def masked_dw_adamw_step(dy: Tensor, x: Tensor, adamw: AdamWStep) -> None:
    (param,), (words,) = adamw.params, adamw.words
    grad = _OPS.masked_linear_dw(dy, x, words).to(param.dtype)
    _OPS.masked_adamw_step(*adamw._replace(grads=[grad], zero_grads=False))


def _fused_step(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, words: Tensor, adamw: AdamWStep
) -> None:
    """torch's fused step between two masks, for states in the parameter's shape and dtype."""
    # It takes every tensor for contiguous, whatever its strides.
    w, m, v = (t.contiguous() for t in (param, exp_avg, exp_avg_sq))
    bits = _kept_bits(words, param) if words.numel() else None
    g = grad.contiguous()
    if bits is not None:
        g = (_as_int(g) & bits).view(g.dtype)
    if adamw.grad_scale is not None:
        g = g * adamw.grad_scale
    torch_adamw(
        [w],
        [g],
        [m],
        [v],
        [],
        [torch.full((), adamw.step - 1.0, device=w.device)],  # it counts the step itself
        fused=True,
        amsgrad=False,
        maximize=False,
        lr=adamw.lr,
        beta1=adamw.beta1,
        beta2=adamw.beta2,
        eps=adamw.eps,
        weight_decay=adamw.weight_decay,
    )
    for given, used in ((param, w), (exp_avg, m), (exp_avg_sq, v)):
        if bits is not None:
            _as_int(used).bitwise_and_(bits)
        if used is not given:
            given.copy_(used)


def zero_pruned(tensor: Tensor, words: Tensor) -> Tensor:
    return (_as_int(tensor) & _kept_bits(words, tensor)).view(tensor.dtype)


def zero_pruned_(tensor: Tensor, words: Tensor) -> None:
    bits = _as_int(tensor)
    # On a GPU asking would be a synchronisation.
    if tensor.device.type != "cpu" or (_OPS.pack_mask(bits != 0) & ~words).any():
        bits.bitwise_and_(_kept_bits(words, tensor))


def _kept_bits(words: Tensor, like: Tensor) -> Tensor:
    """Integers as wide as ``like``'s elements: all ones where kept, 0 where pruned."""
    return unpack_mask(words, like.shape[-1]).to(_INTEGERS[like.element_size()]).neg_()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _as_int(tensor: Tensor) -> Tensor:
    return tensor.view(_INTEGERS[tensor.element_size()])


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@functools.cache
def _octet_table(device: torch.device) -> Tensor:
    """int64 (256,): entry b holds the eight bits of b as eight bytes of 0 or 1, the lowest first."""
    bits = torch.arange(256).unsqueeze(-1) >> torch.arange(8) & 1
    return bits.to(torch.uint8).view(torch.int64).flatten().to(device)


TORCH_KERNELS = {name: globals()[name] for name in SCHEMAS}


# --- fakes: shapes and dtypes without values ------------------------------------------------------------------------


def _fake_words(mask: Tensor, *_: Any) -> Tensor:
    return mask.new_empty((*mask.shape[:-1], words_in(mask.shape[-1])), dtype=torch.int32)


FAKES = {
    "pack_mask": _fake_words,
    "topk_mask": _fake_words,
    "nm_mask": _fake_words,
    "unpack_mask": lambda words, width: words.new_empty((*words.shape[:-1], width), dtype=torch.bool),
    "zero_pruned": lambda tensor, words: tensor.new_empty(tensor.shape),
    "zero_pruned_": lambda tensor, words: None,
    "is_nm": lambda words, width, n, m: words.new_empty((), dtype=torch.bool),
    "masked_linear": lambda x, weight, words, bias=None, zeroed=False: x.new_empty((*x.shape[:-1], weight.shape[0])),
    "masked_linear_dx": lambda dy, weight, words, zeroed=False: dy.new_empty((*dy.shape[:-1], weight.shape[1])),
    "masked_linear_dw": lambda dy, x, words: x.new_empty((dy.shape[-1], x.shape[-1])),
    "compressed_linear": lambda x, words, *rest: x.new_empty((*x.shape[:-1], words.shape[0])),
    "decompress": lambda words, values, row_offsets, scales, width: values.new_empty(
        (words.shape[0], width), dtype=torch.float32 if scales is not None else values.dtype
    ),
    "gather_kept": lambda tensor, words, row_offsets: tensor.new_empty(torch.library.get_ctx().new_dynamic_size()),
    "sparse_linear": lambda x, values, columns, offsets, back_columns, back_offsets, bias, width: x.new_empty(
        (*x.shape[:-1], (offsets.shape[0] - 1) // -(-width // sparse_reference.SPARSE_CHUNK))
    ),
    "sparse_linear_dx": lambda dy, *rest: dy.new_empty((*dy.shape[:-1], rest[-1])),
    "sparse_linear_dw": lambda dy, x, columns, *rest: x.new_empty(columns.shape),
    "reconstruction_loss": lambda output, target, residual=None: (
        output.new_empty((), dtype=_wide(output)),
        torch.empty_like(output, dtype=_wide(output)),
    ),
    "masked_grad_norm": lambda grads, words: grads[0].new_empty((), dtype=_wide(grads[0])),
    "row_offsets": lambda words: words.new_empty((words.shape[:-1].numel() + 1,), dtype=torch.int64),
    "masked_adamw_step": lambda *args, **kwargs: None,
    "masked_dw_adamw_step": lambda *args, **kwargs: None,
}
for _name, _fake in FAKES.items():
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=LIBRARY)
