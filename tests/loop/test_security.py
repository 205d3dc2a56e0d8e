"""Hostile files: nothing that is read runs code, leads out of its folder, keeps a run waiting or becomes markup."""

import json
import os
import shutil
import socket
import stat
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from conftest import random_model
from faults import refused
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ebft
from ebft import EBFTConfig, EBFTError, RunResult, run_ebft
from ebft.audit import main as audit_main
from ebft.cli.app import parse_args
from ebft.compress import main as compress_main
from ebft.compressed.layers import save_compressed
from ebft.files import check_model_folder, checksum
from ebft.model.checkpoint import load_config, load_model, load_tokenizer, open_model
from ebft.model.limits import LAYERS, SIZE, check_settings
from ebft.model.tensors import ModelWeights, ShardedWeights
from ebft.output.audit import audit
from ebft.output.card import model_card
from ebft.output.charts import Chart
from ebft.output.figures import one_line, without_folder
from ebft.output.folder import OutputFolder
from ebft.output.page import report_page
from ebft.plan.planner import make_plan
from ebft_kernels import PackedMask, load_masks, save_masks

FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
OWN_CODE = """
from pathlib import Path
Path({mark!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A finished run, which no test touches."""
    out = tmp_path_factory.mktemp("finished") / "out"
    text = str(tiny / "text.txt")
    small = {"samples": 4, "seqlen": 16, "batch_size": 2, "epochs": 1, "eval_seqlen": 32, "device": "cpu"}
    run_ebft(
        config=EBFTConfig.preset(
            "demo", model=str(tiny / "model"), output=str(out), calibration=text, eval=text, **small
        )
    )
    return out


@pytest.fixture
def out(finished, tmp_path):
    """A copy to damage."""
    return shutil.copytree(finished, tmp_path / "out")


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the model to damage."""
    return shutil.copytree(tiny / "model", tmp_path / "model")


def change_json(file, **changes):
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps(content))


# --- code ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def booby_trapped(out, tmp_path, monkeypatch):
    """An output that brings code, and says that it may be run; the file that is there once it was."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark = tmp_path / "mark"
    (out / "own.py").write_text(OWN_CODE.format(mark=str(mark)))
    code = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change_json(out / "config.json", model_type="own", auto_map=code)
    summary = json.loads((out / "ebft_summary.json").read_text())
    summary["config"]["trust_remote_code"] = True
    (out / "ebft_summary.json").write_text(json.dumps(summary))
    return out, mark


def test_no_file_that_is_read_allows_its_code(booby_trapped, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *said: "y")  # which transformers asks for where nothing is said
    folder, mark = booby_trapped
    assert audit_main([str(folder)]) == 1
    assert any("comes with code of its own" in fault for fault in audit(str(folder)).faults)
    for use in (
        lambda: RunResult.read(folder).model,
        lambda: open_model(str(folder)),
        lambda: load_model(str(folder)),
        lambda: load_config(str(folder)),
        lambda: make_plan(EBFTConfig.of(model=str(folder), device="cpu", eval="")),
        lambda: save_compressed(str(folder), str(tmp_path / "small")),
    ):
        with pytest.raises(EBFTError, match="comes with code of its own, which runs only with --trust-remote-code"):
            use()
    change_json(folder / "config.json", quantization_config={"quant_method": "ebft", "format": 2, "layers": {}})
    with pytest.raises(EBFTError, match="comes with code of its own, which runs only with --trust-remote-code"):
        ebft.load_compressed(folder)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert compress_main([str(folder), str(tmp_path / "small")]) == 2
    assert not mark.exists()


def test_the_command_line_itself_allows_code(booby_trapped):
    folder, mark = booby_trapped
    audit(str(folder), trust_remote_code=True)
    assert mark.read_text() == "ran"


def test_a_result_trusts_as_its_run_was_told_to(booby_trapped):
    folder, mark = booby_trapped
    RunResult.read(folder, trust_remote_code=True).model  # noqa: B018
    assert mark.read_text() == "ran"


