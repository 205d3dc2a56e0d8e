"""Hostile inputs for every native op: an error or the reference's answer; never a crash, never an unwritten output.

A case is a valid call of an op and up to three changes of its arguments: other shapes, dtypes, strides, devices,
storages that are too short, words, offsets and scalars of any kind. Tensors end where a page begins that nobody may
touch, and memory that torch gives out is poisoned.

    python tests/native/hostile.py --cases 1000 [--seed N] [--last FILE]    EBFT_CPU=avx2|plain: the lesser code paths
    python tests/native/hostile.py --replay "Case('decompress', 3, 40, 7, (('values', 'freed', 0),))"

A crash ends the process: its case is in FILE. ``test_hostile.py`` runs it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import mmap
import random
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from ebft_kernels import reference, sparse_reference
from ebft_kernels._extension import native_reason
from ebft_kernels.adamw import AdamWStep
from ebft_kernels.mask import PackedMask
from ebft_kernels.ops import NATIVE, OF_A_STEP
from ebft_kernels.places import Places
from ebft_kernels.testing import ADAMW_LAYOUTS, MASK_KINDS, make_mask, one_adamw_step, poisoned

OPS = torch.ops.ebft_kernels
PRODUCTS = ("sparse_linear", "sparse_linear_dx", "sparse_linear_dw")
IN_PLACE = ("masked_adamw_step", "zero_pruned_")
# How an op says no. Anything else that it raises is a fault.
REFUSALS = (ValueError, RuntimeError, IndexError, NotImplementedError)


class Case(NamedTuple):
    """A call of ``op`` on a weight ``rows`` x ``width``, and what is changed in it: (argument, how, number)."""

    op: str
    rows: int
    width: int
    seed: int
    changes: tuple[tuple[str, str, int], ...]


# --- valid calls ----------------------------------------------------------------------------------------------------


def valid_call(case: Case) -> dict[str, object]:
    """Argument -> value, in the order of the op's schema."""
    generator, dice = torch.Generator().manual_seed(case.seed), random.Random(case.seed)
    rows, width = case.rows, case.width

    def floats(*shape, dtype=None):
        return torch.randn(shape, generator=generator).to(dtype or dice.choice(FLOATS))

    def mask_of(rows=rows, width=width):
        return make_mask(dice.choice(MASK_KINDS), rows, width, generator)

    if case.op == "pack_mask":
        return {"mask": mask_of()}
    words = reference.pack_mask(mask_of())
    if case.op == "unpack_mask":
        return {"words": words, "width": width}
    if case.op == "row_offsets":
        return {"words": words}
    if case.op == "zero_pruned_":
        return {"tensor": floats(rows, width), "words": words}
    if case.op == "topk_mask":
        return {"scores": floats(rows, width), "k": dice.randint(0, width)}
    m = dice.choice([m for m in (1, 2, 3, 4, 8, 32, width) if width % m == 0])
    if case.op == "nm_mask":
        return {"scores": floats(rows, width).round(), "n": dice.randint(1, m), "m": m}
    if case.op == "is_nm":
        return {"words": words, "width": width, "n": dice.randint(1, m), "m": m}
    if case.op == "masked_grad_norm":
        grads = [floats(rows, width), floats(dice.randint(1, 9000)), floats()]
        none = torch.empty(0, dtype=torch.int32)
        return {"grads": grads, "words": [words, none, none]}
    if case.op == "masked_adamw_step":
        return adamw_call(dice, floats, mask_of)
    if case.op == "gather_kept":
        tensor = floats(rows, width, dtype=torch.float32)
        return {"tensor": tensor, "words": words, "row_offsets": reference.row_offsets(words)}
    if case.op in PRODUCTS:
        return product_call(case.op, dice, floats, mask_of(max(1, rows)))
    int8 = dice.random() < 0.3
    dtype = torch.float32 if int8 else dice.choice(FLOATS)
    values, scales = reference.compress(floats(rows, width, dtype=dtype), words, int8)
    stored = {"words": words, "values": values, "row_offsets": reference.row_offsets(words), "scales": scales}
    if case.op == "decompress":
        return {**stored, "width": width}
    x = floats(*dice.choice([(), (0,), (3,), (2, 4), (17,)]), width)
    return {"x": x, **stored, "bias": dice.choice([None, floats(rows)]), "width": width}


