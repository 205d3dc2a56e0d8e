"""A run begins by holding the walk from block to block against the model's own forward."""

import pytest
import torch
import transformers
from conftest import VOCABULARY, random_model
from transformers.models.llama import modeling_llama

from ebft import EBFTError, run_ebft
from ebft.model.agreement import check_agreement
from ebft.model.checkpoint import open_model
from ebft.model.decoder import Decoder

CPU = torch.device("cpu")


def test_a_model_that_works_between_its_blocks_is_refused(config, silent, tokenizer):
    made = transformers.XLMConfig(vocab_size=VOCABULARY, emb_dim=32, n_layers=3, n_heads=4, causal=True, asm=False)
    model = transformers.XLMWithLMHeadModel(made).eval()
    said = r"does more to hidden states between transformer\.ffns\.0 and transformer\.ffns\.1 than to hand them on"
    with pytest.raises(EBFTError, match=said):
        run_ebft(model, config(), tokenizer=tokenizer, reporter=silent)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_block_that_needs_more_than_hidden_states_is_refused(on_disk, tmp_path, monkeypatch):
    """Such as what the call before has left behind."""
    own, calls = modeling_llama.LlamaDecoderLayer.forward, [0, 0, 0]

    def forward(block, hidden, **kwargs):
        index = block.self_attn.layer_idx
        calls[index] += 1
        return own(block, hidden, **kwargs) * (2 if index == 2 and calls[index] % 2 else 1)

    random_model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)
    if on_disk:
        opened = open_model(str(tmp_path))
        decoder = Decoder(opened.model, CPU, weights=opened.weights)
    else:
        decoder = Decoder(random_model("llama"), CPU)

    with pytest.raises(EBFTError, match=r"my model: run by itself, model\.layers\.2 gives other hidden states than in"):
        check_agreement(decoder, "my model")


def test_the_check_leaves_nothing_in_memory_and_changes_no_random_numbers(tmp_path):
    random_model("gemma3").save_pretrained(tmp_path)
    opened = open_model(str(tmp_path))
    decoder = Decoder(opened.model, CPU, weights=opened.weights)
    before = torch.random.get_rng_state()
    check_agreement(decoder, "my model")
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(parameter.is_meta for parameter in decoder._skeleton.parameters())