def test_resume_takes_no_permission_from_what_it_finds(finished, tiny, short_run, silent, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "ebft_summary.json").read_text())
    summary["config"]["trust_remote_code"] = True
    (tmp_path / "out" / "ebft_summary.json").write_text(json.dumps(summary))
    config = EBFTConfig.preset("demo", **short_run(resume=True, prompts="builtin"))
    result = run_ebft(config=config, reporter=silent)
    assert "there is nothing left to do" in silent.console.file.getvalue()
    assert not result._trust_remote_code
    assert run_ebft(config=EBFTConfig.of(**config.flat() | {"trust_remote_code": True}))._trust_remote_code


@pytest.mark.parametrize("value", ["evil/kernel:attention", {"": "evil/kernel"}])
def test_a_configuration_cannot_bring_kernels_from_the_hub(model, value, short_run, tmp_path):
    change_json(model / "config.json", attn_implementation=value, _attn_implementation=value)
    for use in (
        lambda: open_model(str(model)),
        lambda: load_model(str(model)),
        lambda: make_plan(EBFTConfig.of(**short_run(model=str(model)))),
        lambda: save_compressed(str(model), str(tmp_path / "small")),
    ):
        with pytest.raises(EBFTError, match=r"attn_implementation .*, code from the hub, which runs only with --trust"):
            use()


def test_a_settings_file_cannot_allow_code(tmp_path):
    file = tmp_path / "run.yaml"
    for name in ("trust_remote_code", "trust-remote-code"):
        file.write_text(f"{name}: true\n")
        with pytest.raises(EBFTError, match="has trust_remote_code; expected --trust-remote-code on the command line"):
            parse_args(["--config", str(file)])
    file.write_text("model:\n  trust-remote-code: true\n")  # in its section
    with pytest.raises(EBFTError, match="has trust_remote_code; expected --trust-remote-code on the command line"):
        parse_args(["--config", str(file)])
    file.write_text("trust_remote_code: false\n")
    assert not parse_args(["--config", str(file)])[0].model.trust_remote_code
    assert parse_args(["--config", str(file), "--trust-remote-code"])[0].model.trust_remote_code


# --- names --------------------------------------------------------------------------------------------------------

NAMES = st.text(
    st.one_of(st.sampled_from("<>&\"'`|*_~[](){}#!$\\-=+:@/.,\n\r\t\x1b\u2028\u202e\udcff é漢x"), st.characters()),
    min_size=1,
    max_size=40,
)


def a_summary(name, text):
    values = {"dense": 15.1, "pruned": 62.0, "recovered": 25.5}
    merged = {"sparsity": 0.1, "perplexity": {text: 3.0}}
    whole = {"notes": [text], "losses": [3.0, 2.0], "held_out_before": None, "held_out_after": None}
    config = {"pattern": None, "sparsity": 0.6, "recover": "ebft+lora", "uniform": False, "lora_masked": True}
    return {
        "model": name,
        "recipe": f"{text} 60%",
        "output": "out",
        "perplexity": {text: values},
        "zero_shot": {text: {"documents": 3, "acc,none": 0.5, "acc_stderr,none": 0.1}},
        "seconds": 75.0,
        "peak_memory": {"resident_bytes": 2**30, "anonymous_bytes": 2**29},
        "sparsity": 0.6,
        "asked_sparsity": 0.6,
        "whole_model": {"lora": {**whole, "plain_merge": merged}},
        "source": {"base_model": "a/b", "license": "mit", "tags": ["c"]},
        "size": {"dense": 2**30, "saved": 2**30, "compressed": 2**29},
        "datasets": {},
        "calibration_texts": [text],
        "continuations": {
            "prompts": [text],
            "tokens": 40,
            "stages": {stage: [f"{text} {name}"] for stage in ("dense", "pruned", "recovered")},
            "left_out": None,
        },
        "calibration": {"tokens": 5, "source": text, "windows": "packed"},
        "versions": {"ebft": "0.1.0"},
        "config": {**config, "model": name, "eval": text},
    }


