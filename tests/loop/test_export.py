"""``ebft export``: what other programs read is the model, zeros and all."""

import json

import pytest
import torch
from conftest import random_model
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from torch.sparse import SparseSemiStructuredTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import ebft
from ebft.cli.app import main
from ebft.compressed.layers import save_compressed
from ebft.data.calibration import builtin_documents
from ebft.errors import EBFTError
from ebft.model.blocks import find_blocks
from ebft.model.matrices import find_matrices
from ebft_kernels import PackedMask

IDS = torch.arange(12)[None]
TEXT = "It was a dark and stormy night, in 1234 — née so."


@pytest.fixture
def made(tmp_path, tokenizer):
    """Makes a pruned model's folder."""

    def make(family="llama-gqa", **changes):
        model = random_model(family, **changes)
        for block in find_blocks(model)[1]:
            for matrix in find_matrices(block):
                weight = block.get_parameter(matrix.name).data
                weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5)
        model.save_pretrained(tmp_path / "dense")
        tokenizer.save_pretrained(tmp_path / "dense")
        return tmp_path / "dense"

    return make


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def from_gguf(file):
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


LLAMA_3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_gguf_file(family, made, tmp_path):
    folder = made(family, **({"head_dim": 128} if family == "qwen3" else {}))  # transformers reads no other from GGUF
    assert main(["export", str(folder), "--to", "gguf"]) == 0
    ours, theirs = from_gguf(tmp_path / "dense.gguf"), AutoModelForCausalLM.from_pretrained(folder)
    window = getattr(theirs.config, "sliding_window", None) or 12
    assert ours.config.max_position_embeddings == (window if family == "mistral" else 64)  # it is none in llama.cpp
    torch.testing.assert_close(logits(ours)[:, :window], logits(theirs)[:, :window], rtol=1e-5, atol=1e-5)
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="dense.gguf")
    given = AutoTokenizer.from_pretrained(folder)
    assert read(TEXT)["input_ids"] == given(TEXT)["input_ids"]
    assert read.eos_token_id == given.eos_token_id