def product_call(op, dice, floats, mask):
    places = Places.of(PackedMask.from_dense(mask))
    walks = {**places.walk._asdict(), **{f"back_{name}": of for name, of in places.back._asdict().items()}}
    lead, (rows, width) = dice.choice([(), (0,), (3,), (2, 4), (67,), (130,)]), mask.shape
    x, dy, bias = (floats(*shape, dtype=torch.float32) for shape in ((*lead, width), (*lead, rows), (rows,)))
    values = floats(int(mask.sum()), dtype=torch.float32)
    if op == "sparse_linear":
        return {"x": x, "values": values, **walks, "bias": dice.choice([None, bias]), "width": width}
    if op == "sparse_linear_dx":
        return {"dy": dy, "values": values, **walks, "width": width}
    return {"dy": dy, "x": x, **walks}


def adamw_call(dice, floats, mask_of):
    weights, moments, compact = dice.choice(ADAMW_LAYOUTS)
    dtype = {"fp32": torch.float32, "stochastic": torch.bfloat16}.get(weights) or dice.choice(FLOATS[1:])
    steps = []
    for masked in (True, False):
        mask = mask_of() if masked else torch.ones(dice.randint(1, 700), dtype=torch.bool)
        param, grad = (floats(*mask.shape, dtype=dtype) for _ in range(2))
        stored, fields = mask if masked and compact else torch.ones_like(mask), {}
        if masked:
            fields["words"] = reference.pack_mask(mask)
            if compact:
                fields["row_offsets"] = reference.row_offsets(fields["words"])
        m = (floats(*mask.shape, dtype=torch.float32) * mask)[stored]
        v = (floats(*mask.shape, dtype=torch.float32).square() * mask)[stored]
        if weights == "master":
            fields["masters"] = param.float()[stored]
        if moments == "int8":
            m, fields["exp_avg_scales"] = reference.quantize(m, True)
            v, fields["exp_avg_sq_scales"] = reference.quantize(v, False)
        elif moments == "bf16":
            m, v = m.bfloat16(), v.bfloat16()
        steps.append(one_adamw_step(param, grad, m, v, **fields))
    one, two = steps
    lists = [of + and_of for of, and_of in zip(one.tensors, two.tensors, strict=True)]
    settings = {"beta2": 0.99, "step": dice.randint(1, 9), "stochastic": weights == "stochastic"}
    settings |= {"seed": dice.getrandbits(62), "param_ids": [3, 5]}
    settings |= {"grad_scale": dice.choice([None, torch.tensor(0.25)]), "zero_grads": dice.random() < 0.5}
    return one.with_tensors(lists)._replace(**settings)._asdict()


# --- changes --------------------------------------------------------------------------------------------------------

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64)
INTS = (0, 1, -1, 2, 3, 31, 32, 33, 64, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63), -(2**31))
REALS = (0.0, 1.0, -1.0, 0.5, 1e-300, 1e38, -1e38, 1e300, float("inf"), -float("inf"), float("nan"))


def with_element(t, number, value):
    """A copy in which one element is ``value(element)``."""
    t = t.clone(memory_format=torch.contiguous_format)
    if t.numel():
        flat = t.view(-1)
        flat[number % t.numel()] = value(flat[number % t.numel()])
    return t