class Tags(HTMLParser):
    """The tags and comments of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(attrs)))

    def handle_comment(self, data):
        self.tags.append(("comment", ()))

    def handle_data(self, data):
        self.text += data


@FAST
@example(name="/", text="/")  # a path without a name
@example(name="/0", text="0")  # of a path the card has the name alone
@given(name=NAMES, text=NAMES)
def test_a_card_shows_any_name_as_it_is(name, text):
    begin, front, body = model_card(a_summary(name, text)).split("---\n", 2)
    front = yaml.safe_load(front)
    assert begin == ""
    assert front["library_name"] == "transformers"
    measured = front.get("model-index", [])
    known, of_text = (one_line(without_folder(given)) for given in (name, text))
    assert [entry["name"] for entry in measured] == [known or "model"] * bool(of_text)
    plain = model_card(a_summary("a", "b")).split("---\n", 2)[2]
    assert rendered(body).tags == rendered(plain).tags


def rendered(body):
    return Tags(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(body))


@pytest.mark.parametrize("name", ["a|b", "`a`", "a\n---\nb", "<b>x", "[a](http://b)", "__a__", "a\\|b", "&lt;", "$x$"])
def test_a_name_in_a_card_reads_as_given(name):
    body = model_card(a_summary(name, name)).split("---\n", 2)[2]
    assert f"{one_line(name)}, 60% sparse" in rendered(body).text


@FAST
@given(name=NAMES, text=NAMES)
def test_no_name_becomes_markup_in_the_page(name, text):
    """Curves aside, which hold no name of a user's and take matplotlib its time."""
    block = {"name": text, "notes": [text], "block": 0, "losses": [], "relative_error_after": 0.1}
    block |= {"relative_error_before": 0.2, "seconds": 1.0, "peak_memory_bytes": 1, "sparsity": 0.5}
    block |= {"matrices": {"a": 0.5}}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ebft.output.page.chart", lambda title, note, draw: Chart(title, note, "<svg></svg>"))
        patched.setattr("ebft.output.page.perplexity_bars", lambda text, values: Chart(text, "", "<svg></svg>"))
        page, plain = (Tags(report_page(a_summary(*names), [block])) for names in ((name, text), ("a", "b")))
    assert page.tags == plain.tags


def test_the_closing_table_takes_brackets_for_text(silent):
    silent.table(a_summary("m[/b]", "t[/red]"))
    assert "m[/b]" in silent.console.file.getvalue()
    assert "t[/red]" in silent.console.file.getvalue()


def test_a_run_on_a_text_whose_name_is_markup(tiny, short_run, tmp_path, silent):
    text = tmp_path / os.fsdecode(b"x<b>t|[red]\xff\n---\n`.txt")
    shutil.copy(tiny / "text.txt", text)
    result = run_ebft(config=EBFTConfig.preset("demo", **short_run(eval=str(text), recover="none")), reporter=silent)
    assert "<b>" not in (result.output / "report.html").read_text()
    assert json.loads((result.output / "ebft_summary.json").read_text())["perplexity"].keys() == {str(text)}
    assert yaml.safe_load((result.output / "README.md").read_text().split("---\n")[1])["tags"]


# --- files of a model -----------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path, tokenizer):
    """A model in several shards."""
    folder = tmp_path / "sharded"
    random_model("llama-gqa").save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return folder


def everything_refuses(folder, says):
    """Every entrance gives this sentence, at once."""
    for use in (open_model, load_model):
        with pytest.raises(EBFTError) as error:
            use(str(folder))
        assert says in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("elsewhere", ["../outside.safetensors", "/x", "a/../../b", "..", "", 3, "a\\b"])
def test_an_index_that_leads_out_of_the_folder(sharded, elsewhere):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    shutil.copy(sharded / content["weight_map"][name], sharded.parent / "outside.safetensors")
    content["weight_map"][name] = elsewhere
    index.write_text(json.dumps(content))
    everything_refuses(sharded, "expected the name of a file in the same folder")
    index.rename(sharded / "pytorch_model.bin.index.json")
    with pytest.raises(EBFTError, match="expected the name of a file in the same folder"):
        load_model(str(sharded))


