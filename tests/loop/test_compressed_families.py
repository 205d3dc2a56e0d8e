"""Families whose modules read weights of their own, rewrite them, or need a cache: what runs can be compressed."""

import pytest
import torch
from conftest import VOCABULARY
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ebft.compressed.layers import load_compressed, save_compressed
from ebft.model.blocks import find_blocks
from ebft.model.matrices import find_matrices

_BASE = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
_BASE |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
_BASE |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
_SCAN = {"state_size": 4, "time_step_rank": 4}
_MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_EXPERTS = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_LATENT |= {"num_key_value_heads": 4, "head_dim": 8, "first_k_dense_replace": 1}
_INDEXED = {**_EXPERTS, **_LATENT, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
_JAMBA = {"num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2}
_JAMBA |= {"attn_layer_offset": 1, "use_mamba_kernels": False}
_MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_local_experts": 4}
_LINEAR = {**_EXPERTS, **_LATENT, **_MIXED, "linear_head_dim": 8, "linear_num_heads": 4}

# family -> (its settings, the ends of the names of layers that stay dense)
FAMILIES = {
    "mamba": (_SCAN, {"dt_proj", "out_proj", "x_proj"}),
    "rwkv": ({"attention_hidden_size": 32, "num_hidden_layers": 7}, {"attention.output", "feed_forward.value"}),
    "kimi_linear": (_LINEAR, set()),
    "deepseek_v32": (_INDEXED, {"indexer.weights_proj"}),
    "diffllama": ({"head_dim": 8}, set()),
    "falcon_mamba": (_SCAN, {"dt_proj", "out_proj", "x_proj"}),
    "jamba": (_JAMBA, {"dt_proj"}),
    "glm_moe_dsa": (_INDEXED, {"indexer.weights_proj"}),
    "xlstm": ({"num_heads": 4, "chunk_size": 16}, set()),
    "bamba": ({**_MAMBA_2, "attn_layer_indices": [1]}, {"mamba.out_proj"}),
    "granitemoehybrid": (
        {**_MAMBA_2, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 2, "num_experts_per_tok": 1},
        {"mamba.out_proj"},
    ),
    "bailing_hybrid": (_LINEAR, set()),
}
_OFTEN = 3  # of them: those that read weights, rewrite them, or are stored under other names


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[pytest.mark.slow] * (n >= _OFTEN)) for n, family in enumerate(FAMILIES)]
)
def test_a_family_that_runs_compresses(family, tmp_path, tokenizer):
    """The same logits; layers whose weight other modules read stay dense, and are named."""
    settings, dense = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**_BASE, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
        for block in find_blocks(model)[1]:
            for matrix in find_matrices(block):
                weight = block.get_parameter(matrix.name)
                weight.mul_(torch.rand(weight.shape) > 0.5)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    saved = save_compressed(str(tmp_path / "dense"), str(tmp_path / "small"))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        ours, theirs = (m(ids, use_cache=False).logits for m in (load_compressed(tmp_path / "small"), model))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(saved["layers"]) > len(saved["left"])
    assert {end for end in dense if any(name.endswith(f".{end}") for name in saved["left"])} == dense
    assert all(name.endswith(tuple(dense)) for name in saved["left"])