def of_bytes_where_it_has_no_token(size=600):
    """A tokenizer of Llama 2's kind: BPE on text with its spaces written, and bytes for what has no token."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    bpe.train_from_iterator(builtin_documents("calibration")[0].split(), trainer)
    content = json.loads(bpe.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are ordinary tokens
    bpe = Tokenizer.from_str(json.dumps(content))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_a_vocabulary_with_scores(tmp_path):
    given = of_bytes_where_it_has_no_token()
    random_model("llama", vocab_size=len(given)).save_pretrained(tmp_path / "dense")
    given.save_pretrained(tmp_path / "dense")
    assert main(["export", str(tmp_path / "dense"), "--to", "gguf"]) == 0
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="dense.gguf")
    for text in (TEXT, "two  spaces", "漢"):
        assert read(text)["input_ids"] == given(text)["input_ids"]


@pytest.mark.parametrize(("values", "within"), [("q8_0", 0.03), ("q4_0", 0.6)])
def test_zeros_stay_zero_in_blocks(values, within, made, tmp_path):
    """From a compressed folder; 48 is no whole number of blocks of 32, so that down_proj is float16."""
    folder = made()
    save_compressed(str(folder), str(tmp_path / "small"))
    assert main(["export", str(tmp_path / "small"), str(tmp_path / "x.gguf"), "--to", "gguf", "--values", values]) == 0
    ours, theirs = from_gguf(tmp_path / "x.gguf"), AutoModelForCausalLM.from_pretrained(folder)
    for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(weight[other == 0], torch.zeros_like(weight[other == 0])), name
    assert (logits(ours) - logits(theirs)).norm() < within * logits(theirs).norm()


def test_frequencies_of_llama_3_are_a_tensor(made, tmp_path):
    from gguf import GGUFReader

    folder = made(rope_parameters={**LLAMA_3, "original_max_position_embeddings": 32})
    assert main(["export", str(folder), str(tmp_path / "x.gguf"), "--to", "gguf"]) == 0
    factors = next(tensor for tensor in GGUFReader(tmp_path / "x.gguf").tensors if tensor.name == "rope_freqs.weight")
    model = AutoModelForCausalLM.from_pretrained(folder)
    plain = 1e4 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / torch.from_numpy(factors.data.copy()), model.model.rotary_emb.inv_freq)
    assert factors.data[0] == 1 < factors.data[-1] == 8


def test_a_compressed_folder_becomes_an_ordinary_one(made, tmp_path):
    folder = made("gpt2")
    save_compressed(str(folder), str(tmp_path / "small"))
    assert main(["export", str(tmp_path / "small"), "--to", "dense"]) == 0
    ours, theirs = (AutoModelForCausalLM.from_pretrained(place) for place in (tmp_path / "small-dense", folder))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "small-dense")(TEXT) == AutoTokenizer.from_pretrained(folder)(TEXT)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{model}", "{out}", "--to", "gguf"], "is gpt2; expected one of llama, mistral, qwen2, qwen3 for GGUF"),
        (["{model}", "{model}", "--to", "dense"], "is there; give --overwrite to replace it"),
        (["{model}", "{out}", "--to", "dense", "--values", "f16"], "--values f16 is for --to gguf"),
        (["{model}/none", "{out}", "--to", "dense"], "no such folder"),
        (["{model}", "{out}", "--to", "onnx"], "onnx"),
    ],
)
def test_what_cannot_be_exported_is_said(arguments, says, made, tmp_path, capsys):
    folder = made("gpt2")
    places = {"model": str(folder), "out": str(tmp_path / "out")}
    assert main(["export", *(argument.format(**places) for argument in arguments)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("ebft: ")
    assert says in said
    assert {file.name for file in tmp_path.iterdir()} == {"dense"}


# --- semi-structured weights --------------------------------------------------------------------------------------


def two_of_four():
    """A Llama whose MLPs are 2:4, its attention half pruned without a pattern."""
    model = random_model("llama", hidden_size=64, intermediate_size=128, head_dim=16).bfloat16()
    for block in model.model.layers:
        for matrix in find_matrices(block):
            weight = block.get_parameter(matrix.name).data
            if matrix.name.startswith("mlp"):
                weight.copy_(PackedMask.from_scores(weight.abs(), 2, 4).dense() * weight)
            else:
                weight[:, : weight.shape[1] // 2] = 0
    return model


def test_two_of_four_in_torchs_own_layout(monkeypatch):
    """What stands for torch's kernels on a CPU, where there are none, is its conversion to and fro."""
    monkeypatch.setattr(SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
    monkeypatch.setattr(SparseSemiStructuredTensor, "_validate_device_dim_dtype_shape", lambda *given: None)
    monkeypatch.setattr("torch.Tensor.is_cuda", True)
    model = two_of_four()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    turned = ebft.to_semi_structured(model)
    assert turned == [f"model.layers.{block}.mlp.{name}_proj" for block in range(3) for name in ("gate", "up", "down")]
    for name in turned:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, SparseSemiStructuredTensor)
        assert torch.equal(weight.to_dense(), before[f"{name}.weight"])


def test_semi_structured_weights_need_a_gpu():
    with pytest.raises(EBFTError, match=r"is torch\.bfloat16 on cpu; expected float16 or bfloat16 on a CUDA device"):
        ebft.to_semi_structured(two_of_four())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_semi_structured_products_on_a_gpu():
    model = two_of_four().cuda()
    with torch.no_grad():
        expected = model(IDS.cuda()).logits
        ebft.to_semi_structured(model)
        torch.testing.assert_close(model(IDS.cuda()).logits, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.slow
@pytest.mark.parametrize("values", ["bf16", "q8_0"])
def test_llama_cpp_writes_the_same(values, made, trained, tmp_path):
    """Its own code reads the file, encodes text, and goes on with it as transformers does."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python: it is compiled for ten minutes")
    assert main(["export", str(trained), str(tmp_path / "x.gguf"), "--to", "gguf", "--values", values]) == 0
    theirs = llama_cpp.Llama(str(tmp_path / "x.gguf"), n_ctx=64, verbose=False, logits_all=True)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    ids = tokenizer(TEXT)["input_ids"]
    assert theirs.tokenize(TEXT.encode(), add_bos=False) == ids
    theirs.eval(ids)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    got = torch.tensor(theirs.scores[: len(ids)].copy())
    assert (got - expected).norm() < 0.03 * expected.norm()
    assert torch.equal(got.argmax(-1), expected.argmax(-1)) or values == "q8_0"