def test_an_index_of_nothing(sharded, tmp_path, out):
    index = sharded / "model.safetensors.index.json"
    change_json(index, weight_map={})
    everything_refuses(sharded, "model.safetensors.index.json is no index of shards: it lists no tensors")
    assert compress_main([str(sharded), str(tmp_path / "small")]) == 2
    shutil.copy(index, out / index.name)
    assert f"{out / index.name} is no index of shards: it lists no tensors" in audit(str(out)).faults


def test_json_that_is_nested_too_deeply(sharded, out, short_run, tmp_path):
    deep = 100_000 * "["
    (tmp_path / "shares.json").write_text(deep)
    said = refused(short_run("other", allocation=str(tmp_path / "shares.json")))
    assert said.endswith("expected uniform, owl or a JSON file: it is nested too deeply")
    (sharded / "model.safetensors.index.json").write_text(deep)
    everything_refuses(sharded, "is no index of shards: ValueError it is nested too deeply")
    (out / "model.safetensors.index.json").write_text(deep)
    assert any("it is nested too deeply" in fault for fault in audit(str(out)).faults)
    (out / "config.json").write_text(deep)
    with pytest.raises(EBFTError, match="is no compressed model: it is nested too deeply"):
        ebft.load_compressed(out)
    for name in ("blocks.jsonl", "ebft_summary.json"):
        (out / name).write_text(deep)
        with pytest.raises(EBFTError, match="is not what a run leaves: it is nested too deeply"):
            RunResult.read(out)
    assert "is not what a run leaves" in refused(short_run(resume=True))
    assert audit_main([str(out)]) == 2


@pytest.mark.parametrize("content", ["[]", "{}", '{"config": 3}'])
def test_a_summary_of_something_else(out, content):
    (out / "ebft_summary.json").write_text(content)
    with pytest.raises(EBFTError, match=r"ebft_summary\.json is not what a run writes"):
        RunResult.read(out)
    assert audit_main([str(out)]) == 2


def test_a_tensor_in_two_shards(sharded):
    one, other = sorted(sharded.glob("model-*.safetensors"))[:2]
    tensors = load_file(one)
    name = next(iter(tensors))
    save_file({**load_file(other), name: tensors[name] + 1}, other, metadata={"format": "pt"})
    everything_refuses(sharded, f"holds {name}, which another file of the same model holds too")


def fifo(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def a_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(path.parent)  # the address of a socket is short
        made.bind(path.name)
        os.chdir(here)


@pytest.mark.parametrize("kind", [fifo, device, a_socket])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_of_a_model_that_is_none(model, kind, name):
    (model / name).unlink()
    kind(model / name)
    said = {fifo: "is a pipe; expected", device: "is a device; expected", a_socket: "is a socket; expected"}[kind]
    everything_refuses(model, said)
    for use in (load_config, load_tokenizer):
        with pytest.raises(EBFTError, match=said[:9]):
            use(str(model))


def test_a_folder_as_a_shard(sharded, out):
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    shard.unlink()
    shard.mkdir()
    everything_refuses(sharded, "is a folder; expected a file")
    (out / "model.safetensors").unlink()
    (out / "model.safetensors").mkdir()
    assert any("model.safetensors is a folder; expected a file" in fault for fault in audit(str(out)).faults)


def test_pipes_beside_a_model(model, short_run, tmp_path, finished, tiny):
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    for said in (
        refused(short_run() | {"calibration": str(pipe)}),
        refused(short_run() | {"eval": str(pipe)}),
        refused(short_run() | {"prune": str(pipe)}),
        refused(short_run() | {"allocation": str(pipe)}),
    ):
        assert "pipe.txt" in said
    with pytest.raises(EBFTError, match="is a pipe; expected a file"):
        parse_args(["--config", str(pipe)])
    with pytest.raises(ValueError, match="is no file; expected a safetensors file"):
        load_masks(pipe)
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    with pytest.raises(EBFTError, match="is a pipe; expected a file"):
        ebft.load_compressed(model)
    broken = shutil.copytree(finished, tmp_path / "broken")
    (broken / "masks.safetensors").unlink()
    os.mkfifo(broken / "masks.safetensors")
    assert audit_main([str(broken)]) == 2


def test_links_out_of_a_models_folder(model, tmp_path):
    secret = tmp_path / "secret.jinja"
    secret.write_text("a private key")
    (model / "chat_template.jinja").symlink_to(secret)
    everything_refuses(model, "chat_template.jinja is a link out of the folder")
    (model / "chat_template.jinja").unlink()
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "x.jinja").symlink_to(secret)
    everything_refuses(model, "x.jinja is a link out of the folder")
    shutil.rmtree(model / "additional_chat_templates")
    (model / "model.safetensors").rename(model / "real")
    (model / "model.safetensors").symlink_to("real")
    (model / "gone.json").symlink_to("nowhere")
    open_model(str(model))


