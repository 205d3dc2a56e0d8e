"""Damaged checkpoints: a run of whatever is left of one ends with a sound folder, or with exit code 2 and one sentence.

``EBFT_EXAMPLES=500 pytest tests/loop/test_damaged.py`` tries so many of each kind, others every time.
"""

import contextlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from conftest import random_model
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import ebft.output.audit
import ebft.run

MANY = int(os.environ.get("EBFT_EXAMPLES", 0))
examples = settings(
    max_examples=MANY or 12,
    derandomize=not MANY,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # shrinking takes minutes, and the sentence says what was damaged
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
FAMILIES = ("llama-gqa", "gpt2", "mixtral", "gemma3")
SIZES = {"llama-gqa": {"hidden_size": 16}, "gpt2": {"n_embd": 16, "n_layer": 2}, "mixtral": {}, "gemma3": {}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    """The folders of tiny models, by family, and a text."""
    root = tmp_path_factory.mktemp("whole")
    for family in FAMILIES:
        random_model(family, **SIZES[family]).save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
    (root / "text.txt").write_text("It was a dark and stormy night; the rain fell in torrents. " * 20)
    return root


def ends_well(whole: Path, family: str, damage) -> None:
    """Run what ``damage`` has made of a family's folder, and hold the outcome to the promise."""
    with tempfile.TemporaryDirectory() as folder:
        model, out, text = Path(folder, "model"), Path(folder, "out"), str(whole / "text.txt")
        shutil.copytree(whole / family, model)
        damage(model)
        argv = ["--model", str(model), "--preset", "demo", "--recover", "none", "--prune", "magnitude"]
        argv += ["--output", str(out), "--eval", text, "--eval-seqlen", "16", "--seqlen", "8", "--device", "cpu"]
        code, said = said_by(ebft.run.main, argv)
        if code == 0:
            assert said_by(ebft.output.audit.main, [str(out)])[0] == 0
        else:
            assert code == 2
            assert said.count("ebft: ") == 1, said
            assert said.splitlines()[-1].startswith("ebft: ")
            assert "Traceback" not in said


def said_by(main, argv) -> tuple[int, str]:
    """The exit code, and what went to standard error."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main(argv)
    return code, errors.getvalue().strip()


# --- config.json --------------------------------------------------------------------------------------------------

numbers = st.sampled_from([-(10**9), -1, 0, 1, 2, 3, 7, 8, 15, 16, 33, 64, 600, 10**9, 10**30])
floats = st.sampled_from([-1.0, 0.0, 1e-300, 0.5, 1.0, 1e300, float("inf"), float("nan")])
words = st.sampled_from(["", "x", "0", "gelu", "llama", "gpt2", "bfloat16", "int8", "full_attention", "default", "\0"])
plain = st.one_of(st.none(), st.booleans(), numbers, floats, words)
values = st.one_of(
    plain, st.lists(plain, max_size=4), st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "x"]), plain)
)
# Settings that are not in every file and change what is built or loaded.
MORE = ("head_dim", "layer_types", "quantization_config", "text_config", "attn_implementation", "rope_scaling")
MORE += ("sliding_window", "auto_map", "is_encoder_decoder", "num_experts", "transformers_weights", "torch_dtype")


@given(st.data())
@examples
def test_a_configuration_with_other_values(whole, data):
    family = data.draw(st.sampled_from(FAMILIES))
    config = json.loads((whole / family / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from([*sorted(config), *MORE]))
        value = data.draw(values)
        if data.draw(st.integers(0, 5)) == 0:
            config.pop(name, None)
        elif not ("layer" in name and isinstance(value, int) and value > 1000):  # hours, where it is believed
            config[name] = value
    ends_well(whole, family, lambda model: (model / "config.json").write_text(json.dumps(config)))


# --- model.safetensors --------------------------------------------------------------------------------------------

DTYPES = ("F32", "F16", "BF16", "F64", "I64", "I8", "BOOL", "F8_E4M3", "x", "", 3, None)
sizes = st.sampled_from([-1, 0, 1, 2, 8, 16, 32, 48, 2**31, 2**63, 2**64, 10**30])


@given(st.data())
@examples
def test_a_header_with_other_entries(whole, data):
    family = data.draw(st.sampled_from(FAMILIES))
    header, body = parts(whole / family / "model.safetensors")
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(header)))
        kind = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "removed", "copied", "value"]))
        if kind == "removed":
            del header[name]
        elif kind in ("name", "copied"):
            other = data.draw(st.sampled_from([f"module.{name}", name[:-1], "", "\0", "x" * 1000, *sorted(header)]))
            header[other] = header[name] if kind == "copied" else header.pop(name)
        elif kind == "value" or not isinstance(header[name], dict):
            header[name] = data.draw(values)
        else:
            lists = st.lists(sizes, max_size=3)
            header[name] = {**header[name], kind: data.draw(st.sampled_from(DTYPES) if kind == "dtype" else lists)}
    text = json.dumps(header).encode()
    ends_well(whole, family, written(len(text).to_bytes(8, "little") + text + body))


@given(st.data())
@examples
def test_a_file_with_other_bytes(whole, data):
    family = data.draw(st.sampled_from(FAMILIES))
    file = bytearray((whole / family / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(file[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.one_of(st.integers(0, 15), st.integers(0, header - 1), st.integers(0, len(file) - 1)))
        file[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        file = file[: data.draw(st.integers(0, len(file)))]
    ends_well(whole, family, written(bytes(file)))


def parts(file: Path) -> tuple[dict, bytes]:
    """What is in a safetensors file's header, and what follows it."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def written(content: bytes):
    return lambda model: (model / "model.safetensors").write_bytes(content)
