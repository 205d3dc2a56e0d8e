"""Models that are never whole in memory, and streams that need not be there: the same numbers, bit for bit."""

import gc
import json
import threading
import weakref

import pytest
import torch
from conftest import FAMILIES, VOCABULARY, random_model, with_effect
from faults import assert_same
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ebft.data.streams
from ebft import BlockReconstructor, EBFTError, run_ebft
from ebft.config import EBFTConfig
from ebft.config.fields import parse_bytes
from ebft.data.calibration import calibration_tokens
from ebft.data.streams import Store, Stream, Streams, carry
from ebft.evaluation.perplexity import perplexities
from ebft.model.checkpoint import load_model, open_model
from ebft.model.decoder import Decoder
from ebft.model.tensors import ModelWeights, ShardedWeights, Tensors
from ebft.output.folder import OutputFolder
from ebft.plan.planner import make_plan
from ebft.recovery.optimizers.adamw import AdamW

CPU = torch.device("cpu")
TIED = ("llama", "qwen2", "opt", "gpt2", "gemma2", "gemma3", "mixtral")


def saved(model, folder, tokenizer=None, **options):
    model.save_pretrained(folder, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def assert_same_model(folder):
    """The streamed model against the one that transformers loads: parameters, buffers, logits."""
    said = []
    source, whole = open_model(folder, say=said.append), load_model(folder)
    assert isinstance(source.weights, ShardedWeights), said
    assert all(parameter.is_meta for parameter in source.model.parameters())
    expected = dict(whole.named_parameters(remove_duplicate=False))
    found = source.weights.read(expected)
    for name, parameter in expected.items():
        assert found[name].dtype == source.model.get_parameter(name).dtype == parameter.dtype, name
        assert torch.equal(found[name], parameter), name
        assert found[name].is_contiguous(), name
    buffers = dict(whole.named_buffers())
    assert dict(source.model.named_buffers()).keys() == buffers.keys()
    for name, buffer in source.model.named_buffers():
        assert buffer.dtype == buffers[name].dtype, name
        assert torch.equal(buffer, buffers[name]), name

    streamed, in_memory = Decoder(source.model, CPU, weights=source.weights), Decoder(whole, CPU)
    ids = torch.randint(VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1))
    outputs = []
    for decoder in (streamed, in_memory):
        hidden = decoder.enter(ids)
        for index in range(len(decoder)):
            hidden = decoder.run_block(index, decoder.working_block(index), hidden)
        outputs.append(decoder.exit(ids, hidden))
    assert torch.equal(*outputs)
    with torch.no_grad():
        logits = whole.float()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(outputs[0], logits, rtol=1e-3, atol=1e-3)
    return source, streamed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["untied, one file", "tied, shards, bfloat16"])