@pytest.mark.parametrize("blob", ["models--a--b/blobs/0a1b", f"blobs/0a/{'0a' * 32}"])
def test_the_links_of_a_hub_cache(model, tmp_path, blob):
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "rev"
    shutil.copytree(model, snapshot)
    stored = tmp_path / "hub" / blob
    stored.parent.mkdir(parents=True)
    (snapshot / "model.safetensors").rename(stored)
    (snapshot / "model.safetensors").symlink_to(os.path.relpath(stored, snapshot))
    open_model(str(snapshot))
    link = tmp_path / "link"
    link.symlink_to(snapshot)  # and a link to the folder itself
    check_model_folder(link)


# --- sizes ----------------------------------------------------------------------------------------------------------


def built(*args, **kwargs):
    pytest.fail("something was built")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 100_000},
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**9},
        {"intermediate_size": 10**9},
        {"vocab_size": 10**9},
        {"num_attention_heads": 10**30},
        {"head_dim": 1e12},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"num_hidden_layers": 4000, "hidden_size": 10**6, "intermediate_size": 10**6},
    ],
)
def test_sizes_that_no_model_has(model, changes, monkeypatch):
    change_json(model / "config.json", **changes)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", built)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", built)
    everything_refuses(model, "its configuration")
    with pytest.raises(EBFTError, match="expected at most"):
        make_plan(EBFTConfig.of(model=str(model), device="cpu", eval=""))


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 3000}, {"hidden_size": 40_000}, {"vocab_size": 10**6}])
def test_sizes_that_the_files_do_not_have(model, changes, monkeypatch):
    change_json(model / "config.json", **changes)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", built)
    with pytest.raises(EBFTError, match="and its files hold"):
        open_model(str(model))


def test_the_largest_models_are_not_refused():
    """DeepSeek-V3 (671e9 parameters), Kimi K2 (1e12), Llama 3.1 405B, one of 2e12, and one of ten times as many."""
    deepseek = {"num_hidden_layers": 61, "hidden_size": 7168, "intermediate_size": 18432, "n_routed_experts": 256}
    for real in (
        deepseek | {"vocab_size": 129280, "moe_intermediate_size": 2048, "max_position_embeddings": 163840},
        deepseek | {"vocab_size": 163840, "n_routed_experts": 384},
        {"num_hidden_layers": 126, "hidden_size": 16384, "intermediate_size": 53248, "vocab_size": 128256},
        {
            "text_config": {
                "num_hidden_layers": 120,
                "hidden_size": 20480,
                "intermediate_size": 81920,
                "num_experts": 16,
            }
        },
        {"num_hidden_layers": 400, "hidden_size": 65536, "intermediate_size": 262144, "rope_theta": 10**10},
    ):
        check_settings(real, "it")
    check_settings({"num_hidden_layers": LAYERS, "vocab_size": SIZE, "eos_token_id": 10**9, "use_cache": True}, "it")


# --- permissions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_all_saved_files_follow_the_umask(umask, mode, finished, tmp_path):
    before = os.umask(umask)
    try:
        save_compressed(str(finished), str(tmp_path / "small"))
        save_masks({"w": PackedMask.ones((4, 32))}, tmp_path / "small" / "other.safetensors")
        with OutputFolder(str(tmp_path / "out"), overwrite=False) as folder:
            folder.save_model(random_model("llama-gqa"), 2**30)
            folder.save_masks([{"w": PackedMask.ones((4, 32))}])
            folder.write_json("ebft_summary.json", {})
            folder.commit()
    finally:
        os.umask(before)
    files = [*tmp_path.glob("small/*"), *tmp_path.glob("out/*")]
    assert {f.name for f in files} >= {"model.safetensors", "masks.safetensors", "config.json", "other.safetensors"}
    modes = {file: oct(stat.S_IMODE(file.stat().st_mode)) for file in files}
    assert modes == dict.fromkeys(files, oct(mode))


