"""Nothing wrong passes in silence: it is said in one sentence, before the work where it can be; nobody need hear."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import random_model
from safetensors.torch import load_file, save_file

from ebft import EBFTConfig, EBFTError, run_ebft
from ebft.cli.app import parse_args
from ebft.config import PRESETS, SECTIONS, all_flat_names, flat_name
from ebft.model.checkpoint import load_model, open_model
from ebft.model.tensors import meant_to_be_used
from ebft.output.audit import audit
from ebft.output.lasting import Lasting
from ebft.registry import recoveries
from ebft.run import main

SLOW = pytest.mark.slow
HEAD, NORM, EMBEDDING = "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"
UP, O_BIAS = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.o_proj.bias"


@pytest.fixture
def stored(tiny, tmp_path):
    """Makes a folder with the tiny model, changed: tensors by a function, config.json by keys, stored as told."""

    def make(edit=None, how="safetensors", **settings):
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny / "model", folder)
        file = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        if edit:
            edit(tensors)
        file.unlink()
        if how == "bin":
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            save_file(tensors, file, metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))
        return str(folder)

    return make


@pytest.fixture
def refused(short_run, silent):
    """The sentence with which a run of a folder, or of a model in memory, fails."""

    def run(model, tokenizer=None, **settings):
        if isinstance(model, str):
            settings["model"], model = model, None
        with pytest.raises(EBFTError) as error:
            run_ebft(model, EBFTConfig.of(**short_run(**settings)), tokenizer=tokenizer, reporter=silent)
        assert "\n" not in str(error.value)
        return str(error.value)

    return run


def said_by(reporter):
    return reporter.console.file.getvalue()


def put(name, value):
    """An edit that puts a value into a tensor."""

    def edit(tensors):
        tensors[name].view(-1)[3] = value

    return edit


# --- NaN and infinity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [(NORM, "nan"), (HEAD, "inf"), (EMBEDDING, "-inf")])
@pytest.mark.parametrize("eval", [{}, {"eval": ""}])
def test_what_is_in_no_block_is_looked_at_too(stored, refused, name, value, eval):
    model = stored(put(name, float(value)))
    assert refused(model, **eval) == f"model {model}: {name} holds NaN or infinity; expected finite weights"


def test_nan_in_the_embedding_of_a_token_that_no_text_has(stored, refused):
    model = stored(lambda tensors: tensors[EMBEDDING][-1].fill_(float("nan")))
    assert refused(model, eval="") == f"model {model}: {EMBEDDING} holds NaN or infinity; expected finite weights"


def test_so_it_is_in_a_model_in_memory_and_in_a_teacher(stored, refused, tiny, tokenizer):
    model = random_model("llama-gqa")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    assert refused(model, tokenizer) == f"model LlamaForCausalLM: {NORM} holds NaN or infinity; expected finite weights"
    teacher = stored(put(HEAD, float("nan")))
    assert f"--teacher: {HEAD} holds NaN" in refused(str(tiny / "model"), teacher=teacher)


def test_a_dense_perplexity_that_is_no_number_ends_the_run(stored, refused, tiny):
    text = str(tiny / "text.txt")
    said = refused(stored(put(UP, float("nan"))))
    assert said == f"the dense model's perplexity on {text} is nan: {UP} holds NaN or infinity; expected a finite one"
    said = refused(stored(lambda tensors: tensors[HEAD].mul_(1e38)))
    assert f"perplexity on {text} is nan: its weights are finite, and what it makes is not" in said


def test_hidden_states_name_the_tensor(stored, refused):
    said = refused(stored(put(UP, float("nan"))), eval="")
    assert said.startswith(
        f"block 1 (model.layers.1): the dense block's outputs hold NaN or infinity, as {UP} does; the 1 finished blocks"
    )
    said = refused(stored(put(UP, float("inf"))), eval="", recover="none", prune="magnitude")
    assert said.startswith(f"block 1 (model.layers.1): {UP} holds NaN or infinity; the 1 finished blocks are kept in")


# --- what lies in and beside a checkpoint ---------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_a_model_is_refused(stored, refused, tiny, file):
    model = stored()
    (Path(model) / file).write_text("whatever")
    said = f"has {file} beside it, an adapter that is no part of its weights; expected it to be merged"
    assert said in refused(model)
    assert said in refused(str(tiny / "model"), teacher=model)
    with pytest.raises(EBFTError, match="beside it, an adapter"):
        load_model(model)


def extra(name, shape=(32,)):
    return lambda tensors: tensors.update({name: torch.ones(shape)})


@pytest.mark.parametrize("how", ["safetensors", "bin"])
def test_tensors_that_the_model_does_not_take(stored, refused, short_run, silent, tmp_path, how):
    model = stored(extra(O_BIAS), how)
    said = f"model {model} has 1 tensor that its config.json has no place for, {O_BIAS} by name; expected a config.json"
    assert said in refused(model)
    run_ebft(config=EBFTConfig.of(**short_run(model=model, ignore_unused=True)), reporter=silent)
    assert f"left out 1 tensor that its config.json has no place for, {O_BIAS} by name" in said_by(silent)
    assert O_BIAS not in load_file(tmp_path / "out" / "model.safetensors")
    assert not audit(str(tmp_path / "out"), model).faults
    said = refused(stored(num_hidden_layers=2), output="other")
    assert "has 9 tensors that its config.json has no place for, model.layers.2.input_layernorm.weight among" in said


def test_biases_that_pruning_adds_bring_nothing_back(stored, short_run, silent, tmp_path):
    settings = {"structured": True, "prune": "flap", "sparsity": 0.3, "recover": "none", "ignore_unused": True}
    run_ebft(config=EBFTConfig.of(**short_run(model=stored(extra("other.weight")), **settings)), reporter=silent)
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert O_BIAS in names
    assert "other.weight" not in names


def test_what_transformers_ignores_is_no_fault(stored):
    """Tables that old versions stored, tied heads, layers that an architecture lists."""
    model = stored(extra("model.layers.0.self_attn.rotary_emb.inv_freq", (4,)))
    assert open_model(model).weights.unused == []
    load_model(model)

    def tied(tensors):
        tensors[HEAD] = tensors[EMBEDDING].clone()

    assert open_model(stored(tied, tie_word_embeddings=True)).weights.unused == []
    gpt = random_model("gpt2")
    masks = ["h.0.attn.bias", "h.0.attn.masked_bias", "transformer.h.0.attn.bias"]
    assert meant_to_be_used(gpt, [*masks, "h.0.attn.c_proj.other"]) == ["h.0.attn.c_proj.other"]
    model = random_model("llama")
    model._keys_to_ignore_on_load_unexpected = {r"^mtp\..*"}
    assert meant_to_be_used(model, ["mtp.layers.0.weight", "model.layers.0.mtp.weight"]) == [
        "model.layers.0.mtp.weight"
    ]


@pytest.mark.parametrize("how", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_weights_that_are_no_floats(stored, refused, dtype, how):
    model = stored(lambda tensors: tensors.update({UP: tensors[UP].to(dtype)}), how)
    assert refused(model) == f"{UP} is stored as {dtype}; expected floating-point weights"


def test_weights_in_memory_that_are_no_floats(refused, tokenizer):
    model = random_model("llama-gqa")
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.ones(48, 32, dtype=torch.int8), False)
    assert refused(model, tokenizer) == f"the model's {UP} is torch.int8; expected float weights"


# --- shares -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparsity", "asked", "got"), [(0.999, "99.90%", "100.00%"), (0.0001, "0.01%", "0.00%"), (0.7, "70.00%", None)]
)
def test_a_share_that_rows_do_not_allow_is_said(short_run, silent, tiny, tmp_path, sparsity, asked, got):
    run_ebft(config=EBFTConfig.of(**short_run(sparsity=sparsity, recover="none", eval="")), reporter=silent)
    said = said_by(silent)
    line = json.loads((tmp_path / "out" / "blocks.jsonl").read_text().splitlines()[0])
    if got is None:
        assert not line["notes"]
        assert "asked for" not in said
        return
    assert f"asked for {asked} pruned, got {got} in self_attn.q_proj.weight, " in line["notes"][0]
    assert line["notes"][0] in said
    assert f"sparsity {got} ({asked} was asked for), " in said


# --- settings without effect ------------------------------------------------------------------------------------------

ALWAYS = {
    *("model", "output", "overwrite", "prune", "refine", "structured", "pattern", "schedule", "recover", "eval"),
    *("eval_tasks", "device", "dtype", "resume", "gpu_memory", "host_memory", "max_shard_size", "fused"),
    *("trust_remote_code", "ignore_unused", "prompts", "log"),
}
# Of every other setting: a value that no preset has, and what gives it an effect.
ALL = {"recover": "layerwise+ebft+lora+full+distill"}
SETTINGS = {
    "teacher": ("x", ALL),
    "sparsegpt_damping": (0.1, {"prune": "sparsegpt"}),
    "act_order": (True, {"prune": "sparsegpt"}),
    "allocation": ("owl", {}),
    "dsnot_threshold": (0.2, {"refine": "dsnot"}),
    "dsnot_cycles": (5, {"refine": "dsnot"}),
    "sparsity": (0.55, {}),
    "uniform": (True, {"structured": True}),
    "transposable": (True, {"pattern": "2:4"}),
    "cg_iterations": (3, ALL),
    "cg_damping": (0.1, ALL),
    "cg_inputs": ("dense", ALL),
    "lm_lr": (1e-3, ALL),
    "lm_epochs": (1, ALL),
    "lm_seconds": (9.0, ALL),
    "lora_rank": (4, ALL),
    "lora_alpha": (8.0, ALL),
    "lora_dropout": (0.1, {**ALL, "lora_masked": False}),
    "lora_masked": (False, ALL),
    "distill_epochs": (3, ALL),
    "distill_lr": (1e-3, ALL),
    "distill_text": (0.25, ALL),
    "distill_top": (8, ALL),
    "distill_blocks": ("host", ALL),
    "time": ("10m", ALL),
    "calibration": ("wikitext2", {}),
    "windows": ("packed", {}),
    "samples": (32, {}),
    "seqlen": (64, {}),
    "epochs": (3, ALL),
    "batch_size": (16, {}),
    "micro_batch": (1, ALL),
    "recompute": ("block", ALL),
    "weights": ("master", ALL),
    "moments": ("int8", ALL),
    "compact": (True, ALL),
    "update_in_backward": (True, {**ALL, "clip": 0.0}),
    "compile": (True, ALL),
    "unit": ("halves", ALL),
    "optimizer": ("muon", ALL),
    "lr": (1e-3, ALL),
    "lr_scale": ("rms", ALL),
    "lr_decay": ("constant", ALL),
    "warmup": (0.1, ALL),
    "betas": ((0.8, 0.9), ALL),
    "weight_decay": (0.2, ALL),
    "clip": (0.5, ALL),
    "loss": ("cosine", ALL),
    "token_weights": ("norm", ALL),
    "refresh_every": (5, ALL),
    "refresh_share": (0.1, {**ALL, "refresh_every": 5}),
    "refresh_grow": ("gradient2", {**ALL, "refresh_every": 5}),
    "holdout": (0.25, ALL),
    "patience": (3, {**ALL, "holdout": 0.25}),
    "epochs_where": ("error", {**ALL, "holdout": 0.25}),
    "target": ("dense-stream", ALL),
    "input": ("dense-stream", ALL),
    "statistics": ("input", {}),
    "mix": (0.25, {"input": "mix", "target": "dense-stream"}),
    "eval_seqlen": (64, {}),
    "eval_tokens": (500, {}),
    "eval_limit": (5, {"eval_tasks": "piqa"}),
    "seed": (1, {}),
    "streams": ("disk", {}),
    "stream_dtype": ("bfloat16", ALL),
}
NOTHING = {"recover": "none", "prune": "zeros", "eval": ""}  # with which none of them has an effect


OF_SECTIONS = {flat_name(field) for section in SECTIONS.values() for field in dataclasses.fields(section)}


def test_every_setting_is_among_them():
    assert ALWAYS | SETTINGS.keys() == all_flat_names()
    assert not ALWAYS & SETTINGS.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_without_effect_is_refused_by_name(name):
    value, partners = SETTINGS[name]
    flag = "--" + name.replace("_", "-")
    made = EBFTConfig.preset("paper", **partners, **{name: value})
    assert made.flat()[name] == (list(value) if isinstance(value, tuple) else value)
    assert made.has_effect(name)
    assert EBFTConfig.of(**made.flat()) == made
    if name in OF_SECTIONS:
        said = rf"^{flag} .*(has no effect with .*: it needs |; expected --(structured|pattern) with it$)"
    else:
        said = rf"^{flag} is a setting of --(prune|refine|recover) \w+.*, and .*; expected .*, or no such setting$"
    for preset in PRESETS:
        if PRESETS[preset].get(name) != value:
            with pytest.raises(EBFTError, match=said):
                EBFTConfig.preset(preset, **NOTHING, **{name: value})


# What the class that has a setting gives it, where that can be said on a command line and asks for something.
USUAL = {
    name: value
    for name, (_, partners) in SETTINGS.items()
    if (value := EBFTConfig.preset("paper", **partners).flat()[name]) not in (None, False, "", [])
    and name not in partners
}


@pytest.mark.parametrize("name", USUAL)
def test_a_flag_is_meant_also_where_it_says_what_is_usual(name, tmp_path):
    value = USUAL[name]
    flag, said = "--" + name.replace("_", "-"), value if isinstance(value, list) else [value]
    line = [flag] if value is True else [flag, *map(str, said)]
    nothing = ["--preset", "paper", "--recover", "none", "--prune", "zeros", "--eval", ""]
    for file in ([], ["--config", str(tmp_path / "run.yaml")]):
        config = EBFTConfig.preset("paper", **{**NOTHING, name: value})  # a keyword may be one of a whole dictionary
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.flat()))
        with pytest.raises(EBFTError, match=rf"^{flag} "):
            parse_args([*nothing, *file, *line])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("recover", ["none", *recoveries.names()])
def test_what_a_preset_says_is_never_refused(preset, recover):
    for prune in ({"prune": "zeros"}, {"prune": "magnitude"}, {"pattern": "2:4"}, {"structured": True}):
        made = EBFTConfig.preset(preset, recover=recover, eval="", **prune)
        assert EBFTConfig.of(**made.flat()) == made
        assert EBFTConfig.preset("paper", **made.flat()) == made  # as a YAML file gives it back


def test_several_are_named_together_and_a_schedule_takes_the_place_of_a_share():
    with pytest.raises(EBFTError) as error:
        EBFTConfig.preset("demo", recover="none", micro_batch=1, holdout=0.5)
    assert str(error.value) == (
        "--micro-batch 1 --holdout 0.5 have no effect with --recover none: they need a recovery"
    )
    said = r"^--lr is a setting of --recover ebft, and --recover is lora; expected --recover ebft, or no such setting$"
    with pytest.raises(EBFTError, match=said):
        EBFTConfig.preset("demo", recover="lora", moments="int8", lr=0.5, unit="pair")
    said = r"^--sparsity 0\.55 has no effect with .*--schedule 0\.5,0\.6: it needs a criterion"
    with pytest.raises(EBFTError, match=said):
        EBFTConfig.of(sparsity=0.55, schedule="0.5,0.6")
    steps = EBFTConfig.of(schedule="0.45,0.65").steps
    assert [step.prune.sparsity for step in steps] == [0.45, 0.65]


# --- a terminal that is gone ------------------------------------------------------------------------------------------


class Gone(io.StringIO):
    """A stream whose reader has gone away, or whose device is full."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        raise OSError(28, "No space left on device")