def test_streamed_loading_is_whole_loading(family, form, tmp_path):
    if form == "untied, one file":
        folder = saved(random_model(family, tie_word_embeddings=False), tmp_path)
    else:
        tied = {"tie_word_embeddings": True} if family in TIED else {}
        folder = saved(random_model(family, **tied).to(torch.bfloat16), tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 3
    source, decoder = assert_same_model(folder)
    # what was read turns back into what is stored
    stored = Tensors(sorted(tmp_path.glob("*.safetensors")))
    for index, name in enumerate(decoder.names):
        names = [f"{name}.{parameter}" for parameter, _ in decoder.stored_block(index).named_parameters()]
        back = source.weights.as_stored(source.weights.read(names))
        inside = [key for key in stored.names() if f".{name.split('.', 1)[1]}." in f".{key}"]
        assert sorted(back) == sorted(inside)
        assert all(torch.equal(back[key], stored[key]) and back[key].dtype == stored[key].dtype for key in back)


def test_experts_are_stored_one_by_one_and_worked_on_together(tmp_path):
    folder = saved(random_model("mixtral"), tmp_path)
    keys = Tensors([tmp_path / "model.safetensors"]).names()
    assert sum(".experts." in key for key in keys) == 3 * 4 * 3  # layers, experts, matrices
    source = open_model(folder)
    assert source.weights.read(["model.layers.0.mlp.experts.gate_up_proj"]).popitem()[1].shape == (4, 96, 32)


def test_what_is_tied_and_how_it_is_stored(tmp_path):
    """Under the head's name, under both names alike, and under both with different values: as transformers reads it."""
    model = random_model("llama", tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    saved(model, tmp_path)
    weights = load_file(file)
    embedding = weights["model.embed_tokens.weight"]
    for stored in (
        {"lm_head.weight": embedding},
        {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding.clone()},
        {"lm_head.weight": embedding + 1, "model.embed_tokens.weight": embedding},
    ):
        others = {name: weight for name, weight in weights.items() if name != "model.embed_tokens.weight"}
        save_file(others | stored, file, metadata={"format": "pt"})
        assert_same_model(str(tmp_path))


def test_a_dtype_of_its_own_stays(tmp_path):
    """Parameters have the dtypes of the files, not that of the configuration."""
    saved(random_model("llama").to(torch.bfloat16), tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    norm = "model.layers.1.input_layernorm.weight"
    weights[norm] = weights[norm].float() * 1.0001
    save_file(weights, file, metadata={"format": "pt"})
    source = open_model(str(tmp_path))
    assert torch.equal(source.weights.read([norm])[norm], weights[norm])
    assert source.model.get_parameter(norm).dtype == torch.float32
    assert source.model.dtype == torch.bfloat16


def test_what_cannot_be_streamed_is_loaded_whole_and_said(tmp_path):
    model = random_model("llama")
    saved(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    said = []
    source = open_model(str(tmp_path), say=said.append)
    assert isinstance(source.weights, ModelWeights)
    assert "is loaded whole: it is not stored as safetensors" in said[0]
    assert not any(parameter.is_meta for parameter in source.model.parameters())


def test_integer_weights_are_refused(tmp_path):
    saved(random_model("llama"), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.ones(48, 32, dtype=torch.int8)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EBFTError, match=r"up_proj\.weight is stored as torch\.int8; expected floating-point weights"):
        open_model(str(tmp_path))


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def given(tmp_path, tokenizer):
    """Settings of a run of a second on a model that is saved in shards."""

    def make(family="llama-gqa", output="out", dtype=torch.float32, **changes):
        folder = tmp_path / family
        if not folder.exists():
            saved(random_model(family).to(dtype), folder, tokenizer, max_shard_size="40KB")
        usual = {"model": str(folder), "samples": 6, "seqlen": 24, "epochs": 1, "batch_size": 4, "eval": "builtin"}
        usual |= {"eval_seqlen": 64, "output": str(tmp_path / output), "max_shard_size": "40KB"}
        return EBFTConfig.preset("demo", **with_effect(usual, changes))

    return make


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("ebft.pipeline.run.report_page", lambda summary, lines: "")


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "qwen3-moe"])
def test_the_output_is_an_ordinary_sharded_checkpoint(family, given, silent, tmp_path, tokenizer):
    result = run_ebft(config=given(family, dtype=torch.bfloat16, device="cpu"), reporter=silent)
    source, out = tmp_path / family, tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(out.glob("model-*-of-*.safetensors"))
    assert {shard.name for shard in shards} == set(index["weight_map"].values())
    stored, dense = Tensors(shards), Tensors(sorted(source.glob("*.safetensors")))
    assert stored.names() == dense.names() == sorted(index["weight_map"], key=stored.names().index)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in dense.shapes().values())
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 40_000
        assert {index["weight_map"][name] for name in tensors} == {shard.name}
    changed = {name for name in dense.names() if not torch.equal(stored[name], dense[name])}
    assert all(stored[name].dtype == dense[name].dtype == torch.bfloat16 for name in dense.names())
    assert not {name for name in changed if "layers." not in name and ".h." not in name}
    assert len(changed) >= len(result.masks)

    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")  # as anybody loads it
    assert result.model.state_dict().keys() == model.state_dict().keys()
    for name, mask in result.masks.items():
        assert torch.count_nonzero(model.get_parameter(name)[~mask.dense()]) == 0, name
    ours = perplexities(Decoder(model, CPU), {"builtin": evaluation_ids(tokenizer)})
    assert ours["builtin"] == result.summary["perplexity"]["builtin"]["recovered"]


def evaluation_ids(tokenizer):
    from ebft.data.calibration import evaluation_tokens

    return evaluation_tokens("builtin", tokenizer, seqlen=64).ids


@pytest.mark.parametrize("unit", ["block", "halves", "pair"])
def test_blocks_and_optimizers_are_gone_after_their_turn(unit, given, silent, monkeypatch):
    """Not some time later, when Python looks for cycles: on a GPU they would be in the next block's way."""
    made, most = {"blocks": [], "optimizers": []}, dict.fromkeys(("blocks", "optimizers"), 0)
    step = BlockReconstructor.step

    def noted(kind, make):
        def note(*args, **kwargs):
            thing = make(*args, **kwargs)
            made[kind].append(weakref.ref(thing))
            return thing

        return note

    def counted(*args, **kwargs):
        for kind, references in made.items():
            most[kind] = max(most[kind], sum(reference() is not None for reference in references))
        return step(*args, **kwargs)

    monkeypatch.setattr(Decoder, "working_block", noted("blocks", Decoder.working_block))
    monkeypatch.setattr(AdamW, "make", noted("optimizers", AdamW.make))
    monkeypatch.setattr(BlockReconstructor, "step", counted)
    gc.collect()
    gc.disable()
    try:
        run_ebft(config=given(eval="", unit=unit), reporter=silent)
    finally:
        gc.enable()
    assert most == {"blocks": 2 if unit == "pair" else 1, "optimizers": 1}


@pytest.mark.parametrize("family", ["llama-gqa", "mixtral", "gemma3"])
def test_a_streamed_run_is_one_in_memory(family, given, silent, tmp_path, tokenizer):
    streamed = run_ebft(config=given(family), reporter=silent)
    model = load_model(str(tmp_path / family))
    in_memory = run_ebft(model, given(family, output="memory"), tokenizer=tokenizer, reporter=silent)
    assert in_memory.model is model
    assert streamed.masks == in_memory.masks
    assert streamed.summary["perplexity"] == in_memory.summary["perplexity"]
    ours, theirs = (Tensors(sorted((tmp_path / out).glob("model*.safetensors"))) for out in ("out", "memory"))
    assert ours.names() == theirs.names()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.names())


