"""The native library on the CPU: agreement with the reference, safety of its entries, the ways it comes into being."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import battery
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebft_kernels import MaskedAdamW, PackedMask, explain, masked_linear, reference, use_impl
from ebft_kernels._extension import native_reason
from ebft_kernels.testing import ADAMW_LAYOUTS, adamw_step, one_adamw_step

OPS = torch.ops.ebft_kernels
HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@pytest.fixture(scope="module", autouse=True)
def _built():
    """There is a compiler wherever these tests run: without the library they fail, they do not skip."""
    assert native_reason() is None


def test_everything_agrees_with_the_reference():
    battery.everything()


@pytest.mark.parametrize("path", ["plain", "avx2"])
def test_what_lesser_cpus_run_agrees_too(path):
    """Without AVX2, and without AVX-512."""
    done = subprocess.run(
        [sys.executable, str(HERE / "battery.py")],
        env={**os.environ, "EBFT_CPU": path, "PYTHONPATH": str(HERE.parent.parent)},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# --- fuzzed -------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 9),
    st.integers(1, 200),
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=80, deadline=None)
def test_masks_of_any_shape(rows, width, seed, dtype):
    battery.check_masks(rows, width, seed, dtype)


@given(
    st.integers(0, 20), st.integers(1, 300), st.integers(0, 17), st.sampled_from(["fp32", "bf16", "fp16", "int8"]),
    st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from(battery.MASK_KINDS), st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_compressed_layers_of_any_shape(rows, width, batch, values, x_dtype, kind, seed):
    battery.check_compressed(rows, width, batch, values, x_dtype, kind, seed)


@given(st.integers(0, 6), st.integers(1, 700), st.sampled_from(ADAMW_LAYOUTS), st.floats(0, 1), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_adamw_on_any_shape(rows, width, layout, density, seed):
    generator = torch.Generator().manual_seed(seed)
    weights, moments, compact = layout
    mask = torch.rand(rows, width, generator=generator) < density
    words = reference.pack_mask(mask)
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    param, grad = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(2))
    m, v = torch.randn(rows, width, generator=generator) * mask, torch.rand(rows, width, generator=generator) * mask
    stored = mask if compact else torch.ones_like(mask)
    fields = {"words": words, "stochastic": weights == "stochastic", "seed": seed, "param_ids": [3]}
    if compact:
        fields["row_offsets"] = reference.row_offsets(words)
    if weights == "master":
        fields["masters"] = param.float()[stored]
    m, v = m[stored], v[stored]
    if moments == "int8":
        m, fields["exp_avg_scales"] = reference.quantize(m, True)
        v, fields["exp_avg_sq_scales"] = reference.quantize(v, False)
    elif moments == "bf16":
        m, v = m.bfloat16(), v.bfloat16()
    step = one_adamw_step(param, grad, m, v, **fields)
    mine, truth = step.each(torch.clone), step.each(torch.clone)
    OPS.masked_adamw_step.native(*mine)
    reference.masked_adamw_step(truth)
    for got, true in zip(mine.written, truth.written, strict=True):
        assert torch.equal(got[0], true[0])


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_the_same_whatever_the_threads(threads):
    before = torch.get_num_threads()
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        step = adamw_step("stochastic", "int8", True)
        big = torch.rand(400, 1000, generator=torch.Generator().manual_seed(0)) > 0.7
        param = torch.randn(400, 1000, generator=torch.Generator().manual_seed(1)).bfloat16()
        weight = torch.nn.Parameter(param)
        optimizer = MaskedAdamW([weight], masks={weight: big}, weights="stochastic", moments="int8", compact=True)
        weight.grad = param * 0.01
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        norm = OPS.masked_grad_norm.native(step.grads, step.words)
        results.append((weight.detach().clone(), optimizer.state[weight]["exp_avg_sq"].clone(), norm))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- choice -------------------------------------------------------------------------------------------------------


def test_it_is_chosen_on_a_cpu_and_says_so():
    choice = explain("masked_adamw_step", "cpu")
    assert (choice.impl, choice.fused, choice.reason) == ("native", True, "the fused kernel for cpu")
    assert explain("masked_adamw_step", "cpu", torch.float64).impl == "torch"
    assert explain("masked_linear", "cpu").impl == "torch"
    assert not explain("masked_linear", "cpu").fallback
    with use_impl("torch"):
        assert explain("masked_adamw_step", "cpu").impl == "torch"
    with use_impl("native"), pytest.raises(RuntimeError, match=r"cannot run masked_linear on cpu: torch's own product"):
        masked_linear(torch.ones(1, 4), torch.ones(3, 4), torch.ones(3, 4, dtype=torch.bool))


def test_torch_and_native_give_the_same_masks():
    scores = torch.randn(40, 96)
    for make in (lambda: PackedMask.from_topk(scores, 40), lambda: PackedMask.from_scores(scores, 2, 4)):
        native = make()
        with use_impl("torch"):
            assert make() == native


# --- safety: every entry checks before it touches memory ----------------------------------------------------------


def step_with(**changes):
    w, mask = torch.randn(4, 40), torch.rand(4, 40) > 0.5
    return one_adamw_step(w, w.clone(), w.clone(), w.clone(), **{"words": reference.pack_mask(mask), **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"params": torch.randn(4, 40).double()}, "a parameter of Double; expected float32"),
        ({"params": torch.randn(40, 4).T}, r"a parameter \(4, 40\) that is not contiguous"),
        ({"grads": torch.randn(4, 39)}, r"a gradient \(4, 39\) for a parameter \(4, 40\)"),
        ({"grads": torch.randn(4, 40).half()}, "a gradient of Half; expected Float"),
        ({"words": torch.zeros(4, 1, dtype=torch.int32)}, r"mask words \(4, 1\) for \(4, 40\); expected 2 words a row"),
        ({"words": torch.zeros(4, 2, dtype=torch.int64)}, "mask words of Long; expected Int"),
        ({"exp_avgs": torch.zeros(4, 39)}, "first moments with 156 entries; expected 160"),
        ({"exp_avg_sqs": torch.zeros(4, 40).half()}, "second moments of Half"),
        ({"exp_avgs": torch.zeros(4, 40, dtype=torch.int8)}, "0 scales of first moments; expected 1"),
        ({"exp_avgs": torch.zeros(4, 40).bfloat16()}, "first moments of BFloat16 and second moments of Float"),
        ({"exp_avg_scales": torch.zeros(3)}, "3 scales of first moments; expected 0"),
        ({"masters": torch.zeros(160)}, "160 master weights"),
        ({"row_offsets": torch.zeros(4, dtype=torch.int64)}, "4 row offsets for 4 rows; expected 5"),
        ({"row_offsets": torch.arange(5) * 40}, "row 0 40 values; its mask keeps"),
        ({"params": torch.randn(4, 40).bfloat16(), "grads": torch.randn(4, 40).bfloat16()}, "expected a master weight"),
    ],
)  # fmt: skip
def test_adamw_checks_what_it_is_given(changes, says):
    step = step_with(**changes)
    before = step.each(torch.clone)
    with pytest.raises(ValueError, match=says):
        OPS.masked_adamw_step.native(*step)
    for now, was in zip(step.tensors, before.tensors, strict=True):
        assert torch.equal(now[0], was[0])


def test_a_bad_second_parameter_leaves_the_first_alone():
    good, bad = step_with(), step_with(exp_avgs=torch.zeros(3))
    lists = [one + two for one, two in zip(good.tensors, bad.tensors, strict=True)]
    before = good.params[0].clone()
    with pytest.raises(ValueError, match="first moments with 3 entries"):
        OPS.masked_adamw_step.native(*good.with_tensors(lists)._replace(param_ids=[0, 1]))
    assert torch.equal(good.params[0], before)


WORDS = reference.pack_mask(torch.ones(4, 40, dtype=torch.bool))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: OPS.pack_mask.native(torch.ones(3, 4)), "a mask of Float; expected Bool"),
        (lambda: OPS.unpack_mask.native(WORDS, 100), r"words \(4, 2\) for rows of 100; expected 4 a row"),
        (lambda: OPS.unpack_mask.native(WORDS.long(), 40), "words of Long; expected Int"),
        (lambda: OPS.zero_pruned_.native(torch.randn(4, 40).double(), WORDS), "a tensor of Double; expected float32"),
        (lambda: OPS.zero_pruned_.native(torch.zeros(4, 40).int(), WORDS), "a tensor of Int; expected float32"),
        (lambda: OPS.zero_pruned_.native(torch.randn(40, 4).T, WORDS), "a tensor .* that is not contiguous"),
        (lambda: OPS.zero_pruned_.native(torch._neg_view(torch.randn(4, 40)), WORDS), "got a negated view"),
        (
            lambda: OPS.zero_pruned_.native(torch.randn(4, 70), WORDS),
            r"mask words \(4, 2\) for \(4, 70\); expected 3 words a row",
        ),
        (lambda: OPS.zero_pruned_.native(torch.randn(()), WORDS), r"a tensor \(\); expected \(..., K\)"),
        (lambda: OPS.topk_mask.native(torch.randn(3, 4), 5), "k = 5"),
        (lambda: OPS.topk_mask.native(torch.randn(3, 4).double(), 2), "scores of Double"),
        (lambda: OPS.nm_mask.native(torch.randn(3, 6), 2, 4), "2:4 for rows of 6"),
        (lambda: OPS.nm_mask.native(torch.randn(3, 8), 5, 4), "5:4"),
        (lambda: OPS.is_nm.native(WORDS, 40, 2, 3), "2:3 for rows of 40"),
        (lambda: OPS.row_offsets.native(WORDS.long()), "row_offsets got words Long"),
        (
            lambda: OPS.masked_grad_norm.native([torch.randn(4, 40)], [WORDS[:2]]),
            r"mask words \(2, 2\) for \(4, 40\); expected 2 words a row",
        ),
        (lambda: OPS.masked_grad_norm.native([torch.randn(4, 40)], []), "1 gradients and 0 masks"),
    ],
)
def test_masks_check_what_they_are_given(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def compressed_with(**changes):
    arguments = {
        "x": torch.randn(2, 40), "words": WORDS, "values": torch.randn(160), "row_offsets": torch.arange(5) * 40,
        "scales": None, "bias": None, "width": 40, **changes,
    }  # fmt: skip
    return OPS.compressed_linear.native(*arguments.values())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": torch.randn(2, 41)}, r"x \(2, 41\); expected \(..., 40\)"),
        ({"x": torch.ones(2, 40, dtype=torch.int64)}, "x of Long"),
        ({"values": torch.randn(159)}, "row offsets from 0 to 160 for 159 values"),
        ({"values": torch.randn(160).double()}, "values of Double"),
        ({"values": torch.zeros(160, dtype=torch.int8)}, "int8 values without scales"),
        ({"scales": torch.ones(4, 1)}, "float values with scales"),
        ({"row_offsets": torch.tensor([0, 160, 160, 160, 160])}, "more than its 40 values"),
        ({"row_offsets": torch.tensor([0, -8, 32, 72, 112])}, "row offsets from 0 to 112 for 160 values"),
        ({"row_offsets": torch.tensor([0, 50, 40, 120, 160])}, "fewer than 0"),
        ({"words": WORDS & ~1, "values": torch.randn(156)}, "row offsets from 0 to 160 for 156 values"),
        ({"words": WORDS & ~2}, "row 0 40 values; its mask keeps"),
        ({"row_offsets": torch.tensor([0, -(2**63), 2**62, 120, 160])}, "fewer than 0"),
        ({"row_offsets": torch.arange(4) * 40}, "4 row offsets for 4 rows; expected 5"),
        ({"words": WORDS[:, :1]}, "mask words"),
        ({"bias": torch.ones(3)}, r"bias \(3\); expected \(4\)"),
        ({"values": torch.zeros(160, dtype=torch.int8), "scales": torch.ones(3)}, r"scales \(3\); expected \(4, 1\)"),
    ],
)
def test_compressed_layers_check_what_they_are_given(changes, says):
    with pytest.raises(ValueError, match=says):
        compressed_with(**changes)
    assert compressed_with().shape == (2, 4)


# --- how the library comes into being -----------------------------------------------------------------------------

PROBE = """
import logging, torch
logging.basicConfig(level=logging.WARNING)
from ebft_kernels import PackedMask, explain
mask = PackedMask.from_dense(torch.ones(3, 40, dtype=torch.bool))
print(explain("pack_mask"))
print(mask.count())
"""


def probe(**environment):
    base = {name: value for name, value in os.environ.items() if not name.startswith("EBFT_")}
    return subprocess.Popen(
        [sys.executable, "-c", PROBE], cwd=environment.get("PYTHONPATH", ROOT), env={**base, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    lines = out.splitlines()
    assert lines[-1] == "120"  # it works, whatever runs
    return lines[0], err


def test_it_can_be_turned_off():
    said, err = finished(probe(EBFT_NATIVE="0"))
    assert said == "pack_mask runs in torch: EBFT_NATIVE=0 turns the native library off"
    assert err.count("runs in torch") == 1  # said once


def test_without_a_compiler_the_package_works(tmp_path):
    said, _ = finished(probe(EBFT_CACHE=str(tmp_path), CXX="no-such-compiler"))
    assert (
        "pack_mask runs in torch: the native library is not built, and there is no compiler (no-such-compiler)" in said
    )


def test_a_broken_compiler_gives_one_line_and_keeps_its_log(tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    said, err = finished(probe(EBFT_CACHE=str(tmp_path / "cache"), CXX=str(broken)))
    assert "pack_mask runs in torch: the native library could not be built" in said
    assert "Traceback" not in err
    (log,) = (tmp_path / "cache").rglob("build.log")
    assert str(log) in said
    assert "this compiler is broken" in log.read_text()


BUILD = """
import sys
from pathlib import Path
from ebft_kernels import _extension
print(_extension._build(Path(sys.argv[1]), "c++"))
"""


def test_two_processes_that_start_at_once_and_the_cache(tmp_path):
    """With one small file in place of csrc/: both build, neither sees half of the other's, the third finds it there."""
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "small.cpp").write_text('extern "C" int small() { return 1; }')
    environment = {**os.environ, "EBFT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", BUILD, str(tmp_path / "csrc")]

    def start():
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    for process in [start() for _ in range(2)]:
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out.splitlines()[-1]) == (0, "None"), err
    (library,) = (tmp_path / "cache").rglob("*.so")  # and no litter beside it
    assert [file.name for file in library.parent.iterdir()] == [library.name]
    built = library.stat().st_mtime_ns
    out, err = start().communicate(timeout=300)
    assert out.splitlines() == ["None"]
    assert "building" not in err
    assert library.stat().st_mtime_ns == built


@pytest.mark.slow
def test_built_at_install_it_needs_no_compiler_later(tmp_path):
    """``pip install --no-build-isolation .`` with torch at hand: the library lies in the package."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "results", "ebft-output"))
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*install, str(tmp_path / "place"), str(source)], check=True, capture_output=True, timeout=600)
    assert len(list((tmp_path / "place" / "ebft_kernels").glob("_native-torch*.so"))) == 1
    environment = {
        "PYTHONPATH": str(tmp_path / "place"),
        "CXX": "no-such-compiler",
        "EBFT_CACHE": str(tmp_path / "cache"),
    }
    said, err = finished(probe(**environment))
    assert said == "pack_mask runs in native: the fused kernel for cpu"
    assert "building" not in err
    assert not (tmp_path / "cache").exists()