def test_masks_keep_the_permissions_of_the_file_they_replace(tmp_path):
    file = tmp_path / "masks.safetensors"
    file.touch(mode=0o640)
    save_masks({"w": PackedMask.ones((4, 32))}, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert load_masks(file)["w"].density() == 1


# --- where the output goes --------------------------------------------------------------------------------------------


def test_an_output_that_is_a_link_is_followed(short_run, tmp_path, silent):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")  # where nothing is yet
    for changes in ({}, {"resume": True}, {"overwrite": True}):
        run_ebft(config=EBFTConfig.preset("demo", **short_run(recover="none", **changes)), reporter=silent)
        assert (tmp_path / "out").is_symlink()
        assert {path.name for path in (tmp_path / "disk").iterdir()} == {"real"}
        assert (tmp_path / "disk" / "real" / "model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "disk"}


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("x" * 300, "a name of 308 bytes; expected at most 255"),
        ("é" * 126, "a name of 260 bytes; expected at most 255"),
        ("x" * 250, "a name of 258 bytes; expected at most 255"),
        ("deep/" + "x" * 300 + "/out", "a name of 300 bytes; expected at most 255"),
        ("a\0b", "expected a path that can be"),
        ("a\ud800b", "expected a path that can be"),
        ("/proc/out", "cannot be written"),
        ("/proc", "is a mount point, which no run can replace; choose a folder in it"),
        ("loop/out", "cannot be written"),
        ("loop", "expected a path that can be"),
        ("dangling/out", "cannot be written"),
        ("file/out", "cannot be written"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_any_work(output, says, short_run, tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to("/proc/nowhere/x")
    (tmp_path / "file").touch()
    monkeypatch.setattr("ebft.pipeline.run.prepare_run", lambda *args: pytest.fail("work began"))
    monkeypatch.chdir(tmp_path)
    given = short_run()
    assert says in refused({**given, "output": output})
    assert {path.name for path in tmp_path.iterdir()} == {"loop", "dangling", "file"}


def test_an_output_on_a_read_only_file_system(short_run, tmp_path, monkeypatch):
    def read_only(path, *args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("ebft.pipeline.run.prepare_run", lambda *args: pytest.fail("work began"))
    monkeypatch.setattr(Path, "mkdir", read_only)
    assert "cannot be written: Read-only file system" in refused(short_run())


def test_a_part_of_the_same_file_system_that_is_mounted(short_run, tmp_path, monkeypatch):
    (tmp_path / "out here").mkdir()
    line = f"36 35 98:0 / {str(tmp_path / 'out here').replace(' ', chr(92) + '040')} rw,noatime - ext4 /dev/root rw\n"
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: line.encode() if str(p) == "/proc/self/mountinfo" else real(p))
    assert "is a mount point" in refused(short_run(output="out here"))


def test_overwrite_keeps_what_no_run_made(finished, short_run, tmp_path, silent, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "out")
    given = short_run(overwrite=True, recover="none")
    (out / "notes").mkdir()
    (out / "notes" / "thesis.tex").write_text("precious")
    (out / "link").symlink_to(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("ebft.pipeline.run.prepare_run", lambda *args: pytest.fail("work began"))
        assert "--overwrite would delete link and 1 others" in refused(given)
    (out / "link").unlink()
    assert f"--overwrite would delete notes/thesis.tex in {out}, which no run made" in refused(given)
    assert (out / "notes" / "thesis.tex").read_text() == "precious"
    shutil.rmtree(out / "notes")
    run_ebft(config=EBFTConfig.preset("demo", **given), reporter=silent)
    assert json.loads((out / "ebft_summary.json").read_text())["config"]["recover"] == "none"


def test_a_file_that_comes_while_a_run_works_is_kept(finished, short_run, tmp_path, silent, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "out")
    real = OutputFolder.save_masks

    def save(self, masks):
        (out / "thesis.tex").write_text("precious")
        return real(self, masks)

    monkeypatch.setattr(OutputFolder, "save_masks", save)
    given = short_run(overwrite=True, recover="none")
    assert "--overwrite would delete thesis.tex" in refused(given)
    monkeypatch.undo()
    (out / "thesis.tex").rename(tmp_path / "thesis.tex")
    run_ebft(config=EBFTConfig.preset("demo", **given, resume=True), reporter=silent)  # nothing was lost
    assert json.loads((out / "ebft_summary.json").read_text())["config"]["recover"] == "none"


def test_overwrite_of_an_output_that_lists_no_files(finished, short_run, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    change_json(out / "ebft_summary.json", files=None)
    assert "does not list the files that its run made" in refused(short_run(overwrite=True))


# --- what a run depends on --------------------------------------------------------------------------------------------


def test_every_changed_byte_of_a_model_is_noticed(model):
    file, times = model / "model.safetensors", (model / "model.safetensors").stat()
    before = open_model(str(model)).weights.fingerprint
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(header, len(content), (40,), generator=generator).tolist()
    for place in [header, len(content) - 1, *places]:
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` would have it
        assert checksum(file) != before, place
    file.write_bytes(content)
    assert open_model(str(model)).weights.fingerprint == before


def test_a_fingerprint_reads_a_file_once(model, monkeypatch):
    weights = open_model(str(model)).weights
    assert isinstance(weights, ShardedWeights)
    monkeypatch.setattr("ebft.files._AT_ONCE", 2**16)
    read = []
    weights.on_part_read = read.append
    before = weights.fingerprint
    assert len(read) > 1
    assert read == sorted(read)
    assert read[-1] == 1
    (model / "model.safetensors").unlink()
    assert weights.fingerprint == before


def test_every_changed_value_in_memory_is_noticed():
    model = random_model("llama-gqa")
    before = ModelWeights(model).fingerprint
    for place in (0, 777, -1):
        with torch.no_grad():
            model.model.embed_tokens.weight.view(-1)[place] += 1
        after = ModelWeights(model).fingerprint
        assert after != before
        before = after


@pytest.mark.parametrize(("size", "at_once"), [(0, 4), (4, 4), (11, 4), (12, 5)])
def test_a_checksum_goes_by_content_and_borders(size, at_once, tmp_path, monkeypatch):
    monkeypatch.setattr("ebft.files._AT_ONCE", at_once)
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(bytes(range(size)))
    other.write_bytes(bytes(range(size)))
    assert checksum(one) == checksum(other) == checksum([other])
    assert checksum([one, other]) != checksum(one)
    other.write_bytes(bytes(range(size)) + b"x")
    assert checksum(one) != checksum(other)


def test_resume_notices_another_model_file_and_another_code(short_run, model, tmp_path, silent, monkeypatch):
    given = short_run(model=str(model), resume=True)
    with monkeypatch.context() as patched:
        patched.setattr("ebft.pipeline.run._save", lambda job: (_ for _ in ()).throw(EBFTError("stopped")))
        assert refused(given) == "stopped"
    with monkeypatch.context() as patched:
        patched.setattr("ebft.pipeline.summary.code_digest", lambda: "another")
        assert "was begun with another version (code: " in refused(given)
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)
    assert "was begun with another model (weights: " in refused(given)


def test_the_code_of_both_packages_counts(monkeypatch, tmp_path):
    from ebft import version

    def digest(folder):
        monkeypatch.setattr(version, "__file__", str(folder / "version.py"))
        version.code_digest.cache_clear()
        return version.code_digest()

    copy = shutil.copytree(Path(ebft.__file__).parent, tmp_path / "ebft", ignore=shutil.ignore_patterns("__pycache__"))
    before = digest(Path(ebft.__file__).parent)
    assert digest(copy) == before
    walk = copy / "pipeline" / "walk.py"
    walk.write_text(walk.read_text() + "\n")
    assert digest(copy) != before
    version.code_digest.cache_clear()