def test_a_stream_that_loses_what_it_cannot_deliver():
    closed = io.StringIO()
    closed.close()
    for stream in (None, Gone(), closed):
        lasting = Lasting(stream)
        assert lasting.write("word") == 4
        lasting.flush()
        print("a line", file=lasting, flush=True)
    said = io.StringIO()
    print("a line", file=Lasting(said))
    assert said.getvalue() == "a line\n"


def test_a_run_that_nobody_listens_to(short_run, tmp_path, monkeypatch, tiny):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in short_run().items()]
    for gone in (Gone(), None):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", gone)
            patched.setattr(sys, "stdout", gone)
            assert main([*flags, "--overwrite"]) == 0
            assert main([*flags, "--plan"]) == 0
            assert main([*flags, "--sparsity", "2"]) == 2
            run_ebft(config=EBFTConfig.of(**short_run(overwrite=True)))  # in Python too
    assert not audit(str(tmp_path / "out"), str(tiny / "model")).faults


@pytest.mark.parametrize(
    "to",
    ["<&- >&- 2>&-", pytest.param(">/dev/full 2>/dev/full", marks=SLOW), pytest.param("2>&1 | head -n 0", marks=SLOW)],
)
def test_the_interpreter_ends_in_peace_too(short_run, tmp_path, to):
    """What is left in its buffers, and descriptors that a file of the run could take."""
    flags = " ".join(f"--{name.replace('_', '-')}={value}" for name, value in short_run().items())
    command = f"set -o pipefail; {sys.executable} -m ebft.run {flags} {to}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "out" / "ebft_summary.json").is_file()