def with_bit(t, number):
    """A copy in which one bit is another one."""
    t = t.clone(memory_format=torch.contiguous_format)
    if t.numel():
        octets = t.view(-1).view(torch.uint8)
        octets[number // 8 % len(octets)] ^= 1 if t.dtype == torch.bool else 1 << number % 8
    return t


def with_padding(t, number):
    """Mask words with a bit set in the last word of a row, past the end as a rule."""
    t = t.clone(memory_format=torch.contiguous_format)
    if t.numel() and t.ndim and t.dtype == torch.int32:
        t.view(-1, t.shape[-1])[number % (t.numel() // t.shape[-1]), -1] |= -(2**31) >> number % 4
    return t


def extreme(t, number):
    """The number-th extreme value that ``t`` can hold."""
    if t.dtype == torch.bool:
        return bool(number % 2)
    if t.dtype.is_floating_point or t.dtype.is_complex:
        real = REALS[number % len(REALS)]
        return math.copysign(math.inf, real) if torch.finfo(t.dtype).max < abs(real) else real
    info = torch.iinfo(t.dtype)
    return (0, 1, info.max, info.min, info.max // 2)[number % 5]


def shortened(t, number):
    """Its storage ends before it does."""
    t = t.clone()
    t.untyped_storage().resize_(number % max(1, t.numel() * t.element_size()))
    return t


CHANGES = {
    "dtype": lambda t, n: t.to(DTYPES[n % len(DTYPES)]),
    "transposed": lambda t, n: t.transpose(0, -1).contiguous().transpose(0, -1) if t.ndim > 1 else t,
    "strided": lambda t, n: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t, n: t[:1].expand(t.shape) if t.ndim and len(t) else t,
    "offset": lambda t, n: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) if t.numel() else t,
    "longer": lambda t, n: torch.cat([t, t[:1]]) if t.ndim else t[None],
    "shorter": lambda t, n: t[:-1] if t.ndim else t.new_empty(0),
    "wider": lambda t, n: torch.cat([t, t[..., :1]], -1) if t.ndim else t[None],
    "narrower": lambda t, n: t[..., :-1].contiguous() if t.ndim else t,
    "flat": lambda t, n: t.flatten(),
    "deeper": lambda t, n: t[None],
    "column": lambda t, n: t[..., None].contiguous(),
    "empty": lambda t, n: t[:0] if t.ndim and n % 2 else t.new_empty(0),
    "vast and empty": lambda t, n: t.new_empty((0, 2**62) if n % 2 else (2**62, 0)),
    "scalar": lambda t, n: t.flatten()[0] if t.numel() else t.new_zeros(()),
    "negated": lambda t, n: torch._neg_view(t) if t.dtype.is_floating_point else t,
    "bit": with_bit,
    "padding": with_padding,
    "element": lambda t, n: with_element(t, n // 16, lambda _: extreme(t, n % 16)),
    "one more": lambda t, n: with_element(t, n, lambda e: e + 1),
    "one less": lambda t, n: with_element(t, n, lambda e: ~e if t.dtype == torch.bool else e - 1),
    "filled": lambda t, n: torch.full_like(t, extreme(t, n)),
    "reversed": lambda t, n: t.flip(0) if t.ndim else t,
    # what must be refused:
    "freed": lambda t, n: shortened(t, 0),
    "short": shortened,
    "meta": lambda t, n: t.to("meta"),
    "sparse": lambda t, n: t.to_sparse(),
}
NOT_THERE = ("freed", "short", "meta", "sparse")
OF_LISTS = ("dropped", "doubled", "none at all")


def changed(value, how, number):
    """An argument after a change; as it was where that has no meaning for it."""
    if isinstance(value, torch.Tensor):
        if how not in CHANGES or (how in NOT_THERE and value.numel() == 0):
            return value
        try:
            return CHANGES[how](value, number)
        except RuntimeError:  # torch itself cannot make it of a tensor that an earlier change has made vast
            return value
    if isinstance(value, list) and how in OF_LISTS:
        return {"dropped": value[:-1], "doubled": value + value[-1:], "none at all": []}[how]
    if isinstance(value, list) and value:
        place = number % len(value)
        return [changed(one, how, number // len(value)) if n == place else one for n, one in enumerate(value)]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + (1, -1)[number % 2] if number % 3 else INTS[number // 3 % len(INTS)]
    return REALS[number % len(REALS)] if isinstance(value, float) else value


# --- what is run ----------------------------------------------------------------------------------------------------

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)


def guarded(t):
    """A copy of a plain tensor between two pages that nobody may touch: it ends where the second begins."""
    if not (t.layout == torch.strided and t.device.type == "cpu" and t.is_contiguous() and not t.is_neg()):
        return t
    size = t.numel() * t.element_size()
    if not 0 < size <= t.untyped_storage().nbytes():
        return t
    pages = -(-size // PAGE)
    room = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    copy = torch.frombuffer(room, dtype=t.dtype, count=t.numel(), offset=(pages + 1) * PAGE - size).view(t.shape)
    copy.copy_(t)
    for page in (start, start + (pages + 1) * PAGE):
        if LIBC.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    return copy


def each(values, do):
    """``do`` to every tensor among arguments."""
    if isinstance(values, torch.Tensor):
        return do(values)
    return [each(value, do) for value in values] if isinstance(values, list) else values


def outcome(call, arguments):
    """What a call gives, or the error that it raises."""
    try:
        return call(*arguments)
    except (*REFUSALS, TypeError, ArithmeticError) as error:
        return error


def check(case: Case) -> str:
    """Run a case; "answered" or "refused". AssertionError: neither, or the wrong one."""
    call = valid_call(case)
    gone = False
    last = [change for change in case.changes if change[1] in NOT_THERE][:1]  # torch itself could not go on from there
    for name, how, number in [change for change in case.changes if change[1] not in NOT_THERE] + last:
        before = call[name]
        call[name] = changed(before, how, number)
        gone = gone or (how in NOT_THERE and memory_of(before) != memory_of(call[name]))
    arguments = [each(value, guarded) for value in call.values()]
    kept = None if gone else [each(value, lambda t: t.clone()) for value in arguments]
    got = outcome(getattr(OPS, case.op).native, arguments)
    if isinstance(got, Exception):
        assert isinstance(got, REFUSALS), f"{case} raised {got!r}"
        assert case.changes, f"{case} is valid and was refused: {got}"
        assert gone or case.op not in IN_PLACE or same(arguments, kept), (
            f"{case} was refused and changed something: {got}"
        )
        return "refused"
    assert not gone, f"{case} was answered without memory to read"
    compare(case, got, arguments, kept)
    return "answered"


def memory_of(value):
    """Where tensors lie, and how many bytes they have there; None for what is no tensor."""
    if isinstance(value, torch.Tensor):
        return value.device.type, value.layout, value.layout == torch.strided and value.untyped_storage().nbytes()
    return [memory_of(one) for one in value] if isinstance(value, list) else None


def reference_of(op):
    return getattr(sparse_reference if op in PRODUCTS else reference, op)


def compare(case, got, arguments, kept):
    """The answer of the native kernel, and that of the reference on the arguments as they were."""
    if case.op in (*PRODUCTS, "compressed_linear", "masked_grad_norm"):  # sums in another order: held against float64
        widened = [each(value, lambda t: t.double() if t.dtype in FLOATS else t) for value in kept]
        if case.op == "compressed_linear":
            widened[4] = kept[4]  # scales are float32
        true = outcome(reference_of(case.op), widened)
    else:
        true = outcome(reference_of(case.op), [AdamWStep(*kept)] if case.op in OF_A_STEP else kept)
    if isinstance(true, Exception) and isinstance(got, torch.Tensor) and got.numel() == 0:
        return  # an answer without a number in it cannot be wrong
    assert not isinstance(true, Exception), f"{case} was answered; the reference: {true!r}"
    if case.op == "zero_pruned_":
        assert same(arguments, kept), f"{case}: other weights than the reference"
    elif case.op == "masked_adamw_step":
        for lists in (arguments, kept):
            forget_codes(lists)
        assert same(arguments, kept), f"{case}: other weights or states than the reference"
    elif case.op in (*PRODUCTS, "compressed_linear"):
        assert (got.shape, got.dtype) == (true.shape, arguments[0].dtype), case
        numbers = (torch.int8, torch.float32, torch.float64)
        terms = [of.abs() if isinstance(of, torch.Tensor) and of.dtype in numbers else of for of in widened]
        bound = reference_of(case.op)(*terms)
        limit = torch.finfo(got.dtype)
        sane = bound < min(limit.max / 2, 1e37)  # beyond, sums overflow in one order and not in another
        allowed = limit.eps * true.abs() + 1e-5 * bound + limit.tiny + 1e-30
        assert ((got.double() - true).abs() <= allowed)[sane].all(), f"{case}: {got} for {true}"
    elif case.op == "masked_grad_norm":
        if float(true) < 1e18:  # squares are of float32
            assert abs(float(got) - float(true)) <= 1e-5 * float(true) + 1e-18, f"{case}: {got} for {true}"
    else:
        assert same([got], [true]), f"{case}: {got} for {true}"


def forget_codes(lists):
    """Of blocks whose scale is infinity or NaN: what is stored there is lost, and the scale says it."""
    for states, scales in (lists[2:6:2], lists[3:6:2]):
        for codes, scale in zip(states, scales, strict=True):
            if scale.numel():
                lost = ~scale.isfinite().repeat_interleave(reference.QUANTIZED_BLOCK)[: codes.numel()]
                codes.view(-1)[lost] = 0


def same(ours, theirs):
    """Equal shapes, dtypes and values, NaN for NaN, in everything that is a tensor."""
    if isinstance(ours, torch.Tensor):
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            return False
        return bool(torch.eq(ours, theirs).logical_or((ours != ours) & (theirs != theirs)).all())
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return True


def cases() -> st.SearchStrategy[Case]:
    """Cases of all native ops."""
    hows = st.sampled_from((*CHANGES, *OF_LISTS))

    def of(op):
        names = st.sampled_from([argument.name for argument in getattr(OPS, op).native._schema.arguments])
        change = st.tuples(names, hows, st.integers(0, 2**16))
        sizes = (st.integers(0, 70), st.one_of(st.integers(1, 70), st.integers(1, 1100)))
        return st.builds(Case, st.just(op), *sizes, st.integers(0, 2**31), st.lists(change, max_size=3).map(tuple))

    return st.sampled_from(NATIVE).flatmap(of)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--last", type=Path, help="is told each case before it runs")
    parser.add_argument("--replay", help="a case, as it was printed")
    given_ = parser.parse_args()
    reason = native_reason()
    if reason is not None:
        raise SystemExit(reason)
    if given_.replay:
        with poisoned():
            print(check(eval(given_.replay, {"Case": Case})))
        return
    outcomes: dict[str, Counter[str]] = {op: Counter() for op in NATIVE}

    @given(cases())
    @seed(given_.seed)
    @settings(max_examples=given_.cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def run(case):
        if given_.last:
            given_.last.write_text(f"{case!r}\n")
        outcomes[case.op][check(case)] += 1

    with poisoned():
        run()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