def test_no_more_than_a_few_blocks_are_ever_read(given, silent, monkeypatch):
    """The next block is read in another thread; embeddings and head only while they are needed."""
    read, real = [], ShardedWeights.read

    def noted(self, names, tensors=None):
        names = list(names)
        read.append((names, threading.current_thread().name))
        return real(self, names, tensors)

    monkeypatch.setattr(ShardedWeights, "read", noted)
    monkeypatch.setattr(Decoder, "store_block", None)
    run_ebft(config=given(eval=""), reporter=silent)
    blocks = [(names[0].split(".")[2], thread) for names, thread in read if len(names) > 1]
    ahead = [number for number, thread in blocks if thread.startswith("ebft-reads-ahead")]
    assert ahead == ["1", "2"]
    of_head = [names for names, _ in read if "lm_head.weight" in names]
    assert of_head == 3 * [["lm_head.weight"]]  # for NaN, and for both sides of the check; nothing was measured
    assert all(len({name.split(".")[2] for name in names if "layers" in name}) <= 1 for names, _ in read)


MODES = {
    "the paper's": {"target": "sparse-stream"},
    "dense targets": {"target": "dense-stream"},
    "dense inputs": {"target": "dense-stream", "input": "dense-stream"},
}


@pytest.mark.parametrize("mode", MODES)
def test_streams_on_disk_are_streams_in_memory(mode, given, silent, tmp_path, monkeypatch):
    names = set()
    make = Store.make

    def noted(self, name, shape, *, again=False):
        if self.kind == "disk":
            names.add(name)
        return make(self, name, shape, again=again)

    monkeypatch.setattr(Store, "make", noted)
    for streams in ("host", "disk"):
        run_ebft(config=given(output=streams, streams=streams, **MODES[mode]), reporter=silent)
    assert_same(tmp_path / "host", tmp_path / "disk")
    alternate = {"inputs-0", "inputs-1"} | ({"targets-0", "targets-1"} if mode == "dense targets" else set())
    assert names == alternate | {"evaluation-0"}
    assert "hidden states: disk" in silent.console.file.getvalue()
    assert not (tmp_path / "disk" / "streams").exists()