INTERRUPTED = """
import os, signal, sys
import ebft.run, ebft.pipeline.run
signal.signal(signal.SIGINT, signal.default_int_handler)

def run_ebft(config, reporter, since):
    try:
        os.kill(os.getpid(), signal.{first})
    finally:
        os.kill(os.getpid(), signal.{second}) if "{second}" else None

ebft.pipeline.run.run_ebft = run_ebft
code = ebft.run.main([])
os.kill(os.getpid(), signal.SIGINT) if "{after}" else None
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("first", "second", "after", "code", "says"),
    [
        ("SIGINT", "SIGINT", "", 130, "interrupted again, and stopped at once"),
        pytest.param("SIGTERM", "SIGINT", "", 130, "interrupted again, and stopped at once", marks=SLOW),
        pytest.param("SIGINT", "SIGTERM", "", 143, "interrupted again, and stopped at once", marks=SLOW),
        ("SIGINT", "", "too late", -signal.SIGINT, "interrupted; nothing was finished"),
    ],
)
def test_a_second_interrupt_is_one_line(first, second, after, code, says, tmp_path):
    script = INTERRUPTED.format(first=first, second=second or "SIGINT", after=after)
    if not second:
        script = script.replace('if "SIGINT" else', 'if "" else')
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code
    assert [line for line in lines if line.startswith("ebft: ")] == [lines[-1]]
    assert lines[-1].startswith(f"ebft: {says}")
    assert "Traceback" not in done.stderr


def test_what_the_background_does_not_hear_stays_unheard(monkeypatch):
    monkeypatch.setattr("ebft.pipeline.run.run_ebft", lambda **given: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            assert main([]) == 0
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
