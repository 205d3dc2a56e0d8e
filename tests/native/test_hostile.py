"""What no kernel may do, whatever it is given: crash, read past an end, return what nobody wrote.

``EBFT_FUZZ_CASES=5000 pytest tests/native/test_hostile.py -k inputs`` tries more.
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hostile
import pytest
import torch

from ebft_kernels import CompressedLinear, PackedMask, reference
from ebft_kernels._extension import native_reason
from ebft_kernels.ops import NATIVE, TORCH_KERNELS
from ebft_kernels.testing import poisoned

OPS = torch.ops.ebft_kernels
HERE = Path(__file__).parent
CASES = int(os.environ.get("EBFT_FUZZ_CASES", "250"))


@pytest.fixture(scope="module", autouse=True)
def _built():
    """As in test_native.py."""
    assert native_reason() is None


def run_hostile(*arguments, path="best", code=None):
    """A process of its own: a crash ends that one."""
    command = [sys.executable, "-c", code] if code else [sys.executable, str(HERE / "hostile.py")]
    return subprocess.run(
        [*command, *map(str, arguments)],
        env={**os.environ, "EBFT_CPU": path, "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), str(HERE)])},
        capture_output=True, text=True, timeout=3600, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("path", ["best", "avx2", "plain"])
def test_hostile_inputs_are_refused_or_answered_rightly(path, tmp_path):
    done = run_hostile("--cases", CASES, "--last", tmp_path / "case", path=path)
    if done.returncode:
        raise AssertionError(f"ended with {done.returncode} on {(tmp_path / 'case').read_text()}{done.stderr[-4000:]}")
    outcomes = json.loads(done.stdout.splitlines()[-1])
    total = sum((Counter(of_one) for of_one in outcomes.values()), Counter())
    assert outcomes.keys() == set(NATIVE)
    assert total["answered"] + total["refused"] >= CASES
    assert min(total["answered"], total["refused"]) > CASES / 10


# --- the net itself holds -------------------------------------------------------------------------------------------


def test_reading_past_a_tensor_ends_the_process_and_its_case_is_known(tmp_path):
    case = "Case('row_offsets', 3, 40, 1, ())"
    code = (
        "import ctypes, sys, hostile\n"
        "def check(case):\n"
        "    words = hostile.guarded(hostile.valid_call(case)['words'])\n"
        "    ctypes.string_at(words.data_ptr() + words.nbytes - 1, 1)  # its last byte may be read\n"
        "    ctypes.string_at(words.data_ptr() + words.nbytes, 1)\n"
        "hostile.check = check\n"
        f"hostile.cases = lambda: hostile.st.just(hostile.{case})\n"
        "hostile.main()\n"
    )
    done = run_hostile("--cases", 1, "--last", tmp_path / "case", code=code)
    assert done.returncode == -signal.SIGSEGV
    assert eval((tmp_path / "case").read_text(), {"Case": hostile.Case}) == eval(case, {"Case": hostile.Case})


def test_a_guarded_tensor_is_the_same_tensor():
    for t in (torch.randn(3, 5), torch.randn(7).bfloat16(), torch.tensor(2.0), torch.ones(5000, dtype=torch.bool)):
        assert torch.equal(hostile.guarded(t), t)
        assert (hostile.guarded(t).data_ptr() + t.nbytes) % hostile.PAGE == 0


def test_a_wrong_answer_is_noticed(monkeypatch):
    case = hostile.Case("is_nm", 4, 40, 5, ())
    assert hostile.check(case) == "answered"
    right = reference.is_nm
    monkeypatch.setattr(reference, "is_nm", lambda *arguments: ~right(*arguments))
    with pytest.raises(AssertionError, match=r"is_nm.*(True for False|False for True)"):
        hostile.check(case)


def test_what_nobody_has_written_is_poisoned():
    sizes = (64, 40)
    with poisoned():
        assert torch.empty(sizes).isnan().all()
        assert torch.empty(sizes, dtype=torch.bfloat16).isnan().all()
        assert (torch.empty(sizes, dtype=torch.int32) == 2**31 - 1).all()
        with poisoned():
            pass
        assert torch.are_deterministic_algorithms_enabled()


FORGETFUL = """
#include <ATen/ops/empty.h>
#include <torch/library.h>
at::Tensor half(const at::Tensor& x) {
  at::Tensor y = at::empty(x.sizes(), x.options());
  y.flatten().narrow(0, 0, x.numel() / 2).fill_(1);
  return y;
}
TORCH_LIBRARY(ebft_forgetful, m) { m.def("half(Tensor x) -> Tensor", &half); }
"""


@pytest.mark.slow
def test_a_kernel_that_forgets_half_of_its_output_is_seen(tmp_path):
    """Poison reaches ``at::empty`` inside C++."""
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "forgetful.cpp").write_text(FORGETFUL)
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom ebft_kernels import _extension\n"
        "from ebft_kernels.testing import poisoned\n"
        "assert _extension._build(Path(sys.argv[1]), 'c++') is None\n"
        "with poisoned():\n    y = torch.ops.ebft_forgetful.half(torch.ones(4, 10))\n"
        "print(int(y.isnan().sum()), int((y == 1).sum()))\n"
    )
    done = run_hostile(tmp_path, code=code)
    assert done.stdout.splitlines()[-1] == "20 20", done.stderr


# --- what was found --------------------------------------------------------------------------------------------------


def layer_of(rows=64, width=33):
    """Words, values, row offsets of a weight that keeps everything."""
    words = reference.pack_mask(torch.ones(rows, width, dtype=torch.bool))
    return words, torch.ones(rows * width), reference.row_offsets(words)


def both(words, values, offsets, width, scales=None):
    """Calls of the two ops that read a compressed weight, native and in torch."""
    x, layout = torch.ones(1, width), (words, values, offsets, scales)
    return [
        lambda: OPS.decompress.native(*layout, width),
        lambda: OPS.compressed_linear.native(x, *layout, None, width),
        lambda: TORCH_KERNELS["decompress"](*layout, width),
        lambda: TORCH_KERNELS["compressed_linear"](x, *layout, None, width),
        lambda: reference.decompress(*layout, width),
    ]


def test_no_values_for_a_mask_that_keeps_some():
    words, _, offsets = layer_of(64, 4000)
    offsets[-1] = 0
    for call in both(words, torch.empty(0), offsets, 4000):
        with pytest.raises(ValueError, match="row offset"):
            call()


@pytest.mark.parametrize("count_them", [True, False])
def test_bits_past_the_end_of_a_row(count_them):
    words, values, offsets = layer_of()
    words[60:, 1] |= -(2**31)
    if count_them:
        offsets = reference.row_offsets(words)
        values = torch.ones(int(offsets[-1]))
    for call in both(words, values, offsets, 33):
        with pytest.raises(ValueError, match=r"past the end of|row 60|a row fewer than 0 or more than its 33 values"):
            call()


def test_a_bit_past_the_end_that_takes_another_ones_place():
    """As many bits as values in every row, so that counts alone do not show it."""
    words, values, offsets = layer_of()
    words[7, 1], words[7, 0] = 2, -1
    for call in both(words, values, offsets, 33):
        with pytest.raises(ValueError, match=r"past the end of (a )?row"):
            call()


@pytest.mark.parametrize("width", [2**63 - 1, 2**62, 65, -1, 0])
def test_sizes_that_nothing_holds(width):
    words, values, offsets = layer_of()
    with pytest.raises(ValueError, match="words"):
        OPS.decompress.native(words, values, offsets, None, width)
    with pytest.raises(ValueError, match="words"):
        OPS.compressed_linear.native(torch.ones(1, 33), words, values, offsets, None, None, width)
    with pytest.raises(ValueError, match="words"):
        OPS.unpack_mask.native(words, width)
    with pytest.raises(ValueError, match=r"words|2:4"):
        OPS.is_nm.native(words, width, 2, 4)


@pytest.mark.parametrize("nbytes", [0, 100])
def test_a_storage_that_ends_before_its_tensor(nbytes):
    """As FSDP frees what it gathers: sizes stay, memory goes."""

    def gone(t):
        t = t.clone()
        t.untyped_storage().resize_(nbytes)
        return t

    words, values, offsets = layer_of()
    calls = [
        lambda: OPS.decompress.native(words, gone(values), offsets, None, 33),
        lambda: OPS.compressed_linear.native(gone(torch.ones(9, 33)), words, values, offsets, None, None, 33),
        lambda: OPS.pack_mask.native(gone(torch.ones(9, 33, dtype=torch.bool))),
        lambda: OPS.topk_mask.native(gone(torch.ones(9, 33)), 2),
        lambda: OPS.row_offsets.native(gone(words)),
        lambda: OPS.masked_grad_norm.native([gone(torch.ones(9, 33))], [torch.empty(0, dtype=torch.int32)]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"in a storage of {nbytes}"):
            call()


def test_n_of_4_counts_no_bits_past_the_end():
    words = torch.tensor([[0x33333333, -16 + 3]], dtype=torch.int32)  # 36 inputs: of the second word four bits
    assert OPS.is_nm.native(words, 36, 2, 4)
    assert reference.is_nm(words, 36, 2, 4)
    assert not OPS.is_nm.native(words, 64, 2, 4)


# --- layers ----------------------------------------------------------------------------------------------------------


def sound_layer(values="fp32"):
    weight = torch.randn(9, 40)
    return CompressedLinear.from_masked(torch.nn.Linear(40, 9), PackedMask.from_topk(weight.abs(), 11), values=values)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bitmap": lambda t: t | -(2**31)}, "the layer: CompressedLinear got a mask with bits set past the end"),
        ({"bitmap": lambda t: t & ~1 | 2}, "values for a mask that keeps"),
        ({"values": lambda t: t[1:]}, "size mismatch"),
        ({"bitmap": lambda t: torch.zeros_like(t)}, "99 values for a mask that keeps 0"),
    ],
)
@pytest.mark.parametrize("values", ["fp32", "int8"])
def test_a_layer_is_checked_when_it_is_loaded(changes, says, values):
    layer = sound_layer(values)
    state = {name: changes.get(name, torch.clone)(tensor) for name, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=says):
        sound_layer(values).load_state_dict(state)
    with pytest.raises(RuntimeError, match=says):
        sound_layer(values).load_state_dict(state, assign=True)


@pytest.mark.parametrize("changes", [{"values": torch.float16}, {"bitmap": torch.int64}])
def test_a_layer_takes_no_other_dtypes(changes):
    """``assign=True`` brings whatever a file holds."""
    layer = sound_layer("int8")
    state = {name: tensor.to(changes.get(name, tensor.dtype)) for name, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"CompressedLinear got .*expected"):
        layer.load_state_dict(state, assign=True)


@pytest.mark.parametrize("sizes", [(0, 4, 0), (4, -1, 0), (4, 4, 17), (4, 4, -1)])
def test_a_layer_of_no_size(sizes):
    with pytest.raises(ValueError, match="expected a matrix of at least one input"):
        CompressedLinear(*sizes)


def test_a_layer_says_what_it_takes():
    with pytest.raises(ValueError, match=r"CompressedLinear got x \(2, 41\); expected \(\.\.\., 40\)"):
        sound_layer()(torch.ones(2, 41))
    with pytest.raises(ValueError, match=r"values for a mask that keeps|row offset"):
        CompressedLinear(40, 9, 99, values="fp32")(torch.ones(2, 40))  # nothing has been loaded
    half = sound_layer("int8").half()
    assert half(torch.ones(2, 40).half()).shape == half(torch.ones(20, 40).half())[:2].shape