def test_bfloat16_streams_round_and_nothing_else(given, silent, tmp_path):
    full, half = (
        run_ebft(config=given(output=dtype, stream_dtype=dtype, eval=""), reporter=silent)
        for dtype in ("float32", "bfloat16")
    )
    for one, other in zip(full.blocks, half.blocks, strict=True):
        assert other["loss_before"] == pytest.approx(one["loss_before"], rel=0.1)
        assert other["loss_before"] != one["loss_before"]
        assert other["loss_after"] < other["loss_before"]


def test_streams_go_to_disk_where_the_host_is_too_small(given, silent, capsys):
    needed = {kind: make_plan(given(streams=kind, eval="", recover="none")).host_peak for kind in ("host", "disk")}
    for memory, kind in (("64GiB", "host"), (f"{needed['disk']}", "disk")):
        run_ebft(config=given(host_memory=memory, eval="", recover="none", overwrite=True), reporter=silent)
        assert f"hidden states: {kind}" in silent.console.file.getvalue().splitlines()
    too_small = given(host_memory="1GiB", eval="", recover="none", overwrite=True)
    with pytest.raises(EBFTError, match=r"needed with the leanest settings, and --host-memory is 1\.000 GiB"):
        run_ebft(config=too_small, reporter=silent)
    for wrong in ("much", "-3GiB", "0"):
        with pytest.raises(EBFTError, match=f"--host-memory is '{wrong}'; expected a size such as 8GiB or 500MB"):
            EBFTConfig.of(host_memory=wrong)
    assert [parse_bytes(text, "") for text in ("8GiB", "0.5 kb", "3M", "12")] == [2**33, 500, 3_000_000, 12]


# --- streams ------------------------------------------------------------------------------------------------------


def test_rows_are_carried_by_index():
    source, other = torch.randn(7, 3, 4), torch.randn(7, 2).bfloat16()
    batches = [torch.tensor([4, 0, 6]), slice(1, 3), torch.tensor([5])]
    carried = list(carry(CPU, (source, other), batches))
    for (one, two), rows in zip(carried, batches, strict=True):
        assert torch.equal(one, source[rows])
        assert torch.equal(two, other[rows].float())
        assert two.dtype == torch.float32
    assert carried[1][0].data_ptr() == source[1:3].data_ptr()  # not even copied


def test_a_stream_can_hold_some_of_the_samples(tokenizer):
    """What a rank needs: its shard alone, moved on by itself."""
    decoder = Decoder(random_model("llama"), CPU)
    config = EBFTConfig.preset("demo", batch_size=2)
    ids = calibration_tokens("builtin", tokenizer, samples=6, seqlen=16, windows="packed").ids
    whole = Streams(config, decoder, decoder, ids)
    shards = [Streams(config, decoder, decoder, ids[rank::2]) for rank in (0, 1)]
    block = decoder.working_block(0)
    for streams in (whole, *shards):
        streams.dense_pass(lambda hidden: decoder.run_block(0, block, hidden))
        streams.sparse_pass(lambda hidden: decoder.run_block(0, block, hidden))
    for rank, streams in enumerate(shards):
        torch.testing.assert_close(streams.inputs.states, whole.inputs.states[rank::2])


def test_a_file_takes_its_room_at_once(tmp_path):
    """Where the disk is too small, that is an error here, and no crash where a page is touched."""
    output = OutputFolder(str(tmp_path / "out"), overwrite=False)
    with output:
        store = Store(CPU, "disk", torch.bfloat16, output)
        stream = Stream((4, 8, 16), store, 2, "inputs-0")
        file = tmp_path / "out.partial" / "streams" / "inputs-0"
        assert file.stat().st_size == 4 * 8 * 16 * 2
        assert file.stat().st_blocks * 512 >= 4 * 8 * 16 * 2
        stream.states.fill_(1.5)
        store.files(["inputs-0"])
        written = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.bfloat16)
        assert torch.equal(written, torch.full((512,), 1.5).bfloat16())
        with pytest.raises(EBFTError, match="cannot be written: "):
            Stream((2**30, 2**20, 16), store, 2, "inputs-1")
    assert ebft.data.streams._other("inputs-0") == "inputs-1"
