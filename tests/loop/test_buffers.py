"""Buffers that no checkpoint holds have the values that transformers gives them, and never what lay in memory."""

from unittest import mock

import pytest
import torch
import transformers
from conftest import VOCABULARY, random_model

from ebft import EBFTError
from ebft.model.checkpoint import open_model
from ebft.model.tensors import make_buffers_real

_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}


def falcon_h1():
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
    return transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**_SMALL, **mamba))


@pytest.mark.parametrize("made", [falcon_h1, lambda: random_model("gemma3")], ids=["falcon_h1", "gemma3"])
def test_buffers_are_those_of_from_pretrained(made, tmp_path):
    """Also where a block initialises those of its parts, and where memory was not zero before."""
    model = made()
    model.save_pretrained(tmp_path)
    own = torch.empty_like
    with mock.patch.object(torch, "empty_like", lambda *a, **k: own(*a, **k).fill_(77)):
        opened = dict(open_model(str(tmp_path)).model.named_buffers())
    expected = dict(type(model).from_pretrained(tmp_path).named_buffers())
    assert opened.keys() == expected.keys()
    assert opened
    for name, buffer in opened.items():
        torch.testing.assert_close(buffer, expected[name], msg=name)


def test_a_model_within_a_model_initialises_its_own(tmp_path):
    """The scale of Gemma's embeddings, in a model whose own initialisation does not know it."""
    text = {**_SMALL, "model_type": "gemma3_text"}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config={**vision, "model_type": "siglip_vision_model"}
    )
    with torch.device("meta"):
        model = transformers.PaliGemmaForConditionalGeneration(config)
    make_buffers_real(model)
    scales = [float(buffer) for name, buffer in model.named_buffers() if name.endswith("embed_scale")]
    assert scales == pytest.approx([32**0.5])


def test_a_buffer_that_nobody_fills_is_named():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SMALL))
        model.model.register_buffer("table", torch.ones(3), persistent=False)
    with pytest.raises(EBFTError, match=r"model\.table has no values: it is in no file"):
        make_buffers_real(model)
