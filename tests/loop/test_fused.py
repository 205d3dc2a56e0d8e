"""liger-kernel's functions take the places of a block's own: shown with stand-ins in plain torch."""

import copy
import gc
import sys
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from ebft.model.fused import fuse_, liger_missing

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.fixture
def liger(monkeypatch):
    """Stand-ins for liger_kernel.transformers.functional that note how often they are called."""
    calls = {"rms_norm": 0, "rope": 0, "swiglu": 0}

    def liger_rms_norm(x, weight, eps, offset=0.0, casting_mode="llama", in_place=True):
        calls["rms_norm"] += 1
        assert not in_place
        return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))

    def liger_rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        calls["rope"] += 1
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return tuple(
            t * cos + torch.cat([-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]], -1) * sin for t in (q, k)
        )

    def liger_swiglu(gate, up):
        calls["swiglu"] += 1
        return F.silu(gate) * up

    module = types.ModuleType("liger_kernel.transformers.functional")
    module.liger_rms_norm, module.liger_rope, module.liger_swiglu = liger_rms_norm, liger_rope, liger_swiglu
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


@pytest.mark.parametrize(
    ("file", "config", "layer", "rotary", "norms"),
    [
        (modeling_llama, LlamaConfig(**SIZES), "LlamaDecoderLayer", "LlamaRotaryEmbedding", 2),
        (modeling_qwen3, Qwen3Config(**SIZES, head_dim=8), "Qwen3DecoderLayer", "Qwen3RotaryEmbedding", 4),
    ],
    ids=["Llama", "Qwen3"],
)
def test_a_block_computes_the_same_with_it(liger, file, config, layer, rotary, norms):
    torch.manual_seed(0)
    config._attn_implementation = "sdpa"
    plain = getattr(file, layer)(config, 0)
    hidden = torch.randn(2, 6, 32)
    places = getattr(file, rotary)(config)(hidden, torch.arange(6).unsqueeze(0))
    fused, own = copy.deepcopy(plain), file.apply_rotary_pos_emb
    assert fuse_(fused) == ("RMSNorm", "SwiGLU", "rotary embedding")
    outputs = [block(hidden, position_embeddings=places) for block in (plain, fused)]
    outputs = [out[0] if isinstance(out, tuple) else out for out in outputs]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    assert liger == {"rms_norm": norms, "rope": 1, "swiglu": 1}
    assert file.apply_rotary_pos_emb is own  # the model's file is as it was
    gradients = [
        torch.autograd.grad(out.square().mean(), list(b.parameters()))
        for out, b in zip(outputs, (plain, fused), strict=True)
    ]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_block_is_gone_with_its_last_name(liger):
    """On a GPU its weights would be in the way of the next block's."""
    block = modeling_llama.LlamaDecoderLayer(LlamaConfig(**SIZES), 0)
    fuse_(block)
    weight = weakref.ref(block.mlp.down_proj.weight)
    gc.disable()
    try:
        del block
        assert weight() is None
    finally:
        gc.enable()


def test_other_modules_are_left_alone(liger):
    block = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    assert fuse_(block) == ()
    assert liger == {"rms_norm": 0, "rope": 0, "swiglu": 0}


def test_its_absence_is_said(monkeypatch):
    monkeypatch.setattr("ebft.model.fused.find_spec", lambda name: None)
    assert "pip install ebft[liger]" in liger_missing()
